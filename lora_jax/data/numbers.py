"""Amounts in running text: reading them, and telling whether two are the same."""

import dataclasses
import re
from decimal import Decimal

# Unit -> power of ten; '' is a bare number.
UNITS = {'': 0, 'percent': -2, 'thousand': 3, 'million': 6, 'billion': 9, 'trillion': 12}
_SPELLINGS = {'%': 'percent', 'k': 'thousand', 'm': 'million', 'mn': 'million', 'bn': 'billion'}
_NUMBER = re.compile(
  r"""
  (?P<open>\()?\s*
  (?P<sign>(?<![\w.)%])[-\u2212\u2013])?\s*
  (?P<currency>(?:US|USD|RM|C|A)?[$\u20ac\u00a3\u00a5])?\s*
  (?P<inner>[-\u2212]|\()?\s*
  (?P<digits>\d[\d,]*(?:\.\d+)?|\.\d+)
  \s*(?P<unit>%|(?:percent|thousand|million|billion|trillion|mn|bn|[km])\b)?
  \s*(?P<close>\))?
  \s*(?P<late>%|(?:percent|thousand|million|billion|trillion)\b)?
  """,
  re.VERBOSE | re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Quantity:
  """A number as written and its unit.

  Attributes:
    value: the number as written, with its decimals.
    unit: '', 'percent', 'thousand', 'million', 'billion' or 'trillion'.
  """

  value: Decimal
  unit: str

  def in_unit(self, unit: str) -> Decimal:
    """The number that says the same in another unit; 'percent' is a hundredth of ''."""
    return self.value.scaleb(UNITS[self.unit] - UNITS[unit])


def read_quantity(text: str, whole: bool = False) -> Quantity | None:
  """The amount that a text gives, or None.

  A text that opens with an amount gives that one ("12.5, more than in 2019"), any other
  its last with a unit or currency ("about 12 % more than in 2019"), or else its last.
  Parentheses and any dash mean a negative.

  Args:
    text: the text.
    whole: accept only a text that is nothing but an amount.
  """
  text = text.strip().rstrip('.')
  found = list(_NUMBER.finditer(text))
  if not found:
    return None
  first = found[0]
  opens = not re.search(r'\w', text[: first.start()])
  if whole:
    rest = text[: first.start()] + text[first.end() :]
    if len(found) > 1 or re.search(r'\w', rest):
      return None
  marked = [match for match in found if _is_marked(match)]
  return _quantity(first if opens else (marked or found)[-1])


def only_quantity(text: str) -> Quantity | None:
  """The amount that a sentence gives where it gives no other, years aside, or None.

  >>> only_quantity('From 2018 to 2019 sales rose by 12.5 %.')
  Quantity(value=Decimal('12.5'), unit='percent')
  >>> only_quantity('20 / 60 = 0.33')
  """
  found = [match for match in _NUMBER.finditer(text) if not _is_year(match)]
  return _quantity(found[0]) if len(found) == 1 else None


def _is_marked(match: re.Match[str]) -> bool:
  return bool(match['unit'] or match['late'] or match['currency'])


def _is_year(match: re.Match[str]) -> bool:
  return not _is_marked(match) and re.fullmatch(r'(19|20)\d\d', match['digits']) is not None


def _quantity(match: re.Match[str]) -> Quantity:
  value = Decimal(match['digits'].replace(',', ''))
  bracketed = bool(match['close']) and bool(match['open'] or match['inner'] == '(')
  dashed = bool(match['sign']) or match['inner'] not in (None, '(')
  unit = (match['unit'] or match['late'] or '').lower()
  return Quantity(-value if bracketed or dashed else value, _SPELLINGS.get(unit, unit))


def same_quantity(said: Quantity, reference: Quantity) -> bool:
  """Whether an amount is the reference, to the coarser precision of the two and within 1 %.

  A bare number may stand for the reference's own unit; for a percentage it may also be
  the fraction. An amount with another unit must come to the same amount.

  >>> same_quantity(Quantity(Decimal('25.5'), ''), Quantity(Decimal('25.53'), 'percent'))
  True
  >>> same_quantity(Quantity(Decimal('2019'), ''), Quantity(Decimal('2018'), ''))
  False
  """
  candidates = [said.in_unit(reference.unit)]
  if not said.unit:
    candidates.append(said.value)
  return any(_close(value, reference.value) for value in candidates)


def _close(said: Decimal, reference: Decimal) -> bool:
  if abs(said - reference) > abs(reference) / 100:
    return False
  unit = Decimal(1).scaleb(-min(_decimals(said), _decimals(reference)))
  return (said / unit).to_integral_value() == (reference / unit).to_integral_value()


def _decimals(value: Decimal) -> int:
  exponent = value.normalize().as_tuple().exponent
  return max(0, -exponent) if isinstance(exponent, int) else 0

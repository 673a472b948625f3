"""Text to draw: words that exist, words that do not, numbers, dates and codes.

Much of it cannot be guessed from what stands before it, so that it has to be read.
"""

import datetime
import random

_WORDS = (
  'about', 'above', 'account', 'after', 'again', 'agent', 'allow', 'amount', 'and', 'another',
  'apple', 'april', 'arrive', 'august', 'autumn', 'avenue', 'balance', 'bank', 'basket', 'before',
  'below', 'bottle', 'branch', 'bread', 'bring', 'brown', 'building', 'business', 'but', 'cable',
  'call', 'card', 'carry', 'cash', 'centre', 'change', 'charge', 'check', 'circle', 'city', 'clean',
  'close', 'coffee', 'colour', 'company', 'counter', 'country', 'credit', 'customer', 'daily',
  'date', 'december', 'deliver', 'desk', 'detail', 'discount', 'door', 'down', 'each', 'early',
  'east', 'eight', 'empty', 'engine', 'enter', 'even', 'every', 'exact', 'exchange', 'extra',
  'family', 'february', 'field', 'final', 'first', 'five', 'floor', 'food', 'for', 'four', 'free',
  'fresh', 'friday', 'from', 'fruit', 'garden', 'general', 'give', 'glass', 'goods', 'grand',
  'great', 'green', 'group', 'half', 'hand', 'have', 'head', 'heavy', 'help', 'high', 'hold',
  'home', 'hour', 'house', 'hundred', 'include', 'into', 'invoice', 'item', 'january', 'join',
  'june', 'just', 'keep', 'kind', 'kitchen', 'label', 'large', 'last', 'late', 'leave', 'left',
  'letter', 'level', 'light', 'limit', 'line', 'little', 'long', 'lunch', 'machine', 'main', 'make',
  'many', 'march', 'market', 'may', 'member', 'metal', 'middle', 'milk', 'minute', 'monday',
  'money', 'month', 'more', 'morning', 'most', 'much', 'name', 'narrow', 'near', 'net', 'never',
  'next', 'nine', 'north', 'not', 'note', 'number', 'october', 'off', 'office', 'oil', 'only',
  'open', 'orange', 'order', 'other', 'our', 'outside', 'over', 'owner', 'paper', 'part', 'pay',
  'payment', 'people', 'per', 'phone', 'piece', 'place', 'plain', 'plan', 'plate', 'point', 'post',
  'power', 'price', 'print', 'quality', 'quantity', 'quick', 'quiet', 'rate', 'rather', 'reach',
  'read', 'receipt', 'record', 'refund', 'register', 'return', 'rice', 'right', 'river', 'road',
  'room', 'round', 'sale', 'same', 'saturday', 'save', 'school', 'second', 'section', 'sell',
  'september', 'service', 'seven', 'shape', 'shop', 'short', 'side', 'sign', 'silver', 'simple',
  'six', 'size', 'small', 'soap', 'some', 'south', 'square', 'stand', 'start', 'station', 'still',
  'stock', 'stone', 'store', 'street', 'strong', 'sugar', 'sunday', 'supply', 'table', 'take',
  'tax', 'tea', 'ten', 'than', 'thank', 'that', 'the', 'then', 'these', 'thing', 'this', 'three',
  'through', 'thursday', 'ticket', 'time', 'today', 'together', 'total', 'town', 'train', 'tuesday',
  'twelve', 'two', 'under', 'unit', 'until', 'upper', 'use', 'value', 'very', 'visit', 'wall',
  'warm', 'water', 'wednesday', 'week', 'west', 'white', 'wide', 'will', 'window', 'winter', 'with',
  'without', 'wood', 'word', 'work', 'year', 'yellow', 'your', 'zone',
)  # fmt: skip
_CONSONANTS, _VOWELS = 'bcdfghjklmnprstvwyz', 'aeiou'
_DATES = (
  '%d/%m/%Y', '%d-%m-%Y', '%d/%m/%y', '%d-%m-%y', '%d %b %Y', '%Y-%m-%d', '%d.%m.%Y', '%b %d, %Y',
  '%d %B %Y',
)  # fmt: skip
_MARKS = '!"#$%&\'()*+,-./:;<=>?@[\\]^_`{|}~'


def word(rng: random.Random) -> str:
  """One word, number or code."""
  draw = rng.random()
  if draw < 0.5:
    text = rng.choice(_WORDS)
  elif draw < 0.7:
    parts = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3)))
    text = ''.join(parts) + rng.choice(_CONSONANTS)
  else:
    return rng.choice((number, money, code, date, time))(rng)
  return rng.choice((str.lower, str.lower, str.title, str.upper))(text)


def line(rng: random.Random, characters: int) -> str:
  """Words up to about so many characters; at least one, whatever its length."""
  said = word(rng)
  while len(said) < characters:
    more = word(rng)
    if len(said) + 1 + len(more) > characters:
      break
    said += rng.choice((' ', ' ', ' ', ', ', ': ', ' - ')) + more
  if rng.random() < 0.1:
    said = rng.choice(('({})', '[{}]', '"{}"', '{}!', '{}?', '{}.', '*{}*')).format(said)
  return said


def number(rng: random.Random) -> str:
  """A whole number of one to eight digits."""
  return str(rng.randrange(10 ** rng.randint(1, 8)))


def money(rng: random.Random) -> str:
  """An amount, with or without a sign."""
  whole = rng.randrange(10 ** rng.randint(1, 4))
  sign = rng.choice(('', '', '', '$', 'RM', 'RM ', 'EUR ', '-'))
  return f'{sign}{whole:{rng.choice(("", ","))}}.{rng.randrange(100):02d}'


def date(rng: random.Random) -> str:
  """A day between 2000 and 2030 in one of the usual forms."""
  day = datetime.date(2000, 1, 1) + datetime.timedelta(days=rng.randrange(11_000))
  said = day.strftime(rng.choice(_DATES))
  return said.upper() if rng.random() < 0.3 else said


def time(rng: random.Random) -> str:
  """A time of day."""
  hour, minute = rng.randrange(24), rng.randrange(60)
  forms = (f'{hour:02d}:{minute:02d}', f'{hour % 12 or 12}:{minute:02d}{"AP"[hour > 11]}M')
  return rng.choice((*forms, f'{hour:02d}:{minute:02d}:{rng.randrange(60):02d}'))


def code(rng: random.Random) -> str:
  """Letters, digits and marks in no order."""
  alphabet = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'
  text = ''.join(rng.choice(alphabet) for _ in range(rng.randint(2, 9)))
  if rng.random() < 0.4:
    at = rng.randrange(len(text))
    text = text[:at] + rng.choice(_MARKS) + text[at:]
  return text.lower() if rng.random() < 0.2 else text

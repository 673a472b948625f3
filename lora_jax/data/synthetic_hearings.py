"""Generated hearings: a title page, a roster, witnesses, and the record they describe.

What has to be learnt: the congress from its number in words, the chamber from the
title page, the day of the hearing rather than of its printing, members in one or two
columns, and witnesses whose surname comes first in the contents. People, subjects and
dates are combined from parts; committees and states are real ones.
"""

import calendar
import datetime
import random
from typing import Any

_FIRST = (
  'Adele', 'Bernard', 'Carla', 'Dominic', 'Edith', 'Felix', 'Greta', 'Howard', 'Irene', 'Jasper',
  'Katrina', 'Leland', 'Miriam', 'Nolan', 'Odessa', 'Preston', 'Rosalind', 'Stuart', 'Thea',
  'Vernon', 'Winifred', 'Yolanda',
)  # fmt: skip
_LAST = (
  'Abernathy', 'Bexley', 'Cordova', 'Drummond', 'Ellsworth', 'Farrow', 'Gallardo', 'Hatcher',
  'Ibarra', 'Jernigan', 'Kowalski', 'Lindqvist', 'Mercado', 'Nakamura', 'Oakes', 'Pruitt', 'Quimby',
  'Rasmussen', 'Stanfield', 'Tolliver', 'Underhill', 'Vasquez', 'Whitlock', 'Yarborough',
)  # fmt: skip
_STATES = (
  'Alabama', 'Arizona', 'Colorado', 'Florida', 'Georgia', 'Idaho', 'Illinois', 'Iowa', 'Kansas',
  'Maine', 'Michigan', 'Montana', 'Nebraska', 'Nevada', 'New Mexico', 'New York', 'Ohio', 'Oregon',
  'Pennsylvania', 'Texas', 'Utah', 'Vermont', 'West Virginia', 'Wyoming',
)  # fmt: skip
_COMMITTEES = {
  'House of Representatives': (
    'Committee on Agriculture', 'Committee on Armed Services', 'Committee on Financial Services',
    'Committee on Natural Resources', 'Committee on Small Business', 'Committee on the Judiciary',
    'Committee on Ways and Means',
  ),
  'Senate': (
    'Committee on Appropriations', 'Committee on Commerce, Science, and Transportation',
    'Committee on Energy and Natural Resources', 'Committee on Finance', 'Committee on the Budget',
    'Committee on the Judiciary', "Committee on Veterans' Affairs",
  ),
}  # fmt: skip
_ANGLES = (
  'The Future of', 'Oversight of', 'The State of', 'Rising Costs in', 'Improving Access to',
  'Barriers to Investment in', 'Waste and Delay in', 'Lessons Learned from',
)  # fmt: skip
_SUBJECTS = (
  'Rural Broadband', 'Veterans Hospitals', 'Crop Insurance', 'Port Security', 'Wildfire Response',
  'Student Lending', 'Coastal Fisheries', 'Bridge Repair', 'Community Banks', 'Flood Maps',
  'Patent Review', 'Apprenticeship Programs', 'Water Storage', 'Freight Rail', 'Cyber Defense',
)  # fmt: skip
_PLACES = (
  '',
  '',
  ' in the Western States',
  ' in Small Towns',
  ' After the Storms',
  ' on Tribal Lands',
)
_ROLES = ('Director', 'President', 'Chief Economist', 'Vice President', 'General Counsel', 'Chair')
_BODIES = (
  'National Grain Alliance', 'Harlow University', 'Office of Field Audits', 'Clearwater Institute',
  'Mountain States Bank', 'Bureau of Local Works', 'Union of Rail Workers', 'Beacon Policy Center',
)  # fmt: skip
_ONES = ('', 'First', 'Second', 'Third', 'Fourth', 'Fifth', 'Sixth', 'Seventh', 'Eighth', 'Ninth')
_TEENS = ('Tenth', 'Eleventh', 'Twelfth', 'Thirteenth', 'Fourteenth', 'Fifteenth', 'Sixteenth',
          'Seventeenth', 'Eighteenth', 'Nineteenth')  # fmt: skip


def rows(seed: int, count: int) -> list[dict[str, Any]]:
  """`count` hearings with the fields of `lora_jax.data.cocohd`; row i depends on (seed, i)."""
  return [_row(random.Random(f'hearing:{seed}:{i}'), f'hearing-{seed}-{i}') for i in range(count)]


def _congress(number: int) -> str:
  """The ordinal of a congress from the 101st to the 119th in words: 'One Hundred Eighth'."""
  below_hundred = number - 100
  return f'One Hundred {(_ONES + _TEENS)[below_hundred]}'


def _row(rng: random.Random, row_id: str) -> dict[str, Any]:
  number = rng.randint(101, 118)
  session = rng.randint(1, 2)
  # The first congress met in 1789 and each lasts two years.
  year = 1787 + 2 * number + session - 1
  month = rng.randint(1, 12)
  day = datetime.date(year, month, rng.randint(1, calendar.monthrange(year, month)[1]))
  held_date = f'{day:%B} {day.day}, {day.year}'
  chamber = rng.choice(tuple(_COMMITTEES))
  committee = rng.choice(_COMMITTEES[chamber])
  title = f'{rng.choice(_ANGLES)} {rng.choice(_SUBJECTS)}{rng.choice(_PLACES)}'
  title = title.upper() if rng.random() < 0.6 else title
  serial = _serial(rng, chamber, number)
  members = [{'name': _name(rng), 'state': rng.choice(_STATES)} for _ in range(rng.randint(2, 5))]
  witnesses = [
    {'name': _name(rng), 'affiliation': f'{rng.choice(_ROLES)}, {rng.choice(_BODIES)}'}
    for _ in range(rng.randint(1, 3))
  ]

  congress = f'{_congress(number)} Congress'.upper()
  printed = year + rng.randint(0, 1)
  parts = [
    f'[{chamber.removesuffix(" of Representatives")} Hearing, {number}th Congress]'
    if rng.random() < 0.4
    else '[Printed Hearing Record]',
    _centred(title),
    _centred('HEARING') + '\n' + _centred('BEFORE THE'),
    _centred(committee.upper()) + '\n' + _centred(_house_line(chamber)),
    _centred(congress) + '\n' + _centred(f'{("FIRST", "SECOND")[session - 1]} SESSION'),
    _centred(held_date.upper()),
    _centred(serial) if serial else _centred('__________'),
    f'{rng.randint(10, 99)}-{rng.randint(100, 999)} PDF      WASHINGTON : {printed}',
    _roster(rng, committee, members),
    _contents(rng, witnesses, held_date),
    _opening(rng, committee, members),
  ]
  return {
    'id': row_id,
    'transcript': '\n\n'.join(parts),
    'details': {
      'govinfo_id': row_id,
      'title': title,
      'congress_session': str(number),
      'chamber': chamber,
      'held_date': held_date,
      'committee': committee,
      'serial_no': serial,
      'members': members,
      'bill_numbers': [],
      'witnesses': witnesses,
    },
  }


def _centred(text: str) -> str:
  return text.center(68).rstrip()


def _house_line(chamber: str) -> str:
  return 'UNITED STATES SENATE' if chamber == 'Senate' else 'HOUSE OF REPRESENTATIVES'


def _serial(rng: random.Random, chamber: str, number: int) -> str | None:
  if rng.random() < 0.2:
    return None
  prefix = 'S. Hrg.' if chamber == 'Senate' else 'Serial No.'
  return f'{prefix} {number}-{rng.randint(1, 999)}'


def _name(rng: random.Random) -> str:
  initial = f'{rng.choice("ABCDEFGHJKLMPRSTW")}. ' if rng.random() < 0.4 else ''
  return f'{rng.choice(_FIRST)} {initial}{rng.choice(_LAST)}'


def _roster(rng: random.Random, committee: str, members: list[dict[str, str]]) -> str:
  shout = rng.random() < 0.6
  entries = [
    f'{member["name"].upper() if shout else member["name"]}, {member["state"]}'
    for member in members
  ]
  lines = [_centred(committee.upper()), '', _centred(f'{entries[0]}, Chairman')]
  rest = entries[1:]
  if rng.random() < 0.5:
    lines += rest
  else:
    lines += [''.join(entry.ljust(36) for entry in rest[i : i + 2]) for i in range(0, len(rest), 2)]
  lines.append(_centred(f'{_name(rng)}, Staff Director'))
  return '\n'.join(lines)


def _contents(rng: random.Random, witnesses: list[dict[str, str]], held_date: str) -> str:
  lines = [_centred('C O N T E N T S'), '', _centred(held_date), _centred('WITNESSES')]
  surname_first = rng.random() < 0.6
  page = rng.randint(2, 9)
  for witness in witnesses:
    first, _, last = witness['name'].rpartition(' ')
    name = f'{last}, {first}' if surname_first else witness['name']
    lines.append(f'{name}, {witness["affiliation"]}'.ljust(64, '.') + f' {page}')
    if rng.random() < 0.4:
      lines.append(f'    Prepared statement {"." * 40} {page + 2}')
    page += rng.randint(4, 15)
  return '\n'.join(lines)


def _opening(rng: random.Random, committee: str, members: list[dict[str, str]]) -> str:
  surnames = [member['name'].split()[-1] for member in members]
  room = rng.randint(100, 2400)
  return rng.choice(
    (
      f'The committee met at {rng.randint(9, 11)} a.m. in room {room}, {members[0]["name"]} '
      f'presiding.\nPresent: {", ".join(surnames)}.',
      f'The {committee} came to order in room {room}.\nThe Chair. Good morning. I thank our '
      f'witnesses for joining us, and I yield to {surnames[-1]} of {members[-1]["state"]}.',
    )
  )

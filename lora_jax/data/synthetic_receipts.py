"""Generated receipts: words with boxes, a rendered image, and the four true fields.

What has to be learnt: a company's name among slogans and registration numbers, an
address over several lines, the one date that is the receipt's, and the total among
subtotal, tax, rounding, cash and change. Companies, streets and goods are combined
from parts, so hardly a value comes twice; layouts vary from row to row.

  rows(seed=0, count=2)[0]['parsed_data']    '{"xml":"","json":"{...}","kie":""}'
"""

import dataclasses
import datetime
import functools
import io
import random
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lora_jax.data.json_score import compact

_OWNERS = (
  'Alder', 'Bramble', 'Calloway', 'Dunmore', 'Eastgate', 'Fenwick', 'Golden Kite', 'Harrow',
  'Ironwood', 'Juniper', 'Kestrel', 'Lantern', 'Marlow', 'Northway', 'Old Mill', 'Pinefield',
  'Quayside', 'Red Barn', 'Silver Oak', 'Tamarind', 'Umber', 'Violet Hill', 'Westbrook', 'Yarrow',
)  # fmt: skip
_TRADES = (
  'Hardware', 'Bakery', 'Stationers', 'Pharmacy', 'Grocers', 'Bookshop', 'Garden Centre', 'Cafe',
  'Motor Parts', 'Electrical', 'Textiles', 'Pet Supplies', 'Noodle House', 'Mini Market',
)  # fmt: skip
_FORMS = ('Ltd', 'Sdn Bhd', 'Pte Ltd', 'Enterprise', 'Trading', 'Inc.', '& Sons', 'Co.')
_STREETS = (
  'Harbour', 'Chapel', 'Orchard', 'Mango', 'Station', 'Lotus', 'Granite', 'Willow', 'Bukit Indah',
  'Market', 'Fountain', 'Cedar', 'Riverside', 'Temple', 'Palm', 'Foundry',
)  # fmt: skip
_ROADS = ('Street', 'Road', 'Lane', 'Avenue', 'Way', 'Terrace')
_AREAS = ('Taman Selasih', 'Eastfield', 'Kampung Baru', 'Northgate Park', 'Old Town', 'Section 9')
_TOWNS = (
  'Port Selden', 'Kuala Merang', 'Ashwater', 'Bandar Teluk', 'Lindholm', 'Greyford', 'Sungai Perak',
  'Marrow Bay', 'Tanjung Lada', 'Overstone',
)  # fmt: skip
_GOODS = (
  ('LED bulb 9W', 890), ('White loaf', 320), ('A4 paper ream', 1450), ('Paint roller', 675),
  ('Green tea', 240), ('Cat food 1kg', 1290), ('Pipe clip 20mm', 85), ('Iced coffee', 480),
  ('Notebook A5', 395), ('Sunflower oil', 2150), ('Cotton towel', 1675), ('Hex bolt M8', 45),
  ('Chicken rice', 950), ('Cough syrup', 1180), ('USB cable', 1525), ('Potting soil', 2240),
  ('Wiper blade', 3350), ('Rice 5kg', 2795), ('Ballpoint pen', 110), ('Soap bar', 265),
)  # fmt: skip
_DATES = ('%d/%m/%Y', '%d-%m-%Y', '%d/%m/%y', '%d %b %Y', '%Y-%m-%d', '%d.%m.%Y', '%b %d, %Y')
_GREETINGS = ('Thank you', 'Please come again', 'Goods sold are not returnable', 'Have a nice day')
_WIDTH = 384


@dataclasses.dataclass(frozen=True)
class Cell:
  """One OCR word group: its text and where it stands on its line (0 left .. 1 right)."""

  text: str
  align: float


# A printed line is its cells from left to right.
Line = tuple[Cell, ...]


@dataclasses.dataclass(frozen=True)
class Receipt:
  """What a receipt says.

  Attributes:
    lines: printed lines from top to bottom, each its cells from left to right.
    fields: company, date, address and total, as printed.
  """

  lines: tuple[Line, ...]
  fields: dict[str, str]


def _left(text: str) -> Line:
  return (Cell(text, 0.0),)


def _centre(text: str) -> Line:
  return (Cell(text, 0.5),)


def _pair(label: str, value: str) -> Line:
  return (Cell(label, 0.0), Cell(value, 1.0))


def rows(seed: int, count: int) -> list[dict[str, Any]]:
  """`count` receipts with the fields of `lora_jax.data.invoice_ocr`; row i depends on (seed, i).

  `image` is an encoded greyscale PNG, 384 pixels wide. `raw_data` holds the words in reading
  order with their four-point boxes in pixels.
  """
  return [_row(random.Random(f'receipt:{seed}:{i}'), f'receipt-{seed}-{i}') for i in range(count)]


def compose(rng: random.Random) -> Receipt:
  """What a receipt says, before it is drawn."""
  shout = rng.random() < 0.6
  company_words = f'{rng.choice(_OWNERS)} {rng.choice(_TRADES)} {rng.choice(_FORMS)}'
  company = company_words.upper() if shout else company_words
  address = [line.upper() if shout else line for line in _address(rng)]
  date, date_lines = _date(rng)
  total, body = _body(rng)

  lines = [_centre(company)]
  head = [_centre(line) for line in address]
  registration = _centre(rng.choice((f'({rng.randint(100000, 999999)}-{rng.choice("HKMTW")})',
                                     f'GST ID {rng.randint(10**8, 10**9 - 1)}')))  # fmt: skip
  head.insert(rng.choice((0, len(head))), registration)
  if rng.random() < 0.5:
    head.append(_centre(f'Tel {rng.randint(2, 9)}{rng.randint(1000000, 9999999)}'))
  lines += head
  title = [_centre(rng.choice(('TAX INVOICE', 'RECEIPT', 'CASH BILL', 'INVOICE')))]
  lines += title if rng.random() < 0.6 else []
  if rng.random() < 0.6:
    lines += date_lines + body
  else:
    lines += body + date_lines
  lines.append(_centre(rng.choice(_GREETINGS)))
  gold = {'company': company, 'date': date, 'address': ' '.join(address), 'total': total}
  return Receipt(tuple(lines), gold)


def _row(rng: random.Random, row_id: str) -> dict[str, Any]:
  printed = compose(rng)
  words, boxes, image = _render(printed.lines)
  return {
    'id': row_id,
    'image': image,
    'parsed_data': compact({'xml': '', 'json': compact(printed.fields), 'kie': ''}),
    'raw_data': compact({'ocr_words': words, 'ocr_boxes': boxes}),
  }


def _address(rng: random.Random) -> list[str]:
  number = rng.choice(('{}', 'No. {}', 'Lot {}', 'Unit {}')).format(rng.randint(1, 240))
  lines = [f'{number}, {rng.choice(_STREETS)} {rng.choice(_ROADS)},']
  if rng.random() < 0.4:
    lines.append(f'{rng.choice(_AREAS)},')
  lines.append(f'{rng.randint(10000, 98999)} {rng.choice(_TOWNS)}')
  return lines


def _date(rng: random.Random) -> tuple[str, list[Line]]:
  """The date as printed, and the lines that hold it among other numbers."""
  day = datetime.date(2015, 1, 1) + datetime.timedelta(days=rng.randrange(3650))
  date = day.strftime(rng.choice(_DATES))
  time = f'{rng.randint(8, 21):02d}:{rng.randint(0, 59):02d}'
  number = str(rng.randint(1000, 99999))
  lines = rng.choice(
    (
      [_pair(f'Date: {date}', time), _left(f'Bill no: {number}')],
      [_pair(f'#{number}', f'{date} {time}')],
      [_pair('Invoice', number), _pair('Date', date)],
      [_left(f'{date} {time} till {rng.randint(1, 9)}')],
    )
  )
  return date, lines


def _body(rng: random.Random) -> tuple[str, list[Line]]:
  """The total as printed, and the lines from the first item to the change."""
  currency = rng.choice(('RM', '$', 'EUR ', ''))
  lines = []
  subtotal = 0
  for name, cents in rng.sample(_GOODS, rng.choice((1, 2, 2, 3))):
    price = cents + rng.randint(-40, 60)
    quantity = rng.choice((1, 1, 1, 2, 3))
    subtotal += quantity * price
    if rng.random() < 0.5:
      lines.append(_pair(f'{quantity} {name}', _money(quantity * price)))
    else:
      lines += [_left(name), _pair(f'{quantity} x {_money(price)}', _money(quantity * price))]

  rate = rng.choice((0, 5, 6, 8))
  tax = round(subtotal * rate / 100)
  exact = subtotal + tax
  total = 5 * round(exact / 5) if rng.random() < 0.5 else exact
  if rate or rng.random() < 0.3:
    lines.append(_pair(rng.choice(('Subtotal', 'Sub-total', 'Total excl. tax')), _money(subtotal)))
  if rate:
    lines.append(_pair(f'{rng.choice(("GST", "Tax", "VAT"))} {rate}%', _money(tax)))
  if total != exact:
    lines.append(_pair('Rounding', _money(total - exact)))
  label = rng.choice(
    ('TOTAL', 'Total', 'Grand total', 'Amount due', 'NET TOTAL', 'Total incl. tax')
  )
  lines.append(_pair(label, currency + _money(total)))
  if rng.random() < 0.7:
    cash = (total // 1000 + rng.randint(1, 3)) * 1000
    lines += [_pair('Cash', _money(cash)), _pair('Change', _money(cash - total))]
  else:
    lines.append(_pair(rng.choice(('Visa', 'Debit card', 'E-wallet')), _money(total)))
  return _money(total), lines


def _money(cents: int) -> str:
  return f'{"-" if cents < 0 else ""}{abs(cents) // 100}.{abs(cents) % 100:02d}'


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
  return ImageFont.load_default(size=15)


def _render(lines: Sequence[Line]) -> tuple[list[str], list[list[list[int]]], bytes]:
  """Words, their boxes as four corner points (x, y) in pixels, and the PNG."""
  margin, height = 12, 21
  image = Image.new('L', (_WIDTH, 2 * margin + height * len(lines)), color=255)
  draw = ImageDraw.Draw(image)
  words, boxes = [], []
  for i, line in enumerate(lines):
    for cell in line:
      room = _WIDTH - 2 * margin - draw.textlength(cell.text, font=_font())
      position = (margin + int(max(room, 0) * cell.align), margin + height * i)
      draw.text(position, cell.text, fill=0, font=_font())
      left, top, right, bottom = (
        round(side) for side in draw.textbbox(position, cell.text, font=_font())
      )
      words.append(cell.text)
      boxes.append([[left, top], [right, top], [right, bottom], [left, bottom]])
  buffer = io.BytesIO()
  image.save(buffer, format='PNG')
  return words, boxes, buffer.getvalue()

"""The few shapes that a report's drawings are made of, as SVG.

Hand-made rather than a plotting library's: the same bytes everywhere, colours that follow
the reader's light or dark page, and nothing to import. Numbers are user units of a
drawing's own viewBox; a page scales it as a whole.
"""

import html
import math
from collections.abc import Sequence

# Of the drawings' font, at 12 units: an upper bound for most texts.
_CHARACTER = 6.9
LINE = 15

_STYLE = (
  '.s{--ink:#1c2430;--dim:#667085;--line:#d7dce3;--good:#0f7b4f;--bad:#b3372b;--even:#8a93a1;'
  '--mark:#2757c4}'
  '@media (prefers-color-scheme:dark){.s{--ink:#e6e9ee;--dim:#9aa4b2;--line:#39424f;'
  '--good:#4cc38a;--bad:#f2776b;--even:#7d8794;--mark:#86a8ff}}'
  '.s text{font:12px system-ui,sans-serif;fill:var(--ink)}.s .dim{fill:var(--dim)}'
  '.s .grid{stroke:var(--line);stroke-width:1}'
  '.s .lead{stroke:var(--even);stroke-width:.7;fill:none}'
  '.s .axis{stroke:var(--dim);stroke-width:1}'
  '.s .good{stroke:var(--good);fill:var(--good)}.s .bad{stroke:var(--bad);fill:var(--bad)}'
  '.s .even{stroke:var(--even);fill:var(--even)}.s .mark{stroke:var(--mark);fill:var(--mark)}'
  '.s .whisker{stroke-width:1.6}.s .front{stroke:var(--mark);stroke-width:1.5;fill:none;'
  'stroke-dasharray:4 3}'
)


def drawing(width: float, height: float, says: str, parts: Sequence[str]) -> str:
  """An SVG element with its own style; `says` is read out in place of it."""
  return (
    f'<svg class="s" viewBox="0 0 {_n(width)} {_n(height)}" '
    f'role="img" aria-label="{html.escape(says)}"><style>{_STYLE}</style>{"".join(parts)}</svg>'
  )


def standalone(element: str) -> str:
  """A drawing as a file of its own, which has to name its language."""
  return element.replace('<svg ', '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + '\n'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
  """A straight line."""
  ends = f'x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"'
  return f'<line {ends} class="{kind}"/>'


def path(points: Sequence[tuple[float, float]], kind: str) -> str:
  """Straight lines through points."""
  return f'<polyline points="{" ".join(f"{_n(x)},{_n(y)}" for x, y in points)}" class="{kind}"/>'


def dot(x: float, y: float, kind: str, title: str, radius: float = 4) -> str:
  """A point; a pointer over it sees the title."""
  return (
    f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" class="{kind}">'
    f'<title>{html.escape(title)}</title></circle>'
  )


def text(x: float, y: float, says: str, anchor: str = 'start', kind: str = '') -> str:
  """A line of text whose baseline is at `y`."""
  return (
    f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}" class="{kind}">'
    f'{html.escape(says)}</text>'
  )


def fitted(says: str, room: float) -> str:
  """The text, or as much of its beginning as there is room for."""
  many = int(room / _CHARACTER)
  return says if len(says) <= many else f'{says[: many - 1]}…'


def width(says: str) -> float:
  """How much room a text takes at most."""
  return _CHARACTER * len(says)


def ticks(low: float, high: float, many: int = 5) -> list[float]:
  """Round numbers between two, about `many`."""
  if high <= low:
    return [low]
  step = 10 ** math.floor(math.log10((high - low) / many))
  step *= min((f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= many), default=10)
  first = math.ceil(low / step - 1e-9)
  return [round(step * i, 10) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def apart(wanted: Sequence[float], low: float, high: float, gap: float = LINE) -> list[float]:
  """Places near the wanted ones, in their order, none closer than `gap` to the next.

  They stay between `low` and `high` where there is room for all.
  """
  order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
  places = [0.0] * len(wanted)
  # Neighbours that touch are a block, which stands where its members want to on average.
  blocks: list[list[int]] = []
  tops: list[float] = []

  def top(block: list[int]) -> float:
    middle = sum(wanted[i] - gap * k for k, i in enumerate(block)) / len(block)
    return max(low, min(middle, high - gap * (len(block) - 1)))

  for i in order:
    block = [i]
    while blocks and tops[-1] + gap * len(blocks[-1]) > top(block):
      block = blocks.pop() + block
      tops.pop()
    blocks.append(block)
    tops.append(top(block))
  for block, start in zip(blocks, tops, strict=True):
    for k, i in enumerate(block):
      places[i] = start + gap * k
  return places


def _n(value: float) -> str:
  return f'{value:.1f}'.removesuffix('.0').replace('-0', '-0' if value <= -0.05 else '0')

"""What was learnt, stage by stage: loss and shares on drawings kept out, over updates."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SHARES = ('characters', 'tokens', 'kinds', 'colours')


def curve(held: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
  """A PNG: for each stage its loss above, and below what of the drawings is told rightly.

  Args:
    held: stage -> lines of its metrics.
  """
  # A figure of its own, so that no global state or display is touched.
  figure = Figure(figsize=(4.5 * max(len(held), 1), 6), dpi=110, layout='constrained')
  FigureCanvasAgg(figure)
  panels: Any = figure.subplots(2, max(len(held), 1), squeeze=False)
  for column, (name, lines) in enumerate(held.items()):
    above, below = panels[0, column], panels[1, column]
    _draw(above, lines, 'loss', 'training', color='0.7')
    for of in ('known', 'new', 'blank'):
      _draw(above, lines, f'{of}/loss', f'validation, {of}', marker='.')
    shown = [
      _draw(below, lines, f'{of}/{share}', f'{share}, {of}', marker='.', linestyle=style)
      for share in _SHARES
      for of, style in (('known', '-'), ('new', '--'))
    ]
    above.set_title(name)
    above.set_ylabel('loss')
    above.legend(fontsize=7)
    if any(shown):
      below.set_ylim(0, 1)
      below.set_ylabel('share told rightly')
      below.set_xlabel('step')
      below.legend(fontsize=6)
    else:
      below.set_axis_off()
  image = io.BytesIO()
  figure.savefig(image, format='png', metadata={'Software': None})
  return image.getvalue()


def _draw(panel: Any, lines: Sequence[Mapping[str, Any]], name: str, label: str, **style) -> bool:
  points = [(line['step'], line[name]) for line in lines if line.get(name) is not None]
  if points:
    panel.plot(*zip(*points, strict=True), label=label, linewidth=1, **style)
  return bool(points)

"""Accuracy against latency, a point for each configuration."""

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora_jax.report.results import BASE, Results

_MARKERS = 'osD^v<>PX*hp'


def accuracy_latency(results: Results) -> bytes | None:
  """A PNG: average score over the complete datasets against latency as a ratio to the base.

  Bars are standard errors of the score and quartiles of the ratio. None where latency
  was not measured or no dataset is complete.
  """
  points = [
    (name, times, results.averages[name])
    for name in results.configurations
    if name in results.averages and (times := results.times(name)) is not None
  ]
  if not points:
    return None
  # A figure of its own, so that no global state or display is touched.
  figure = Figure(figsize=(9, 4), dpi=120, layout='constrained')
  FigureCanvasAgg(figure)
  panels: Any = figure.subplots(1, 2, sharey=True)
  for panel, work, title in zip(
    panels, ('prefill', 'decode'), ('Prefill', 'One decoded token'), strict=True
  ):
    for i, (name, times, average) in enumerate(points):
      ratio = times[f'{work}_ratio']
      panel.errorbar(
        ratio,
        average.mean,
        xerr=[[ratio - times[f'{work}_ratio_low']], [times[f'{work}_ratio_high'] - ratio]],
        yerr=average.se,
        color='black' if name == BASE else f'C{(i - 1) % 10}',
        marker=_MARKERS[i % len(_MARKERS)],
        markersize=7,
        elinewidth=0.8,
        linestyle='none',
        label=name.replace('$', r'\$'),
      )
    panel.set_title(title, fontsize=10)
    panel.set_xlabel('latency, base = 1 (adapters unmerged, one row)')
    panel.grid(alpha=0.3)
  count = len(results.complete)
  panels[0].set_ylabel(f'mean score over {count} dataset{"s" * (count > 1)}')
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside right center', frameon=False, fontsize=9)
  image = io.BytesIO()
  figure.savefig(image, format='png', metadata={'Software': None})
  return image.getvalue()

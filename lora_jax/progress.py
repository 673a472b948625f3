"""Progress of long work: a live bar on a terminal, plain lines in a log.

    with Progress('train medmcqa', total=steps) as progress:
      for ...:
        progress.advance(loss=loss)

Both go to stderr and say rate and time left.
"""

import sys
import time
from types import TracebackType

import rich.progress
from rich.console import Console

# Seconds between lines where there is no terminal.
_LOG_EVERY = 20.0


class Progress:
  """Counts steps towards a total and shows rate and time left on stderr."""

  def __init__(self, what: str, total: int, unit: str = 'step'):
    """Starts at zero; nothing is shown before the `with` block is entered."""
    self._what, self._total, self._unit = what, total, unit
    self._done = 0
    self._note = ''
    self._bar: rich.progress.Progress | None = None
    self._task = rich.progress.TaskID(0)

  def __enter__(self) -> 'Progress':
    self._start = self._logged = time.monotonic()
    console = Console(stderr=True)
    if console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn('{task.description}'),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn('{task.fields[rate]}'),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn('{task.fields[note]}'),
        console=console,
        transient=True,
      )
      self._bar.start()
      self._task = self._bar.add_task(self._what, total=self._total, rate='', note='')
    return self

  def advance(self, count: int = 1, **numbers: float) -> None:
    """Says that `count` more are done, and the latest value of each named number."""
    self._done += count
    if numbers:
      self._note = ' '.join(f'{name} {value:.4g}' for name, value in numbers.items())
    now = time.monotonic()
    if self._bar is not None:
      self._bar.update(self._task, advance=count, rate=self._rate(now), note=self._note)
    elif now - self._logged >= _LOG_EVERY and self._done < self._total:
      self._logged = now
      left = (now - self._start) / self._done * (self._total - self._done)
      self._print(f'{self._rate(now)} {left:.0f} s left')

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    now = time.monotonic()
    if self._bar is not None:
      self._bar.stop()
    self._print(f'{self._rate(now)} {now - self._start:.0f} s')

  def _rate(self, now: float) -> str:
    return f'{self._done / max(now - self._start, 1e-9):.2f} {self._unit}/s'

  def _print(self, tail: str) -> None:
    parts = (f'{self._what}: {self._done}/{self._total}', tail, self._note)
    print(' '.join(part for part in parts if part), file=sys.stderr, flush=True)

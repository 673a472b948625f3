"""Our side of the grid benchmark: the main job itself, and what its process measures.

  python -m benchmarks.grid_side --record=FILE.json -- --targets=o_proj --datasets=medmcqa ...

Runs `experiments.ablate` with the arguments after `--` and writes FILE.json when it ends:
seconds in scoring (all that runs under progress displays of that name, its compilation
included), programs compiled, and peak memory. What training took is in the cells' records.
"""

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import measure
from lora_jax import progress
from lora_jax.programs import Programs


class _Phases:
  """Seconds spent under progress displays, by the first word of their names."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._open: list[tuple[str, float]] = []

  def watched(self) -> type[progress.Progress]:
    """The display, with its times kept here; of displays within another, the outer counts."""
    phases = self

    class Watched(progress.Progress):
      """A progress display whose time is kept."""

      def __init__(self, what: str, total: int, unit: str = 'step'):
        super().__init__(what, total, unit)
        self._phase = what.split()[0]

      def __enter__(self):
        phases._open.append((self._phase, time.perf_counter()))
        return super().__enter__()

      def __exit__(self, *error):
        super().__exit__(*error)
        phase, start = phases._open.pop()
        if not phases._open:
          held = phases.seconds.get(phase, 0.0)
          phases.seconds[phase] = held + time.perf_counter() - start

    return Watched


def run(arguments: list[str]) -> dict[str, Any]:
  """Runs the main job to its end, whatever that is, and returns the record."""
  phases = _Phases()
  # Before any module that takes the class from there is imported.
  progress.Progress = phases.watched()
  sys.argv = ['experiments.ablate', *arguments]
  code = 0
  with Programs() as programs:
    try:
      runpy.run_module('experiments.ablate', run_name='__main__', alter_sys=True)
    except SystemExit as end:
      code = end.code
  return {
    'exit_code': code,
    'score_seconds': phases.seconds.get('score', 0.0),
    'programs': programs.count,
    'compiler_seconds': programs.seconds,
    **measure.memory(),
  }


def main() -> None:
  """Reads where the record goes, and hands the rest on."""
  own, arguments = sys.argv[1], sys.argv[2:]
  option, _, path = own.partition('=')
  if option != '--record' or arguments[:1] != ['--']:
    sys.exit(__doc__)
  record = run(arguments[1:])
  Path(path).write_text(json.dumps(record, indent=2))
  sys.exit(record['exit_code'])


if __name__ == '__main__':
  main()

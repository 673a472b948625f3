"""Rebuilds a run's report from its records, and sets several runs side by side.

  python -m experiments.report runs/quick
  python -m experiments.report runs/smollm2 runs/qwen --out=runs/both

Needs no base and trains nothing: report.html, report.md and results.json are a function of
the records in RUN_DIR/cells and RUN_DIR/latency.json. With several directories, each gets
its own report, and comparison.html and comparison.md go to --out.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import _launcher
from lora_jax.errors import UserError

_OUT = flags.DEFINE_string(
  'out',
  None,
  'Where to write; of one run, its own directory if not given, of several, runs/comparison.',
)


def main(*directories: str) -> None:
  """Reads all records before anything is written."""
  if not directories:
    raise UserError('give the directory of a run, as in: python -m experiments.report runs/quick')
  # They take a second to import, and a mistake above should not.
  from lora_jax.records import RunDirectory, check_room
  from lora_jax.report import comparison, report
  from lora_jax.report.results import gather

  _launcher.imported()
  paths = dict.fromkeys(Path(given).expanduser() for given in directories)
  runs = [RunDirectory(path) for path in paths]
  for run in runs:
    if not run.path.is_dir():
      raise UserError(f'{run.path}: there is no such directory; give the --out of a run')
  out = None if _OUT.value is None else Path(_OUT.value).expanduser()
  gathered = [gather(run) for run in runs]
  if len(runs) == 1:
    target = out or runs[0].path
    check_room(target)
    print(report.write_results(gathered[0], target))
    return
  out = out or Path('runs/comparison')
  check_room(out)
  for run, results in zip(runs, gathered, strict=True):
    report.write_results(results, run.path)
    print(f'report: {run.path / "report.html"}')
  names = _names([run.path for run in runs])
  print(comparison.write(dict(zip(names, gathered, strict=True)), out))


def _names(paths: Sequence[Path]) -> list[str]:
  """The directories' own names, or the paths as they were given where two are called alike."""
  names = [path.name for path in paths]
  return names if len({*names}) == len(names) else [str(path) for path in paths]


if __name__ == '__main__':
  _launcher.run(main, arguments=True)

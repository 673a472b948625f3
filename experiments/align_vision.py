r"""Teaches a small tower to show drawings to a language model, which stays as it is.

  python -m experiments.align_vision --out=runs/sight
  python -m experiments.align_vision --steps=500,0,0 --out=runs/reading

Three stages, of which `--steps`, `--rows` and `--lr` give the settings in order: read (what is in
each cell, no language model runs), speak (small drawings) and whole (receipts, in many tiles). A
stage of 0 steps is left out. What was learnt is written every few hundred steps, and the same
command goes on from there after Ctrl-C or worse. OUT/base is then a base for every other command:

  python -m experiments.ablate --base=runs/sight/base --datasets=llava_cot,invoice_ocr
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import _flags, _launcher
from lora_jax.align import recipe as recipes
from lora_jax.errors import UserError
from lora_jax.presets import Settings

_PRESETS = {'cpu': recipes.CPU, 'accelerator': recipes.ACCELERATOR}

_OUT = flags.DEFINE_string('out', None, 'Directory of the run.')
_PRESET = flags.DEFINE_enum(
  'preset', None, [*_PRESETS], 'Stages to start from; by default those for the device there is.'
)
_STEPS = flags.DEFINE_list('steps', None, 'Updates of each stage; 0 leaves one out.')
_ROWS = flags.DEFINE_list('rows', None, 'Tiles, or conversations, of a batch of each stage.')
_LR = flags.DEFINE_list('lr', None, 'Highest learning rate of each stage.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of parameters and drawings.')
_WORKERS = flags.DEFINE_integer(
  'workers', 0, 'Processes that draw; 0: threads of this one, enough for a CPU.', lower_bound=0
)
_REMAT = flags.DEFINE_bool('remat', False, 'Recompute blocks to save memory.')
flags.DEFINE_enum('dtype', 'auto', ['auto', 'bfloat16', 'float32'], 'Of products.')
_flags.define_base(Settings().base, arithmetic=False)


def main() -> None:
  """Checks everything that can be checked, then trains and writes."""
  if not _OUT.value:
    raise UserError('give --out=DIRECTORY')
  _flags.check_seed(_SEED.value)
  numbers = {
    'steps': _numbers('steps', _STEPS.value, int, 0),
    'rows': _numbers('rows', _ROWS.value, int, 1),
    'learning_rate': _numbers('lr', _LR.value, float, 0),
  }
  # They take seconds to import, and a mistake above should not.
  import jax

  from lora_jax.align import run
  from lora_jax.hub import bases

  _launcher.imported()
  bases.check_name(_flags.given('base'))
  preset = _PRESET.value or ('cpu' if jax.default_backend() == 'cpu' else 'accelerator')
  recipe = recipes.Recipe(
    base=_flags.given('base'),
    stages=_stages(_PRESETS[preset], numbers),
    seed=_SEED.value,
    dtype=_flags.dtype(),
    remat=_REMAT.value,
  )
  out = Path(_OUT.value).expanduser()
  base = _flags.load_base(recipe.base)
  with _launcher.stop_on_interrupt('stopping after this step') as stop:
    finished = run.run(recipe, base, out, _WORKERS.value, stop)
  for stage, lines in run.metrics(out, recipe).items():
    last = {name: value for line in lines[-3:] for name, value in line.items() if '/' in name}
    told = ', '.join(f'{name} {value:.3f}' for name, value in last.items() if value is not None)
    print(f'{stage}: {told or "not looked at yet"}')
  if not finished:
    print(f'stopped; the same command goes on: {out}', file=sys.stderr)
    sys.exit(130)
  print(f'curve: {out / "curve.png"}')
  print(f'base: {out / run.BASE}')


def _numbers(name: str, given: Sequence[str] | None, kind: type, least: float) -> list | None:
  """A flag that has a number for each stage, or None where it was not given."""
  if given is None:
    return None
  stages = [stage.name for stage in recipes.CPU]
  try:
    numbers = [kind(text) for text in given]
  except ValueError:
    numbers = []
  if len(numbers) != len(stages) or not all(math.isfinite(n) and n >= least for n in numbers):
    wanted = f'{len(stages)} numbers from {least}, for {", ".join(stages)}'
    raise UserError(f'--{name}={",".join(given)}: give {wanted}')
  return numbers


def _stages(
  stages: Sequence[recipes.Stage], numbers: dict[str, list | None]
) -> tuple[recipes.Stage, ...]:
  given = {field: values for field, values in numbers.items() if values is not None}
  changed = [
    dataclasses.replace(stage, **{field: values[i] for field, values in given.items()})
    for i, stage in enumerate(stages)
  ]
  kept = tuple(stage for stage in changed if stage.steps)
  if not kept:
    raise UserError('--steps leaves out all stages; give one of them some steps')
  return kept


if __name__ == '__main__':
  _launcher.run(main)

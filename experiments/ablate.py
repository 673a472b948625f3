"""Fine-tunes LoRA adapters on sets of target modules and scores them beside the base.

  python -m experiments.ablate --targets=o_proj,fc2
  python -m experiments.ablate --targets=qkv --targets=o_proj --datasets=medmcqa --seeds=0,1,2
  python -m experiments.ablate --arms=equal_rank,equal_parameters
  python -m experiments.ablate --data=my.jsonl --metric=exact
  python -m experiments.ablate --preset=smoke

Each `--targets` is one configuration, its commas join modules into one set; without
any, the article's grid runs (in `smoke`, one set). Finished cells are skipped, so the
same command goes on after an interruption. Ends with a table and the path of the report.
"""

import dataclasses
import math
import sys
from pathlib import Path

from absl import flags

from experiments import _data_flags, _flags, _launcher, _lora_flags
from lora_jax.errors import UserError
from lora_jax.presets import (
  ARMS,
  ARTICLE_TARGETS,
  EQUAL_PARAMETERS,
  EQUAL_RANK,
  PRESET_TARGETS,
  PRESETS,
  Settings,
)

_TARGETS = flags.DEFINE_multi_string(
  'targets', [], 'A set of targets, joined by commas; repeat the flag for more sets.'
)
_PRESET = flags.DEFINE_enum('preset', 'quick', list(PRESETS), 'Settings to start from.')
_SEEDS = flags.DEFINE_list('seeds', ['0'], 'Seeds; a cell for each.')
_ARMS = flags.DEFINE_list(
  'arms',
  [EQUAL_RANK],
  f'{EQUAL_RANK}, or {EQUAL_RANK},{EQUAL_PARAMETERS}: each target set also with as many trainable '
  'parameters as all have at --rank.',
)
_LEARNING_RATES = flags.DEFINE_list(
  'learning_rates',
  [],
  'Rates to choose from for each target set and dataset, by the validation loss; with the first '
  'seed.',
)
_PACK = flags.DEFINE_integer(
  'pack',
  0,
  'At most so many cells train together; 0: as many as there is use and memory for.',
  lower_bound=0,
)
_OUT = flags.DEFINE_string('out', None, 'Directory of the results; runs/PRESET if not given.')
_flags.define_base()
_flags.define_mesh()
_flags.define_changes(*_flags.ALL_CHANGES)


def settings_from_flags() -> Settings:
  """The preset with the flags that were given on top of it.

  Raises:
    UserError: a value that makes no sense.
  """
  preset = PRESETS[_PRESET.value]
  return _flags.changed(dataclasses.replace(preset, lora=_lora_flags.lora_config(preset.lora)))


def _seeds() -> tuple[int, ...]:
  try:
    seeds = tuple(dict.fromkeys(int(seed) for seed in _SEEDS.value))
  except ValueError:
    seeds = ()
  if not seeds:
    raise UserError(f'--seeds={",".join(_SEEDS.value)}: give whole numbers, as 0,1,2')
  for seed in seeds:
    _flags.check_seed(seed, _SEEDS.name)
  return seeds


def _arms() -> tuple[str, ...]:
  given = tuple(arm for arm in ARMS if arm in _ARMS.value)
  if EQUAL_RANK not in given or {*_ARMS.value} - {*ARMS}:
    raise UserError(
      f'--arms={",".join(_ARMS.value)}: give {EQUAL_RANK}, or {",".join(ARMS)} to run both'
    )
  return given


def _learning_rates(settings: Settings) -> tuple[float, ...]:
  given = ','.join(_LEARNING_RATES.value)
  try:
    rates = tuple(sorted({float(rate) for rate in _LEARNING_RATES.value}))
  except ValueError:
    rates = (0.0,)
  if rates and (len(rates) < 2 or not all(0 < rate < math.inf for rate in rates)):
    raise UserError(f'--learning_rates={given}: give two or more numbers above zero, as 1e-4,5e-4')
  if rates and _flags.given('lr') is not None:
    raise UserError('--lr is one of --learning_rates, or there is nothing to choose; give either')
  if rates and not settings.train.eval_rows:
    raise UserError('--eval_rows=0 leaves no rows for --learning_rates to be chosen by')
  return rates


def main() -> None:
  """Checks everything that can be checked, then runs, then reports."""
  settings, seeds = settings_from_flags(), _seeds()
  chosen_arms, rates, metric = _arms(), _learning_rates(settings), _data_flags.own_metric()
  # The project's modules take a few seconds to import; --help and a mistake above should not.
  from lora_jax import arms, lora
  from lora_jax.hub import bases
  from lora_jax.records import RunDirectory
  from lora_jax.report import report
  from lora_jax.study import Grid, Study

  _launcher.imported()
  _flags.set_mesh()
  default_targets = PRESET_TARGETS.get(_PRESET.value, ARTICLE_TARGETS)
  targets = tuple(dict.fromkeys(map(lora.canonical, _TARGETS.value))) or default_targets
  _flags.check_targets(targets)
  if EQUAL_PARAMETERS in chosen_arms:
    arms.check(settings.lora)
  bases.check_name(settings.base)
  chosen, source, data = _data_flags.chosen(settings, metric)
  grid = Grid(chosen, targets, seeds, chosen_arms, rates)
  out = f'runs/{_PRESET.value}' if _OUT.value is None else _OUT.value
  if not out:
    raise UserError('--out is empty; give a directory')
  run = RunDirectory(Path(out).expanduser())
  shared = {'settings': dataclasses.asdict(settings), 'data': data}
  # Only where there are some: what was run without is as it was.
  run.claim({**shared, **({'learning_rates': rates} if rates else {})})
  cache = _flags.cache()

  try:
    base = _flags.load_base(settings.base)
    Study(settings, base, source, run, cache / 'rows', _PACK.value).run(grid)
    print(report.write(run))
  except KeyboardInterrupt:
    print(
      f'\nstopped; finished cells are in {run.path}, the same command goes on from there; cells '
      'that were training together are trained anew, with --pack=1 one at most',
      file=sys.stderr,
    )
    sys.exit(130)


if __name__ == '__main__':
  _launcher.run(main)

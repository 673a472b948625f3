"""Adds adapters of one base up into one adapter in PEFT's format.

  python -m experiments.combine --adapter=one:0.5 --adapter=other:0.5 --out=both
  python -m experiments.combine --adapter=one:1 --adapter=other:1 --method=ties --out=both

`sum` is exact, and its rank is the sum of the ranks; `svd` cuts the sum to --rank; `ties`
and `dare` sparsify what each adapter adds to the base before they add it up
(lora_jax/arithmetic.py).
"""

import math
from pathlib import Path

from absl import flags

from experiments import _flags, _launcher
from lora_jax.errors import UserError
from lora_jax.presets import Settings

_ADAPTERS = flags.DEFINE_multi_string(
  'adapter', [], 'DIRECTORY:WEIGHT of an adapter and its factor in the sum; repeat the flag.'
)
_OUT = flags.DEFINE_string('out', None, 'Directory to write.')
_METHOD = flags.DEFINE_enum('method', 'sum', ['sum', 'svd', 'ties', 'dare'], 'How to add up.')
_RANK = flags.DEFINE_integer('rank', Settings().lora.rank, 'Of the result; `sum` has its own.')
_DENSITY = flags.DEFINE_float('density', 0.5, 'Share of entries that `ties` and `dare` keep.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the entries that `dare` drops.')
_flags.define_base(Settings().base, arithmetic=False)


def main() -> None:
  """Checks everything that can be checked, then reads, adds up and writes."""
  operands = [_operand(text) for text in _ADAPTERS.value]
  if not operands or not _OUT.value:
    raise UserError('give --adapter=DIRECTORY:WEIGHT, once for each, and --out=DIRECTORY')
  if _RANK.value < 1:
    raise UserError(f'--rank={_RANK.value}: give a number above zero')
  _flags.check_seed(_SEED.value)
  if not 0 < _DENSITY.value <= 1:
    raise UserError(f'--density={_DENSITY.value}: give a share above 0 and at most 1')
  # They take seconds to import, and a mistake above should not.
  import jax

  from lora_jax import arithmetic, lora, records
  from lora_jax.hub import adapters, bases, peft

  _launcher.imported()
  out = Path(_OUT.value).expanduser()
  records.check_new(out)
  name = _flags.given('base')
  bases.check_name(name)
  for directory, _ in operands:
    adapters.check(directory)
  base = _flags.load_base(name)
  held = [adapters.load(directory, base) for directory, _ in operands]
  pairs = [(adapter.params, adapter.scales()) for adapter in held]
  weights = [weight for _, weight in operands]
  if _METHOD.value in ('sum', 'svd'):
    rank = None if _METHOD.value == 'sum' else _RANK.value
    params = arithmetic.weighted_sum(pairs, weights, rank)
  elif _METHOD.value == 'ties':
    params = arithmetic.ties(pairs, weights, _DENSITY.value, _RANK.value)
  else:
    key = jax.random.key(_SEED.value)
    params = arithmetic.dare(key, pairs, weights, _DENSITY.value, _RANK.value)
  record = base.record
  adapter = peft.unscaled(
    params, base=record.get('hub_id', ''), base_sha256=record['sha256'], sees='sees' in record
  )
  with records.new_directory(out) as temporary:
    peft.save(temporary, adapter)
  print(lora.summarise(params))
  print(f'adapter: {out}')


def _operand(text: str) -> tuple[Path, float]:
  directory, _, weight = text.rpartition(':')
  try:
    factor = float(weight)
  except ValueError:
    factor = math.nan
  if not directory or not math.isfinite(factor):
    raise UserError(f'--adapter={text}: give DIRECTORY:WEIGHT, as mine/adapter:0.5')
  return Path(directory).expanduser(), factor


if __name__ == '__main__':
  _launcher.run(main)

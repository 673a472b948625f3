"""Flags that choose an adapter of the LoRA family, on top of a preset's."""

import dataclasses
import math

from absl import flags

from lora_jax.config import LORA_INITS, LoraConfig
from lora_jax.errors import UserError

_RANK = flags.DEFINE_integer('rank', None, "The preset's lora.rank.")
_ALPHA = flags.DEFINE_float('alpha', None, "The preset's lora.alpha.")
_DROPOUT = flags.DEFINE_float('dropout', None, "The preset's lora.dropout.")
_RANK_PATTERN = flags.DEFINE_multi_string(
  'rank_pattern', [], 'PATTERN=RANK of the modules that match; repeat the flag for more.'
)
_ALPHA_PATTERN = flags.DEFINE_multi_string(
  'alpha_pattern', [], 'PATTERN=ALPHA of the modules that match; repeat the flag for more.'
)
_RSLORA = flags.DEFINE_bool('rslora', None, 'Scale by alpha / sqrt(rank).')
_DORA = flags.DEFINE_bool('dora', None, 'Train magnitudes beside directions (DoRA).')
_INIT = flags.DEFINE_enum('init', None, list(LORA_INITS), 'How an adapter starts.')
_LAYERS = flags.DEFINE_string('layers', None, "Adapted layers, as '0-7,12'; '' for all.")
_TRAIN_ALSO = flags.DEFINE_multi_string(
  'train_also', [], 'Norms or biases to train too, by name or path; repeat the flag for more.'
)


def lora_config(preset: LoraConfig) -> LoraConfig:
  """The preset's configuration with the flags that were given on top of it.

  Raises:
    UserError: a value that makes no sense.
  """
  changes = {}
  for flag in (_RANK, _ALPHA, _DROPOUT, _RSLORA, _DORA, _INIT, _LAYERS):
    if flag.value is not None:
      changes[flag.name] = flag.value
  for flag, number in ((_RANK_PATTERN, int), (_ALPHA_PATTERN, float)):
    if flag.value:
      changes[flag.name] = tuple(_pair(flag.name, given, number) for given in flag.value)
  if _TRAIN_ALSO.value:
    changes['train_also'] = tuple(_TRAIN_ALSO.value)
  for name in ('rank', 'alpha'):
    value = changes.get(name, 1)
    if not (value > 0 and math.isfinite(value)):
      raise UserError(f'--{name}={value}: give a number above zero')
  if not 0 <= changes.get('dropout', 0) < 1:
    raise UserError(f'--dropout={changes["dropout"]}: give a share from zero to below 1')
  return dataclasses.replace(preset, **changes)


def _pair(flag: str, given: str, number: type[int] | type[float]) -> tuple[str, int | float]:
  # A regular expression may hold an equals sign itself.
  pattern, _, value = given.rpartition('=')
  try:
    if pattern:
      return pattern, number(value)
  except ValueError:
    pass
  raise UserError(f'--{flag}={given}: give PATTERN=NUMBER, as o_proj=8')

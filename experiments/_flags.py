"""Flags that several launchers share, and what is done with them.

A launcher defines those that it reads:

  _flags.define_base()
  _flags.define_changes('lr', 'steps')
  ...
  settings = _flags.changed(PRESETS['quick'])
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import _launcher
from lora_jax.config import CACHE, QUANTIZE, TrainConfig
from lora_jax.errors import UserError
from lora_jax.presets import Settings

if TYPE_CHECKING:
  from lora_jax.hub.base import Base
  from lora_jax.transformer import Transformer

# Flags that change settings: (section of Settings, its field).
_CHANGES = {
  'lr': ('optim', 'learning_rate'),
  'lr_ratio': ('optim', 'lr_ratio'),
  'steps': ('train', 'steps'),
  'tokens_per_batch': ('train', 'tokens_per_batch'),
  'positions': ('train', 'positions'),
  'max_length': ('train', 'max_length'),
  'train_rows': ('train', 'train_rows'),
  'eval_rows': ('train', 'eval_rows'),
  'eval_every': ('train', 'eval_every'),
  'patience': ('train', 'patience'),
  'test_rows': ('eval', 'test_rows'),
  'batch_rows': ('eval', 'batch_rows'),
  'max_new_tokens': ('eval', 'max_new_tokens'),
  'remat': ('train', 'remat'),
  'keep_best': ('train', 'keep_best'),
  'image_edge': ('sight', 'image_edge'),
  'blank_images': ('sight', 'blank_images'),
}
ALL_CHANGES = tuple(_CHANGES)
_AT_LEAST_ZERO = (
  'train_rows', 'eval_rows', 'test_rows', 'patience', 'positions', 'image_edge',
)  # fmt: skip
_LEAST_LENGTH = 64


def define_base(default: str | None = None, arithmetic: bool = True) -> None:
  """--base and --cache; with `arithmetic`, --dtype and --quantize."""
  flags.DEFINE_string(
    'base', default, 'A name, a .gguf file, the directory of a model, or its owner/name on the hub.'
  )
  flags.DEFINE_string('cache', CACHE, 'Directory of downloads.')
  if not arithmetic:
    return
  flags.DEFINE_enum('dtype', 'auto', ['auto', 'bfloat16', 'float32'], 'Of the base and products.')
  flags.DEFINE_enum('quantize', None, QUANTIZE, "How the kernels of the base's blocks are stored.")


def define_mesh() -> None:
  """--mesh, which `set_mesh` reads."""
  flags.DEFINE_string(
    'mesh', None, 'How devices share the work, as data=-1,fsdp=4,tensor=2; without it one works.'
  )


def set_mesh() -> None:
  """Has all that follows run on the mesh of --mesh, if there is one.

  Raises:
    UserError: there is no such mesh, or not of these devices.
  """
  if given('mesh') is None:
    return
  import jax

  from lora_jax import sharding

  jax.set_mesh(sharding.make_mesh(given('mesh')))


def define_changes(*names: str, of: Settings | None = None) -> None:
  """Flags that change settings.

  Args:
    names: of `ALL_CHANGES`.
    of: whose values their help shows; None: they change a preset.
  """
  define = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
  }
  for name in names:
    section, field = _CHANGES[name]
    held = getattr(getattr(of or Settings(), section), field)
    help_text = f"The preset's {section}.{field}." if of is None else f'{section}.{field}: {held}'
    define[type(held)](name, None, help_text)


def changed(settings: Settings) -> Settings:
  """The settings with the flags that were given on top of them.

  Raises:
    UserError: a value that makes no sense.
  """
  if given('base') is not None:
    settings = dataclasses.replace(settings, base=given('base'))
  for name, (section, field) in _CHANGES.items():
    value = given(name)
    if value is None:
      continue
    allowed = value >= 0 if name in _AT_LEAST_ZERO or value is False else value > 0
    if not allowed or math.isinf(value):
      least = 'from' if name in _AT_LEAST_ZERO else 'above'
      raise UserError(f'--{name}={value}: give a number {least} zero')
    part = dataclasses.replace(getattr(settings, section), **{field: value})
    settings = dataclasses.replace(settings, **{section: part})
  if settings.train.max_length < _LEAST_LENGTH:
    raise UserError(
      f'--max_length={settings.train.max_length}: give at least {_LEAST_LENGTH} tokens'
    )
  if given('eval_rows') == 0 and (settings.train.patience or settings.train.keep_best):
    raise UserError('--eval_rows=0 leaves --patience and --keep_best no validation rows')
  changes = {'dtype': dtype(), 'quantize': given('quantize') or settings.train.quantize}
  return dataclasses.replace(settings, train=dataclasses.replace(settings.train, **changes))


def given(name: str) -> Any:
  """A flag's value, or None where it was not given or this launcher has no such flag."""
  return flags.FLAGS[name].value if name in flags.FLAGS else None


def dtype() -> str:
  """What --dtype comes to: 'auto' is bfloat16, but for a CPU that multiplies it slowly."""
  name = given('dtype')
  if name != 'auto':
    return name
  import jax

  if jax.default_backend() != 'cpu':
    return 'bfloat16'
  version = tuple(int(part) for part in jax.__version__.split('.')[:2])
  fast = version >= (0, 11) and _launcher.cpu_has_bfloat16()
  return 'bfloat16' if fast else 'float32'


def cache() -> Path:
  """The directory of downloads, where compiled programs go too.

  Raises:
    UserError: it cannot be made.
  """
  import jax

  path = Path(given('cache')).expanduser()
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'--cache={path}: {error.strerror}; give another directory') from error
  jax.config.update('jax_compilation_cache_dir', str(path / 'jax'))
  return path


def check_seed(seed: int, flag: str = 'seed') -> None:
  """Raises `UserError` for a number that is no seed."""
  if not 0 <= seed < 2**32:
    raise UserError(f'--{flag}={seed}: give a whole number from 0 to 4294967295')


def check_targets(targets: Sequence[str]) -> None:
  """Raises `UserError` for a set that matches nothing, before any download.

  Paths of the modules are the same at every size. Whether a base has a vision tower shows
  when it is loaded.
  """
  from lora_jax import lora
  from lora_jax.config import ModelConfig, VisionConfig
  from lora_jax.transformer import abstract_params

  smallest = ModelConfig(
    vocab_size=2,
    num_layers=1,
    model_dim=2,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    mlp_dim=2,
    max_length=2,
  )
  sight = VisionConfig(
    image_size=1,
    patch_size=1,
    model_dim=1,
    num_layers=1,
    num_heads=1,
    mlp_dim=1,
    shuffle=1,
    image_token=0,
  )
  for names in targets:
    try:
      lora.resolve(names, abstract_params(smallest))
    except UserError as error:
      try:
        lora.resolve(names, abstract_params(dataclasses.replace(smallest, vision=sight)))
      except UserError:
        raise error from None


def load_base(name: str) -> 'Base':
  """Loads a base, and says which it is."""
  from lora_jax.hub import bases

  base = bases.load(name, cache())
  # Standard output is for what was asked for.
  print(
    f'base {base.name}: {base.record["weights"]}, sha256 {base.record["sha256"][:12]}',
    file=sys.stderr,
  )
  return base


def put_on_device(base: 'Base', config: TrainConfig) -> tuple['Transformer', Any]:
  """The base's model and its parameters, stored as `config` says."""
  import jax.numpy as jnp

  from lora_jax import quantize
  from lora_jax.transformer import Transformer

  kind = jnp.dtype(config.dtype)
  params = quantize.store(base.params, kind, config.quantize)
  return Transformer(base.config, dtype=kind, remat=config.remat), params

"""Reads an adapter wherever it lies: PEFT's format, a training run, or a cell of an ablation.

adapters.check(directory)                 # a mistake shows before any download
adapter = adapters.load(directory, base)
attached = adapters.attach(params, adapter)
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from lora_jax import checkpoint, lora
from lora_jax.config import LoraConfig
from lora_jax.errors import UserError
from lora_jax.hub import peft
from lora_jax.hub.base import Base
from lora_jax.hub.peft_config import CONFIG
from lora_jax.hub.peft_tensors import WEIGHTS
from lora_jax.records import read_record
from lora_jax.targets import parts

_FORMS = "a directory in PEFT's format, of a training run, or the .adapter of a finished cell"
_CELL = '.adapter'
# What a training run's directory holds it under.
ADAPTER = 'adapter'


def check(directory: Path) -> None:
  """Raises `UserError` where no adapter is to be found."""
  _find(directory)


def is_cell(directory: Path) -> bool:
  """Whether this is what a cell of an ablation left, which needs no base to be read."""
  return directory.suffix == _CELL


def load(directory: Path, base: Base) -> peft.Adapter:
  """Reads an adapter for a base, and says on stderr where it was made for other weights.

  Args:
    directory: in PEFT's format; or one that holds `adapter/` in it, as `experiments.train`
      leaves; or a cell's `.adapter`, as `experiments.ablate` does.
    base: what it is for.

  Raises:
    UserError: there is none, it is damaged, or it does not fit the base.
  """
  found = _find(directory)
  sha256 = base.record['sha256']
  if not is_cell(found):
    return peft.load(found, base.params, sha256)
  adapter = of_cell(found)
  _check_shapes(found, adapter, base)
  if adapter.base_sha256 != sha256:
    print(
      f'{found}: trained on a base with sha256 {adapter.base_sha256[:12]}, and {base.name} has '
      f'{sha256[:12]}; it fits in shape, and may not in content',
      file=sys.stderr,
    )
  return adapter


def of_cell(directory: Path) -> peft.Adapter:
  """The adapter of a finished cell, as its record describes it.

  Raises:
    UserError: there is no adapter or no record, or one is damaged.
  """
  found = _find(directory)
  record = read_record(found.with_suffix('.json'))
  return peft.of(
    checkpoint.load(found),
    LoraConfig.from_record(record['settings']['lora']),
    base=record['base'].get('hub_id', ''),
    base_sha256=record['base']['sha256'],
    targets=record['cell']['targets'],
    sees=bool(record['base'].get('sees')),
  )


def attach(params: Mapping[str, Any], adapter: peft.Adapter) -> dict:
  """The base with the adapter on it, unmerged."""
  return lora.attach(params, adapter.params, adapter.scales())


def _find(directory: Path) -> Path:
  """The directory that holds the adapter itself."""
  if (directory / CONFIG).is_file() or (directory / WEIGHTS).is_file():
    return directory
  if (directory / ADAPTER / CONFIG).is_file():
    return directory / ADAPTER
  if is_cell(directory) and directory.is_dir():
    record = directory.with_suffix('.json')
    if not record.is_file():
      raise UserError(f'no {record}; the cell did not finish, run the ablation again')
    return directory
  raise UserError(f'no adapter in {directory}; give {_FORMS}')


def _check_shapes(found: Path, adapter: peft.Adapter, base: Base) -> None:
  kernels: dict[str, Any] = dict(flatten_dict(base.params, sep='/'))
  leaves: dict[str, Any] = dict(flatten_dict(adapter.params, sep='/'))
  for owner in adapter.ranks:
    for path in parts(owner):
      kernel, a, b = kernels.get(f'{path}/kernel'), leaves[f'{owner}/a'], leaves[f'{path}/b']
      if kernel is None or kernel.shape != (a.shape[0], a.shape[1], b.shape[2]):
        raise UserError(f'{found} is for another base than {base.name}: {path} does not fit')

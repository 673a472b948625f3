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
from lora_jax.errors import UserError
from lora_jax.hub import peft
from lora_jax.hub.bases import Base
from lora_jax.records import read_json, read_record

_FORMS = "a directory in PEFT's format, of a training run, or the .adapter of a finished cell"
_CELL = '.adapter'
# What a training run's directory holds it under.
ADAPTER = 'adapter'


def check(directory: Path) -> None:
  """Raises `UserError` where no adapter is to be found."""
  _find(directory)


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
  if found.suffix == '.adapter':
    record = read_record(found.with_suffix('.json'))
    settings = record['settings']['lora']
    tree = checkpoint.load(found)
    adapter = peft.uniform(
      tree, settings['rank'], settings['alpha'], record['base'].get('hub_id', '')
    )
    _check_shapes(found, tree, base)
    made_on = record['base']
  else:
    adapter = peft.load(found, base.params)
    run = found.parent / 'run.json'
    record = read_json(run) if run.is_file() else {}
    made_on = record.get('base') or {}
  own, other = base.record['sha256'], made_on.get('sha256', base.record['sha256'])
  if own != other:
    print(
      f'{found} was trained on {made_on.get("name")} ({made_on.get("weights")}), and this is '
      f'{base.name} ({base.record["weights"]})',
      file=sys.stderr,
    )
  return adapter


def attach(params: Mapping[str, Any], adapter: peft.Adapter) -> dict:
  """The base with the adapter on it, unmerged."""
  return lora.attach(params, adapter.params, adapter.scales())


def _find(directory: Path) -> Path:
  """The directory that holds the adapter itself."""
  if (directory / peft.CONFIG).is_file() or (directory / peft.WEIGHTS).is_file():
    return directory
  if (directory / ADAPTER / CONFIG).is_file():
    return directory / ADAPTER
  if is_cell(directory) and directory.is_dir():
    record = directory.with_suffix('.json')
    if not record.is_file():
      raise UserError(f'no {record}; the cell did not finish, run the ablation again')
    return directory
  raise UserError(f'no adapter in {directory}; give {_FORMS}')


def _check_shapes(found: Path, tree: Mapping[str, Any], base: Base) -> None:
  kernels: dict[str, Any] = dict(flatten_dict(base.params, sep='/'))
  leaves: dict[str, Any] = dict(flatten_dict(tree, sep='/'))
  for path, a in leaves.items():
    if path.endswith('/a'):
      module = path.removesuffix('/a')
      kernel = kernels.get(f'{module}/kernel')
      sides = (a.shape[0], a.shape[1], leaves[f'{module}/b'].shape[2])
      if kernel is None or kernel.shape != sides:
        raise UserError(f'{found} is for another base than {base.name}: {module} does not fit')

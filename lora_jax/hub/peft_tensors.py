"""`adapter_model.safetensors`: its tensors by our paths, and whether they are what they should be.

Names may lack PEFT's prefix or the adapter's name, or have those of wrappers (compiled
or sharded models, text models inside larger ones); each tensor has one place here.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.flax

from lora_jax.errors import UserError, one_line
from lora_jax.hub.hf_names import full_name, is_stacked, name_of, path_of
from lora_jax.hub.peft_config import CONFIG, is_saved, is_target, rank_of

WEIGHTS = 'adapter_model.safetensors'

# As safetensors calls them.
_DTYPES = ('F32', 'F16', 'BF16')

# Wrappers of a model leave their names in some files; `default` is PEFT's name for an adapter.
_TENSOR = re.compile(
  r'(?:base_model\.model\.)?(?:(?:model|language_model|text_model|_orig_mod|_fsdp_wrapped_module)\.)*'
  r'(?P<module>.+?)\.(?:base_layer\.)?'
  r'(?P<leaf>(?P<lora>lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?|weight|bias)'
)
# Theirs -> ours.
_LORA = {'lora_A': 'a', 'lora_B': 'b', 'lora_magnitude_vector': 'm'}
_WHOLE = {'weight': 'scale', 'bias': 'bias'}

# Path of a leaf of ours -> layer, or None outside the blocks -> tensor as PEFT has it.
Found = dict[str, dict[int | None, np.ndarray]]


def read_tensors(directory: Path, flat: Mapping[str, Any]) -> Found:
  """Reads the tensors of an adapter; all of them have their place in a base and its shapes.

  Args:
    directory: of the adapter.
    flat: leaves of the base, or their shapes, by path.

  Raises:
    UserError: the file is missing, damaged, a pickle, or not for this base.
  """
  file = directory / WEIGHTS
  found: Found = {}
  for name, tensor in _read(directory).items():
    match = _TENSOR.fullmatch(name)
    path, layer = path_of(match['module']) if match else ('', None)
    kind = (match['lora'] or match['leaf']) if match else ''
    leaf = f'{path}/{(_LORA | _WHOLE).get(kind)}'
    like = f'{path}/kernel' if kind in _LORA else leaf
    in_block = is_stacked(path)
    if like not in flat or in_block == (layer is None) or (kind in _LORA and not in_block):
      raise UserError(f'{file}: tensor {name} is none of this base or of LoRA; give another file')
    if layer is not None and layer >= flat[like].shape[0]:
      raise UserError(
        f'{file}: tensor {name} is of layer {layer}, and the base has {flat[like].shape[0]}'
      )
    if layer in found.setdefault(leaf, {}):
      raise UserError(f'{file}: tensor {name} is there twice, under another name too')
    expected = flat[like].shape[-1:]
    if kind not in ('lora_A', 'lora_B') and tensor.shape != expected:
      raise UserError(
        f'{file}: {name} has {tensor.shape}, and this base wants {expected}; the adapter is for '
        'another base'
      )
    found[leaf][layer] = np.asarray(tensor)
    if not np.isfinite(found[leaf][layer]).all():
      raise UserError(f'{file}: {name} holds values that are not finite; give another adapter')
  for path in sorted({leaf[:-2] for leaf in found if leaf.endswith(('/a', '/b', '/m'))}):
    _check_pairs(file, path, found, flat[f'{path}/kernel'].shape)
  if not any(leaf.endswith('/b') for leaf in found):
    raise UserError(f'{file}: holds no adapter; give another file')
  return found


def check_against(
  settings: Mapping[str, Any], directory: Path, found: Found, flat: Mapping[str, Any]
) -> None:
  """Checks that the tensors are those that the settings speak of, no fewer and no more.

  Raises:
    UserError: a module is a target and has no tensors, or the reverse.
  """
  file, says = directory / WEIGHTS, f'{CONFIG} beside it'
  sees = is_seeing(flat)
  for path in flat:
    module, kind = path.rsplit('/', 1)
    layers = range(flat[path].shape[0]) if is_stacked(path) else [None]
    for layer in layers:
      name = full_name(module, layer, sees)
      if kind == 'kernel' and layer is not None:
        there, wanted = layer in found.get(f'{module}/b', {}), is_target(settings, name)
        if there != wanted:
          has, but = ('no ', 'makes it a target') if wanted else ('', 'does not')
          raise UserError(f'{file}: has {has}tensors of {name}, and {says} {but}')
        rank = rank_of(settings, name)
        if there and rank not in (None, held := found[f'{module}/b'][layer].shape[1]):
          raise UserError(f'{file}: {name} has rank {held}, and {says} gives it {rank}')
        dora = there and bool(settings.get('use_dora'))
        if dora != (layer in found.get(f'{module}/m', {})):
          has, but = ('no ', 'sets') if dora else ('', 'does not set')
          raise UserError(f'{file}: has {has}magnitudes of {name}, and {says} {but} use_dora')
      if kind == 'scale' and is_saved(settings, name) != (layer in found.get(path, {})):
        has, but = ('no ', 'has') if is_saved(settings, name) else ('', 'does not have')
        raise UserError(
          f'{file}: has {has}weight of {name}, and {says} {but} it in modules_to_save'
        )
  norms = [
    full_name(p[:-6], 0 if is_stacked(p) else None, sees) for p in flat if p.endswith('/scale')
  ]
  for module in settings.get('modules_to_save') or []:
    if not any(name.endswith(module) for name in norms):
      raise UserError(
        f'{directory / CONFIG}: modules_to_save has {module!r}, and only norms are read: '
        f'{", ".join(norms)}'
      )
  biases = [path for path in flat if path.endswith('/bias')]
  trained = settings.get('bias', 'none')
  if trained == 'none' and any(path in found for path in biases):
    raise UserError(f"{file}: has biases, and {says} has bias 'none'")
  if trained != 'none' and biases and not any(path in found for path in biases):
    # Some versions of PEFT leave them out of the file.
    print(
      f'{file}: has no biases, and {says} has bias {trained!r}: those of the base stay',
      file=sys.stderr,
    )


def is_seeing(flat: Mapping[str, Any]) -> bool:
  """Whether these are the leaves of a base that sees."""
  return any(path.startswith('vision/') for path in flat)


def _check_pairs(file: Path, path: str, found: Found, shape: Sequence[int]) -> None:
  """Checks that each layer's A and B are both there and fit the base."""
  a, b, m = (found.get(f'{path}/{leaf}', {}) for leaf in 'abm')
  for layer in dict.fromkeys([*a, *b, *m]):
    name = name_of(path, layer)
    if layer not in a or layer not in b:
      has = ', '.join(
        kind for kind, held in (('lora_A', a), ('lora_B', b), ('magnitudes', m)) if layer in held
      )
      raise UserError(f'{file}: {name} has {has} alone; give a whole file')
    rank = a[layer].shape[0] if a[layer].ndim == 2 else 0
    if rank < 1 or (*a[layer].shape, *b[layer].shape) != (rank, *shape[1:], rank):
      raise UserError(
        f'{file}: {name} has A {a[layer].shape} and B {b[layer].shape}, and this base wants '
        f'(R, {shape[1]}) and ({shape[2]}, R); the adapter is for another base'
      )


def _read(directory: Path) -> dict[str, Any]:
  file = directory / WEIGHTS
  if not file.is_file():
    pickled = directory / 'adapter_model.bin'
    also = f'; {pickled.name} is a pickle, which is never read: save it as safetensors'
    raise UserError(f'no {file}{also if pickled.exists() else ""}')
  try:
    with safetensors.safe_open(str(file), framework='flax') as stored:
      names = stored.keys()
      for name in names:
        kind = stored.get_slice(name).get_dtype()
        if kind not in _DTYPES:
          raise UserError(f'{file}: tensor {name} is {kind}; give one of {", ".join(_DTYPES)}')
    return safetensors.flax.load_file(str(file))
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise UserError(f'{file}: damaged or cut short ({one_line(error)})') from error

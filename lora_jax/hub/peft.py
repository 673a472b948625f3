"""Adapters in and out in PEFT's format, which is what servers load.

    adapter = peft.load(Path('adapter'), params)           # made by PEFT, or by `save`
    attached = lora.attach(params, adapter.params, adapter.scales())
    peft.save(Path('out'), adapter)

A directory holds `adapter_model.safetensors`, whose tensors are `lora_A.weight` (R, in)
and `lora_B.weight` (out, R) of each adapted module, and `adapter_config.json`, which has
alpha, and ranks and alphas of modules that differ from the rest as patterns over names.
Layers are apart there and stacked here. What a file holds is read from its tensors; the
configuration gives the alphas.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.errors import UserError
from lora_jax.records import write_bytes, write_json

WEIGHTS, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'

# As safetensors calls them.
_DTYPES = ('F32', 'F16', 'BF16')

# Our block -> the Hugging Face name of the module that holds its Dense layers.
_BLOCKS = {'attn': 'self_attn', 'mlp': 'mlp'}
_TENSOR = re.compile(
  r'base_model\.model\.(?P<name>model\.layers\.(?P<layer>\d+)\.(?P<block>\w+)\.(?P<module>\w+))'
  r'\.lora_(?P<which>[AB])\.weight'
)
# Settings that change what an adapter computes and that are not read here, with the
# values under which they do not.
_UNSUPPORTED = {
  'use_dora': (False, None),
  'bias': ('none', None),
  'modules_to_save': (None, []),
  'fan_in_fan_out': (False, None),
  'lora_bias': (False, None),
  'trainable_token_indices': (None,),
  'alora_invocation_tokens': (None,),
  'target_parameters': (None, []),
  'layer_replication': (None, []),
}
# Initialisations that change the base too, so that A and B mean nothing without it.
_CHANGES_BASE = ('pissa', 'corda', 'olora', 'loftq', 'lora_ga')


@dataclasses.dataclass(frozen=True)
class Adapter:
  """An adapter and what its arrays do not say.

  Attributes:
    params: the sparse tree of `lora.init`; zero beyond a layer's own rank.
    ranks: path -> rank of each layer; 0 where the layer has no adapter.
    alphas: path -> alpha of each layer.
    rank_stabilised: scaled by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023) instead of
      alpha / rank.
    base: what the base is called on its hub, or ''.
  """

  params: Mapping[str, Any]
  ranks: Mapping[str, Sequence[int]]
  alphas: Mapping[str, Sequence[float]]
  rank_stabilised: bool = False
  base: str = ''

  def scales(self) -> dict[str, np.ndarray]:
    """Path -> the factor on each layer's low-rank product, for `lora.attach`."""
    power = 0.5 if self.rank_stabilised else 1.0
    return {
      path: np.asarray(self.alphas[path]) / np.maximum(ranks, 1) ** power
      for path, ranks in self.ranks.items()
    }


def uniform(params: Mapping[str, Any], rank: int, alpha: float, base: str = '') -> Adapter:
  """An adapter tree whose modules and layers all have one rank and alpha."""
  paths = _paths(params)
  layers = {path: len(leaves['a']) for path, leaves in paths.items()}
  ranks = {path: (rank,) * count for path, count in layers.items()}
  alphas = {path: (float(alpha),) * count for path, count in layers.items()}
  return Adapter(params, ranks, alphas, base=base)


def save(directory: Path, adapter: Adapter, bake_scale: bool = False) -> None:
  """Writes an adapter for PEFT and for servers that read its format.

  Args:
    directory: made if it is not there; files of the same names are replaced.
    adapter: what to write.
    bake_scale: multiply B by its scale and fill every module up to one rank, so that a
      server that ignores patterns and rank stabilisation computes the same. The adapter
      is then larger, and a scale that is no power of two rounds B.

  Raises:
    UserError: the directory cannot be written to, or no layer is adapted.
  """
  if not any(any(ranks) for ranks in adapter.ranks.values()):
    raise UserError('the adapter has rank 0 everywhere, so there is nothing to write')
  if bake_scale:
    adapter = _baked(adapter)
  tensors = {}
  for path, leaves in _paths(adapter.params).items():
    for layer, rank in enumerate(adapter.ranks[path]):
      if rank:
        name = f'base_model.model.{_name(path, layer)}'
        a, b = leaves['a'][layer, :, :rank], leaves['b'][layer, :rank]
        tensors[f'{name}.lora_A.weight'] = np.ascontiguousarray(np.asarray(a).T)
        tensors[f'{name}.lora_B.weight'] = np.ascontiguousarray(np.asarray(b).T)
  content = safetensors.flax.save(
    {name: jnp.asarray(tensor) for name, tensor in tensors.items()}, metadata={'format': 'pt'}
  )
  # Old weights go before the new configuration comes: a directory that has both is whole.
  if (directory / WEIGHTS).exists():
    (directory / WEIGHTS).unlink()
  write_json(directory / CONFIG, config(adapter))
  write_bytes(directory / WEIGHTS, content)


def config(adapter: Adapter) -> dict[str, Any]:
  """The content of `adapter_config.json`."""
  adapted = {
    (path, layer): (rank, adapter.alphas[path][layer])
    for path, ranks in adapter.ranks.items()
    for layer, rank in enumerate(ranks)
    if rank
  }
  rank = Counter(rank for rank, _ in adapted.values()).most_common(1)[0][0]
  alpha = Counter(alpha for _, alpha in adapted.values()).most_common(1)[0][0]
  # A module that only some layers have is named in full, each of them.
  whole = [path for path, ranks in adapter.ranks.items() if all(ranks)]
  names = [path.rsplit('/', 1)[-1] for path in whole]
  names += [_name(path, layer) for path, layer in adapted if path not in whole]
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': adapter.base,
    'r': rank,
    'lora_alpha': alpha,
    'lora_dropout': 0.0,
    'target_modules': sorted(names),
    'rank_pattern': {_name(*at): held for at, (held, _) in adapted.items() if held != rank},
    'alpha_pattern': {_name(*at): held for at, (_, held) in adapted.items() if held != alpha},
    'use_rslora': adapter.rank_stabilised,
    'use_dora': False,
    'bias': 'none',
    'fan_in_fan_out': False,
    'modules_to_save': None,
    'inference_mode': True,
    'init_lora_weights': True,
  }


def load(directory: Path, params: Mapping[str, Any]) -> Adapter:
  """Reads an adapter in PEFT's format.

  Args:
    directory: holds `adapter_config.json` and `adapter_model.safetensors`.
    params: the base that the adapter is for, or its shapes.

  Returns:
    The adapter, in the dtype that it was stored in.

  Raises:
    UserError: a file is missing, damaged or a pickle; the adapter is of a kind that is
      not read here, or for another base.
  """
  settings = _read_config(directory)
  tensors = _read_tensors(directory)
  kernels: dict[str, Any] = dict(flatten_dict(params, sep='/'))
  file = directory / WEIGHTS
  found: dict[str, dict[int, dict[str, Any]]] = {}
  for name, tensor in tensors.items():
    match = _TENSOR.fullmatch(name)
    path = _path(match['block'], match['module']) if match else None
    if match is None or f'{path}/kernel' not in kernels:
      raise UserError(f'{file}: tensor {name} is none of this base or of LoRA; give another file')
    assert path is not None
    count = kernels[f'{path}/kernel'].shape[0]
    layer = int(match['layer'])
    if layer >= count:
      raise UserError(f'{file}: tensor {name} is of layer {layer}, and the base has {count}')
    found.setdefault(path, {}).setdefault(layer, {})[match['which']] = tensor
  if not found:
    raise UserError(f'{file}: holds no tensors; give another file')
  leaves, ranks, alphas = {}, {}, {}
  for path in sorted(found):
    layers, fan_in, fan_out = kernels[f'{path}/kernel'].shape
    for layer, pair in found[path].items():
      _check_pair(file, _name(path, layer), pair, fan_in, fan_out)
    ranks[path] = tuple(
      found[path][layer]['A'].shape[0] if layer in found[path] else 0 for layer in range(layers)
    )
    alphas[path] = tuple(
      _alpha(settings, _name(path, layer)) if ranks[path][layer] else 0.0 for layer in range(layers)
    )
    dtype = jnp.result_type(*(leaf for pair in found[path].values() for leaf in pair.values()))
    a = np.zeros((layers, fan_in, max(ranks[path])), dtype)
    b = np.zeros((layers, max(ranks[path]), fan_out), dtype)
    for layer, pair in found[path].items():
      a[layer, :, : ranks[path][layer]] = np.asarray(pair['A']).T
      b[layer, : ranks[path][layer]] = np.asarray(pair['B']).T
    leaves[f'{path}/a'], leaves[f'{path}/b'] = jnp.asarray(a), jnp.asarray(b)
  return Adapter(
    params=unflatten_dict(leaves, sep='/'),
    ranks=ranks,
    alphas=alphas,
    rank_stabilised=bool(settings.get('use_rslora')),
    base=str(settings.get('base_model_name_or_path') or ''),
  )


def _baked(adapter: Adapter) -> Adapter:
  """The same function with one rank everywhere and a scale of 1."""
  rank = max(max(ranks) for ranks in adapter.ranks.values())
  leaves = {}
  for path, pair in _paths(adapter.params).items():
    room = ((0, 0), (0, 0), (0, rank - pair['a'].shape[-1]))
    scales_L11 = jnp.asarray(adapter.scales()[path], jnp.float32)[:, None, None]
    leaves[f'{path}/a'] = jnp.pad(pair['a'], room)
    leaves[f'{path}/b'] = jnp.pad(pair['b'] * scales_L11, (room[0], room[2], room[1]))
  return Adapter(
    params=unflatten_dict(leaves, sep='/'),
    ranks={p: tuple(rank if r else 0 for r in ranks) for p, ranks in adapter.ranks.items()},
    alphas={p: (float(rank),) * len(ranks) for p, ranks in adapter.ranks.items()},
    base=adapter.base,
  )


def _paths(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Path -> {'a', 'b'}."""
  flat: dict[str, Any] = dict(flatten_dict(params, sep='/'))
  paths = [path.removesuffix('/a') for path in flat if path.endswith('/a')]
  return {path: {leaf: flat[f'{path}/{leaf}'] for leaf in 'ab'} for path in paths}


def _name(path: str, layer: int) -> str:
  _, block, module = path.split('/')
  return f'model.layers.{layer}.{_BLOCKS[block]}.{module}'


def _path(block: str, module: str) -> str | None:
  ours = [name for name, theirs in _BLOCKS.items() if theirs == block]
  return f'layers/{ours[0]}/{module}' if ours else None


def _read_config(directory: Path) -> dict[str, Any]:
  file = directory / CONFIG
  if not file.is_file():
    raise UserError(f'no {file}; give the directory of an adapter in PEFT format')
  try:
    settings = json.loads(file.read_text(encoding='utf-8'))
    kind = settings['peft_type']
    alphas = {'lora_alpha': settings['lora_alpha'], **(settings.get('alpha_pattern') or {})}
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{file}: not the configuration of an adapter ({error})') from error
  if kind != 'LORA':
    raise UserError(f'{file}: peft_type is {kind!r}, and only LORA is read')
  for name, alpha in alphas.items():
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
      raise UserError(f'{file}: the alpha of {name} is {alpha!r}, not a number')
    try:
      re.compile(name)
    except re.error as error:
      raise UserError(f'{file}: alpha_pattern {name!r} is no pattern ({error})') from error
  if settings.get('use_rslora') not in (True, False, None):
    raise UserError(f'{file}: use_rslora is {settings["use_rslora"]!r}, not true or false')
  init = str(settings.get('init_lora_weights')).lower()
  if init.startswith(_CHANGES_BASE):
    raise UserError(
      f'{file}: init_lora_weights is {init!r}, which changed the base; convert it to plain LoRA '
      'with PEFT (`path_initial_model_for_weight_conversion`)'
    )
  for key, neutral in _UNSUPPORTED.items():
    if settings.get(key, neutral[0]) not in neutral:
      raise UserError(f'{file}: {key} is {settings[key]!r}, which is not supported')
  return settings


def _read_tensors(directory: Path) -> dict[str, Any]:
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
    raise UserError(f'{file}: damaged or cut short ({" ".join(str(error).split())})') from error


def _check_pair(file: Path, name: str, pair: Mapping[str, Any], fan_in: int, fan_out: int) -> None:
  if pair.keys() != {'A', 'B'}:
    raise UserError(f'{file}: {name} has lora_{"".join(pair)} alone; give a whole file')
  a, b = pair['A'].shape, pair['B'].shape
  rank = a[0] if len(a) == 2 else 0
  if rank < 1 or (*a, *b) != (rank, fan_in, fan_out, rank):
    raise UserError(
      f'{file}: {name} has A {a} and B {b}, and this base wants (R, {fan_in}) and '
      f'({fan_out}, R); the adapter is for another base'
    )


def _alpha(settings: Mapping[str, Any], name: str) -> float:
  """The alpha of a module: of the first pattern that its name ends with, or the common one."""
  for pattern, alpha in (settings.get('alpha_pattern') or {}).items():
    if re.match(rf'(.*\.)?({pattern})$', name):
      return float(alpha)
  return float(settings['lora_alpha'])

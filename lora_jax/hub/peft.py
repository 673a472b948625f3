"""Adapters in and out in PEFT's format, which is what servers load.

    adapter = peft.load(Path('adapter'), params)           # made by PEFT, or by `save`
    attached = lora.attach(params, adapter.params, adapter.scales())
    peft.save(Path('out'), adapter)

A directory holds `adapter_model.safetensors`, whose tensors are `lora_A.weight` (R, in)
and `lora_B.weight` (out, R) of each adapted module, with DoRA a `lora_magnitude_vector`
(out,), and norms and biases that were trained too; and `adapter_config.json`, which has
alpha, and ranks and alphas of modules that differ from the rest as patterns over names.
Layers are apart there and stacked here. What a file holds is read from its tensors; the
configuration gives the alphas, and where the two disagree the adapter is refused.

`lora_jax.json` beside them says on which base an adapter of ours was trained.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax import lora, lora_family
from lora_jax.config import LoraConfig
from lora_jax.errors import UserError
from lora_jax.hub.hf_names import full_name, is_stacked
from lora_jax.hub.peft_config import CONFIG, alpha_of, read_settings
from lora_jax.hub.peft_tensors import WEIGHTS, check_against, is_seeing, read_tensors
from lora_jax.records import read_json, write_bytes, write_json

ORIGIN = 'lora_jax.json'
_PREFIX = 'base_model.model.'


@dataclasses.dataclass(frozen=True)
class Adapter:
  """An adapter and what its arrays do not say.

  Attributes:
    params: a tree that `lora.attach` takes; zero beyond a layer's own rank.
    ranks: path -> rank of each layer; 0 where the layer has no adapter.
    alphas: path -> alpha of each layer.
    rank_stabilised: scaled by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023) instead of
      alpha / rank.
    base: what the base is called on its hub, or ''.
    base_sha256: of the base's file, or ''.
    targets: the set of targets, as it was given, or ''.
    sees: whether its base sees, and so has its language model under another name.
  """

  params: Mapping[str, Any]
  ranks: Mapping[str, Sequence[int]]
  alphas: Mapping[str, Sequence[float]]
  rank_stabilised: bool = False
  base: str = ''
  base_sha256: str = ''
  targets: str = ''
  sees: bool = False

  def scales(self) -> dict[str, np.ndarray]:
    """Path -> the factor on each layer's low-rank product, for `lora.attach`."""
    of = LoraConfig(rslora=self.rank_stabilised).scale_of
    return {
      path: np.asarray([*map(of, ranks, self.alphas[path])]) for path, ranks in self.ranks.items()
    }


def uniform(params: Mapping[str, Any], rank: int, alpha: float, base: str = '') -> Adapter:
  """An adapter tree whose modules and layers all have one rank and alpha."""
  return of(params, LoraConfig(rank=rank, alpha=alpha), base=base)


def of(params: Mapping[str, Any], config: LoraConfig, **about: Any) -> Adapter:
  """An adapter tree that was made by `lora_family.init` under a configuration.

  Args:
    params: the tree.
    config: the configuration.
    about: `base`, `base_sha256`, `targets` and `sees` of the `Adapter`, as far as they are
      known.
  """
  plan = lora_family.plan(config, params)
  return Adapter(params, plan.ranks, plan.alphas, config.rslora, **about)


def unscaled(params: Mapping[str, Any], **about: Any) -> Adapter:
  """A plain adapter tree of scale 1, as `arithmetic` makes, each module with a rank of its own."""
  owned = {module.owner: module.leaves['a'] for module in lora.modules(params).values()}
  ranks = {owner: (a.shape[-1],) * a.shape[0] for owner, a in owned.items()}
  alphas = {owner: tuple(map(float, held)) for owner, held in ranks.items()}
  return Adapter(params, ranks, alphas, False, **about)


@dataclasses.dataclass(frozen=True)
class _Linear:
  """What one module of one layer holds, as PEFT has it: A (R, in), B (out, R)."""

  a: np.ndarray
  b: np.ndarray
  m: np.ndarray | None
  alpha: float


def save(directory: Path, adapter: Adapter, bake_scale: bool = False) -> None:
  """Writes an adapter for PEFT and for servers that read its format.

  Fused modules are split, and an adapter of PiSSA is written with where it began, as a
  plain one of twice its rank; both compute the same on the base as it is.

  Args:
    directory: made if it is not there; files of the same names are replaced.
    adapter: what to write.
    bake_scale: multiply B by its scale and fill every module up to one rank, so that a
      server that ignores patterns and rank stabilisation computes the same. The adapter
      is then larger, and a scale that is no power of two rounds B. Magnitudes (DoRA)
      stay as they are.

  Raises:
    UserError: the directory cannot be written to, or no layer is adapted.
  """
  linears = _linears(adapter)
  if not linears:
    raise UserError('the adapter has rank 0 everywhere, so there is nothing to write')
  if bake_scale:
    linears = _baked(linears, adapter)
    adapter = dataclasses.replace(adapter, rank_stabilised=False)
  tensors = {}
  for at, linear in linears.items():
    name = f'{_PREFIX}{full_name(*at, adapter.sees)}'
    tensors[f'{name}.lora_A.weight'] = linear.a
    tensors[f'{name}.lora_B.weight'] = linear.b
    if linear.m is not None:
      tensors[f'{name}.lora_magnitude_vector'] = linear.m
  for path, leaf in lora.replaced(adapter.params).items():
    module, kind = path.rsplit('/', 1)
    for layer in range(len(leaf)) if is_stacked(path) else [None]:
      # PEFT holds the module itself inside the one that adapts it.
      inner = 'base_layer.' if (module, layer) in linears else ''
      name = f'{_PREFIX}{full_name(module, layer, adapter.sees)}.{inner}'
      held = leaf if layer is None else leaf[layer]
      tensors[name + ('bias' if kind == 'bias' else 'weight')] = np.asarray(held)
  content = safetensors.flax.save(
    {name: jnp.asarray(np.ascontiguousarray(tensor)) for name, tensor in tensors.items()},
    metadata={'format': 'pt'},
  )
  # Old weights go before the new configuration comes: a directory that has both is whole.
  if (directory / WEIGHTS).exists():
    (directory / WEIGHTS).unlink()
  origin = {'base': adapter.base, 'base_sha256': adapter.base_sha256, 'targets': adapter.targets}
  write_json(directory / ORIGIN, origin)
  write_json(directory / CONFIG, config(linears, adapter))
  write_bytes(directory / WEIGHTS, content)


def config(linears: Mapping[tuple[str, int], _Linear], adapter: Adapter) -> dict[str, Any]:
  """The content of `adapter_config.json`."""
  ranks = {at: linear.a.shape[0] for at, linear in linears.items()}
  alphas = {at: linear.alpha for at, linear in linears.items()}
  rank = Counter(ranks.values()).most_common(1)[0][0]
  alpha = Counter(alphas.values()).most_common(1)[0][0]
  named = lambda at: full_name(at[0], at[1], adapter.sees)
  # A module that only some layers have is named in full, each of them; and so are all where
  # a name alone would be of modules in the vision tower too.
  counts = Counter(path for path, _ in linears)
  layers = len(next(iter(adapter.ranks.values())))
  short = {path for path, count in counts.items() if count == layers and not adapter.sees}
  names = {at[0].rsplit('/', 1)[-1] if at[0] in short else named(at) for at in linears}
  replaced = [path.rsplit('/', 1) for path in lora.replaced(adapter.params)]
  # PEFT looks for names that end so: `norm` alone would be three norms of a block too.
  saved = {
    full_name(path, None, adapter.sees) if path == 'norm' else path.rsplit('/', 1)[-1]
    for path, kind in replaced
    if kind == 'scale'
  }
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': adapter.base,
    'r': rank,
    'lora_alpha': alpha,
    'lora_dropout': 0.0,
    'target_modules': sorted(names),
    'rank_pattern': {named(at): held for at, held in ranks.items() if held != rank},
    'alpha_pattern': {named(at): held for at, held in alphas.items() if held != alpha},
    'use_rslora': adapter.rank_stabilised,
    'use_dora': any(linear.m is not None for linear in linears.values()),
    'bias': 'all' if any(kind == 'bias' for _, kind in replaced) else 'none',
    'fan_in_fan_out': False,
    'modules_to_save': sorted(saved) or None,
    'inference_mode': True,
    'init_lora_weights': True,
  }


def load(directory: Path, params: Mapping[str, Any], base_sha256: str = '') -> Adapter:
  """Reads an adapter in PEFT's format onto the device; as `read` otherwise."""
  held = read(directory, params, base_sha256)
  return dataclasses.replace(held, params=jax.tree.map(jnp.asarray, held.params))


def read(directory: Path, params: Mapping[str, Any], base_sha256: str = '') -> Adapter:
  """Reads an adapter in PEFT's format into numpy's arrays, for which nothing is compiled.

  Args:
    directory: holds `adapter_config.json` and `adapter_model.safetensors`.
    params: the base that the adapter is for, or its shapes.
    base_sha256: of that base; one that differs from the adapter's is said on stderr.

  Returns:
    The adapter, in the dtype that it was stored in.

  Raises:
    UserError: a file is missing, damaged or a pickle; the adapter is of a kind that is
      not read here, is for another base, or its files say different things.
  """
  settings = read_settings(directory)
  flat: dict[str, Any] = dict(flatten_dict(params, sep='/'))
  found = read_tensors(directory, flat)
  check_against(settings, directory, found, flat)
  sees = is_seeing(flat)
  leaves: dict[str, Any] = {}
  ranks, alphas = {}, {}
  for path in sorted({leaf.removesuffix('/b') for leaf in found if leaf.endswith('/b')}):
    layers, fan_in, fan_out = flat[f'{path}/kernel'].shape
    held = {name: found.get(f'{path}/{name}', {}) for name in ('a', 'b', 'm')}
    ranks[path] = tuple(held['b'][i].shape[1] if i in held['b'] else 0 for i in range(layers))
    alphas[path] = tuple(
      alpha_of(settings, full_name(path, i, sees)) if rank else 0.0
      for i, rank in enumerate(ranks[path])
    )
    width = max(ranks[path])
    leaves[f'{path}/a'] = _stack({i: a.T for i, a in held['a'].items()}, (layers, fan_in, width))
    leaves[f'{path}/b'] = _stack({i: b.T for i, b in held['b'].items()}, (layers, width, fan_out))
    if held['m']:
      leaves[f'{path}/m'] = _stack(held['m'], (layers, fan_out))
  for path in sorted(found):
    if path.endswith(('/scale', '/bias')):
      leaves[path] = _whole(found[path], flat[path])
  return Adapter(
    params=unflatten_dict(leaves, sep='/'),
    ranks=ranks,
    alphas=alphas,
    rank_stabilised=bool(settings.get('use_rslora')),
    base=str(settings.get('base_model_name_or_path') or ''),
    sees=sees,
    **_origin(directory, base_sha256),
  )


def _linears(adapter: Adapter) -> dict[tuple[str, int], _Linear]:
  """(path, layer) -> what it holds, fused modules split and PiSSA's beginning taken off."""
  out = {}
  for path, module in lora.modules(adapter.params).items():
    leaves = {name: np.asarray(leaf) for name, leaf in module.leaves.items()}
    for layer, rank in enumerate(adapter.ranks[module.owner]):
      if not rank:
        continue
      alpha = adapter.alphas[module.owner][layer]
      a, b = leaves['a'][layer, :, :rank], leaves['b'][layer, :rank]
      if 'a0' in leaves:
        a = np.concatenate([a, leaves['a0'][layer, :, :rank]], axis=1)
        b = np.concatenate([b, -leaves['b0'][layer, :rank]], axis=0)
        # The scale of twice the rank is to be that of the rank.
        alpha *= 2**0.5 if adapter.rank_stabilised else 2
      m = leaves['m'][layer] if 'm' in leaves else None
      out[path, layer] = _Linear(a.T, b.T, m, alpha)
  return out


def _baked(
  linears: Mapping[tuple[str, int], _Linear], adapter: Adapter
) -> dict[tuple[str, int], _Linear]:
  """The same function with one rank everywhere and a scale of 1."""
  scale_of = LoraConfig(rslora=adapter.rank_stabilised).scale_of
  largest = max(linear.a.shape[0] for linear in linears.values())
  out = {}
  for at, linear in linears.items():
    rank = linear.a.shape[0]
    scaled = linear.b.astype(np.float32) * np.float32(scale_of(rank, linear.alpha))
    a = np.pad(linear.a, ((0, largest - rank), (0, 0)))
    b = np.pad(scaled, ((0, 0), (0, largest - rank)))
    out[at] = _Linear(a, b, linear.m, float(largest))
  return out


def _stack(held: Mapping[Any, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
  """Layers in one array, zero where a layer, or its rank, ends."""
  whole = np.zeros(shape, jnp.result_type(*held.values()))
  for layer, leaf in held.items():
    whole[(layer, *(slice(size) for size in leaf.shape))] = leaf
  return whole


def _whole(held: Mapping[Any, np.ndarray], of_base: Any) -> np.ndarray:
  """A norm or bias of all layers; the base's own in layers where the file has none."""
  if None in held:
    return held[None]
  whole = np.zeros(of_base.shape, jnp.result_type(*held.values()))
  if len(held) < len(whole):
    whole[...] = np.asarray(of_base)
  for layer, leaf in held.items():
    whole[layer] = leaf
  return whole


def _origin(directory: Path, base_sha256: str) -> dict[str, str]:
  """What `save` noted of an adapter of ours; says so if its base was another."""
  file = directory / ORIGIN
  held = read_json(file) if file.is_file() else {}
  if not isinstance(held, dict):
    raise UserError(f'{file} is not a record of an adapter; delete it')
  about = {name: str(held.get(name) or '') for name in ('base_sha256', 'targets')}
  if base_sha256 and about['base_sha256'] and base_sha256 != about['base_sha256']:
    print(
      f'{directory}: trained on a base with sha256 {about["base_sha256"][:12]}, and this one has '
      f'{base_sha256[:12]}; it fits in shape, and may not in content',
      file=sys.stderr,
    )
  return about

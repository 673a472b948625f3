"""The LoRA family: what a `LoraConfig` says, as a tree that `lora.attach` understands.

  adapters = lora_family.init(key, params, paths, config)
  scales = lora_family.plan(config, adapters).scales()
  attached = lora.attach(params, adapters, scales, dropout_key, config.dropout)

Ranks, alphas and selected layers become a `Plan`; DoRA, PiSSA and trained norms or
biases become leaves (see `lora`), so that what trains, packs, shards and stores an
adapter needs to know of none of them.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax import lora
from lora_jax.config import LoraConfig
from lora_jax.errors import UserError
from lora_jax.kernels import Kernel, dense, lengths
from lora_jax.targets import is_sight, matches, parts, resolve, targetable

Params = Mapping[str, Any]

# Subspace iterations of PiSSA's fast decomposition, and columns beyond the rank.
_ITERATIONS, _OVERSAMPLED = 8, 8


@dataclasses.dataclass(frozen=True)
class Plan:
  """Rank and alpha of every module in every layer.

  Attributes:
    ranks: path -> rank of each layer; 0 where it is not adapted.
    alphas: path -> alpha of each layer; 0 where it is not adapted.
    config: what else holds for all.
  """

  ranks: Mapping[str, tuple[int, ...]]
  alphas: Mapping[str, tuple[float, ...]]
  config: LoraConfig

  def scales(self) -> dict[str, np.ndarray]:
    """Path -> the factor on each layer's low-rank product, for `lora.attach`."""
    of = lambda path: map(self.config.scale_of, self.ranks[path], self.alphas[path])
    return {path: np.asarray([*of(path)], np.float32) for path in self.ranks}


def plan(config: LoraConfig, adapters: Params) -> Plan:
  """The plan by which an adapter was made: that of its modules and layers."""
  modules = lora.modules(adapters).values()
  return plan_for(config, {module.owner: module.leaves['a'].shape[0] for module in modules})


def plan_for(config: LoraConfig, paths: Mapping[str, int]) -> Plan:
  """Spells a configuration out for modules of a base.

  Args:
    config: the configuration; the layers that it selects are the language model's.
    paths: of the modules, and how many layers each has.

  Raises:
    UserError: a selected layer is not there.
  """

  def of(path: str, pairs: Sequence[tuple[str, Any]], common: Any) -> tuple[Any, ...]:
    layers, chosen = range(paths[path]), _chosen(config, path, paths[path])
    value = lambda layer: next((v for p, v in pairs if matches(p, path, layer)), common)
    return tuple(value(layer) if layer in chosen else type(common)(0) for layer in layers)

  return Plan(
    {path: of(path, config.rank_pattern, config.rank) for path in paths},
    {path: of(path, config.alpha_pattern, float(config.alpha)) for path in paths},
    config,
  )


def init(key: jax.Array, params: Params, paths: Iterable[str], config: LoraConfig) -> dict:
  """Makes a fresh adapter of the kind that a configuration describes.

  It changes nothing: with PiSSA within the rounding of one product, in DoRA where the
  compiler sums a kernel's squares in one order, and otherwise exactly.

  Args:
    key: PRNG key.
    params: the base.
    paths: modules to adapt, from `lora.resolve`.
    config: the configuration.

  Returns:
    The adapter tree, float32.

  Raises:
    UserError: a rank exceeds both sides of a module, a selected layer is not there, or
      a name of what trains too matches nothing.
  """
  flat: dict[str, Any] = dict(flatten_dict(params, sep='/'))
  paths = tuple(paths)
  planned = plan_for(config, _depths(flat, paths))
  scales = planned.scales()
  adapters = lora.init(key, params, paths, planned.ranks)
  leaves: dict[str, Any] = dict(flatten_dict(adapters, sep='/'))
  if config.init == 'pissa':
    for path in paths:
      leaves |= _principal(key, flat, path, planned.ranks[path], scales[path])
  if config.dora:
    attached = lora.attach(params, unflatten_dict(leaves, sep='/'), scales)
    kernels: dict[str, Any] = dict(flatten_dict(attached, sep='/'))
    for path in paths:
      adapted_L1 = jnp.asarray(planned.ranks[path])[:, None] > 0
      for part in parts(path):
        leaves[f'{part}/m'] = jnp.where(adapted_L1, lengths(kernels[f'{part}/kernel']), 0)
  # Copies: the state of training is donated, and the base must outlive it.
  for path in also_trained(config, params):
    leaves[path] = jnp.array(flat[path], jnp.float32, copy=True)
  return unflatten_dict(leaves, sep='/')


def also_trained(config: LoraConfig, params: Params) -> tuple[str, ...]:
  """Paths of the norms and biases that train beside the adapters, in the order of the tree.

  Raises:
    UserError: a pattern matches none.
  """
  paths = [
    path for path in flatten_dict(params, sep='/') if path.rsplit('/', 1)[-1] in ('scale', 'bias')
  ]
  of_name = lambda pattern, path: pattern in path.split('/')[-2:] and not is_sight(path)
  named = lambda pattern, path: of_name(pattern, path) or matches(pattern, path)
  for pattern in config.train_also:
    if not any(named(pattern, path) for path in paths):
      raise UserError(
        f'train_also {pattern!r} matches no norm or bias; this base has {", ".join(paths)}'
      )
  return tuple(path for path in paths if any(named(p, path) for p in config.train_also))


def check(config: LoraConfig, target_sets: Iterable[str], params: Params) -> None:
  """Finds what a configuration names in vain, before anything is computed.

  Args:
    config: the configuration.
    target_sets: comma-joined sets; a pattern need match a module of one of them.
    params: the base, or its shapes.

  Raises:
    UserError: a pattern, layer, norm or bias is not there, a rank is too large, or a set
      matches nothing.
  """
  sets = [resolve(targets, params) for targets in target_sets]
  paths = dict.fromkeys(path for found in sets for path in found)
  flat: dict[str, Any] = dict(flatten_dict(params, sep='/'))
  _layers(config, flat[f'{targetable(params)[0]}/kernel'].shape[0])
  chosen = {path: _chosen(config, path, depth) for path, depth in _depths(flat, paths).items()}
  also_trained(config, params)
  for found in sets:
    # Shapes alone say whether a module is too small for its rank.
    ranks = plan_for(config, _depths(flat, found)).ranks
    jax.eval_shape(
      lambda found=found, ranks=ranks: lora.init(jax.random.key(0), params, found, ranks)
    )
  for name in ('rank_pattern', 'alpha_pattern'):
    for pattern, _ in getattr(config, name):
      if not any(matches(pattern, path, layer) for path in paths for layer in chosen[path]):
        one = next(iter(paths))
        raise UserError(
          f'{name} {pattern!r} matches no adapted module; there are {", ".join(paths)}, '
          f'with a layer as in {one.replace("layers/", f"layers/{chosen[one][0]}/", 1)}'
        )


def _depths(flat: Mapping[str, Any], paths: Iterable[str]) -> dict[str, int]:
  """How many layers each module has."""
  return {path: flat[f'{parts(path)[0]}/kernel'].shape[0] for path in paths}


def _chosen(config: LoraConfig, path: str, num_layers: int) -> Sequence[int]:
  """The adapted layers of a module; selected are those of the language model."""
  return range(num_layers) if is_sight(path) else _layers(config, num_layers)


def _layers(config: LoraConfig, num_layers: int) -> tuple[int, ...]:
  if not config.layers:
    return tuple(range(num_layers))
  chosen = set()
  for span in config.layers.split(','):
    first, _, last = span.partition('-')
    chosen |= {*range(int(first), int(last or first) + 1)}
    if int(last or first) >= num_layers or int(last or first) < int(first):
      raise UserError(f'layers {config.layers!r}: {span} is not in 0-{num_layers - 1} of this base')
  return tuple(sorted(chosen))


def _principal(
  key: jax.Array, flat: Mapping[str, Any], path: str, ranks: Sequence[int], scales: np.ndarray
) -> dict[str, jax.Array]:
  """Leaves of a module that begins at its kernel's principal singular vectors.

  A = U sqrt(S / scale) and B = sqrt(S / scale) V of the R largest (Meng et al. 2024,
  equations 2 and 3), by subspace iteration (their section on fast SVD).
  """
  kernels = [flat[f'{part}/kernel'] for part in parts(path)]
  module_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
  layers = (kernels, jnp.asarray(ranks), jnp.asarray(scales))
  a, b = _principal_layers(module_key, layers, max(ranks))
  leaves = {f'{path}/a': a, f'{path}/a0': jnp.copy(a)}
  ends = np.cumsum([kernel.shape[-1] for kernel in kernels])
  for part, piece in zip(parts(path), jnp.split(b, ends[:-1], axis=-1), strict=True):
    leaves |= {f'{part}/b': piece, f'{part}/b0': jnp.copy(piece)}
  return leaves


# Compiled once for modules of one shape: a loop outside of `jit` is compiled anew each time.
@functools.partial(jax.jit, static_argnums=2)
def _principal_layers(
  key: jax.Array, layers: tuple[list[Kernel], jax.Array, jax.Array], width: int
) -> tuple[jax.Array, jax.Array]:
  """A and B, of rank `width`, of kernels beside each other: (L, in, R) and (L, R, out)."""

  def of_layer(layer: tuple[list[Kernel], jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    held, rank, scale = layer
    w = jnp.concatenate([dense(kernel, jnp.float32) for kernel in held], axis=-1)
    u, s, v = _largest(key, w, width)
    s = jnp.where(jnp.arange(width) < rank, s / jnp.where(scale > 0, scale, 1), 0)
    return u * jnp.sqrt(s)[None], jnp.sqrt(s)[:, None] * v

  return jax.lax.map(of_layer, layers)


def _largest(key: jax.Array, w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The largest singular values and vectors of a matrix (in, out): (in, R), (R,), (R, out).

  Halko et al. 2011, algorithms 4.4 and 5.1; exact where R reaches the matrix's own rank.
  R beyond its smaller side is filled with zeros.
  """
  q = jax.random.normal(key, (w.shape[1], min(rank + max(rank, _OVERSAMPLED), *w.shape)))
  for _ in range(_ITERATIONS):
    q = jnp.linalg.qr(w.T @ jnp.linalg.qr(w @ q)[0])[0]
  u, s, small = jnp.linalg.svd(w @ q, full_matrices=False)
  room = max(0, rank - s.size)
  u, s, v = u[:, :rank], s[:rank], (small @ q.T)[:rank]
  return jnp.pad(u, ((0, 0), (0, room))), jnp.pad(s, (0, room)), jnp.pad(v, ((0, room), (0, 0)))

"""LoRA as a transform of the parameter tree.

An adapter is a sparse mirror of the parameters: for each adapted module
`layers/attn/o_proj/kernel` (L, in, out) it holds `layers/attn/o_proj/{a, b}` of
shapes (L, in, R) and (L, R, out), in float32 whatever the base is. `attach` puts
adapter and kernel together where the kernel stood; the model never hears of it.

  paths = resolve('o_proj,fc2', params)
  adapters = init(key, params, paths, rank=16)
  hidden, _ = model.apply({'params': attach(params, adapters, scale=2.0)}, tokens)
"""

import dataclasses
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from lora_jax.errors import UserError
from lora_jax.kernels import LoraKernel, dense

Params = Mapping[str, Any]

# One for all modules, or path -> one for each layer.
Scale = float | jax.Array | Mapping[str, Sequence[float] | np.ndarray]

# The article's names for sets of modules, in the order of a block.
GROUPS = {
  'qkv': ('q_proj', 'k_proj', 'v_proj'),
  'o_proj': ('o_proj',),
  'fc1': ('gate_proj', 'up_proj'),
  'fc2': ('down_proj',),
}
GROUPS['all'] = tuple(name for names in tuple(GROUPS.values()) for name in names)


def targetable(params: Params) -> tuple[str, ...]:
  """Paths of the modules that an adapter can sit on: the blocks' Dense modules."""
  flat = _flatten(params)
  return tuple(
    path.removesuffix('/kernel')
    for path in flat
    if path.startswith('layers/') and path.endswith('/kernel')
  )


def resolve(targets: str, params: Params) -> tuple[str, ...]:
  """Finds the modules that a set of targets names.

  Args:
    targets: comma-joined names; each an article's target (`qkv`, `o_proj`, `fc1`,
      `fc2`, `all`), a module's name (`gate_proj`) or a regular expression that
      matches a module's whole path (`layers/attn/.*`), itself without a comma.
    params: the model's parameters, or their shapes.

  Returns:
    Paths in the order of the tree, each once.

  Raises:
    UserError: a name matches no module.
  """
  paths = targetable(params)
  chosen = set()
  for target in split(targets):
    names = GROUPS.get(target, (target,))
    found = {path for path in paths if path.rsplit('/', 1)[-1] in names}
    if not found:
      try:
        found = {path for path in paths if re.fullmatch(target, path)}
      except (re.error, OverflowError, RecursionError):
        found = set()
    if not found:
      modules = ', '.join(path.rsplit('/', 1)[-1] for path in paths)
      raise UserError(
        f'target {target!r} matches no module; targets are {", ".join(GROUPS)}; modules are '
        f'{modules}; or a regular expression on a path such as {paths[0]}'
      )
    chosen |= found
  return tuple(path for path in paths if path in chosen)


def split(targets: str) -> tuple[str, ...]:
  """The names in a comma-joined set of targets.

  Raises:
    UserError: the set is empty.
  """
  names = tuple(name.strip() for name in targets.split(',') if name.strip())
  if not names:
    raise UserError(f'empty set of targets {targets!r}; targets are {", ".join(GROUPS)}')
  return names


def canonical(targets: str) -> str:
  """One spelling for a set of targets: no spaces or repeats, the article's names first."""
  names = dict.fromkeys(split(targets))
  return ','.join([*(n for n in GROUPS if n in names), *(n for n in names if n not in GROUPS)])


def init(
  key: jax.Array,
  params: Params,
  paths: Iterable[str],
  rank: int | Mapping[str, Sequence[int]],
) -> dict:
  """Makes a fresh adapter, which changes nothing: B is zero.

  A is uniform in +-1/sqrt(in), as PEFT draws it. A module's draw depends on the key
  and its own path alone, so it is the same in every set of targets.

  Where ranks differ between layers, R is the largest and A is zero beyond a layer's own.
  Then B gets no gradient there and A none either: what is zero stays zero.

  Args:
    key: PRNG key.
    params: the base, or its shapes.
    paths: modules to adapt, from `resolve`.
    rank: R of every module, or for each path one for each layer (0: not adapted).

  Returns:
    The adapter tree, float32.

  Raises:
    UserError: the rank exceeds both sides of a module.
  """
  flat = _flatten(params)
  adapters = {}
  for path in paths:
    *lead, fan_in, fan_out = flat[f'{path}/kernel'].shape
    ranks = [rank] if isinstance(rank, int) else rank[path]
    largest = max(ranks)
    if largest > max(fan_in, fan_out):
      raise UserError(
        f'rank {largest} is more than {path} has ({fan_in} x {fan_out}); '
        f'give at most {max(fan_in, fan_out)}'
      )
    bound = fan_in**-0.5
    module_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    a = jax.random.uniform(module_key, (*lead, fan_in, largest), jnp.float32, -bound, bound)
    if min(ranks) < largest:
      in_use_LR = np.arange(largest) < np.asarray(ranks)[:, None]
      a = a * in_use_LR[:, None]
    adapters[f'{path}/a'] = a
    adapters[f'{path}/b'] = jnp.zeros((*lead, largest, fan_out), jnp.float32)
  return unflatten_dict(adapters, sep='/')


def attach(
  params: Params,
  adapters: Params,
  scale: Scale,
  dropout_key: jax.Array | None = None,
  dropout_rate: float = 0.0,
) -> dict:
  """Puts adapters onto their kernels; nothing is computed and no base array is copied.

  Args:
    params: the base.
    adapters: from `init`, or trained.
    scale: alpha / rank of every module, or for each path one for each layer.
    dropout_key: a key while training with dropout; None otherwise.
    dropout_rate: share of an adapter's input that is dropped, where there is a key.

  Returns:
    The base's tree with a `LoraKernel` in place of each adapted kernel.
  """
  flat = _flatten(params)
  for path, a, b in _modules(adapters):
    w = flat[f'{path}/kernel']
    # Leading axes (layers) must be on every leaf, so that `scan` can take one off.
    lead = a.shape[:-2]
    module_key = None
    if dropout_key is not None and dropout_rate > 0:
      module_key = jax.random.fold_in(dropout_key, zlib.crc32(path.encode()))
      if lead:
        module_key = jax.random.split(module_key, lead)
    scales = jnp.broadcast_to(jnp.asarray(_of(scale, path), jnp.float32), lead)
    flat[f'{path}/kernel'] = LoraKernel(w, a, b, scales, module_key, dropout_rate)
  return unflatten_dict(flat, sep='/')


def merge(params: Params, adapters: Params, scale: Scale) -> dict:
  """Adds each adapter into its kernel, in float32: for export, never for training.

  Rounding `w + scale * a @ b` to bfloat16 loses most of a small update, so adapted
  kernels come back float32 and the caller decides what to do about it.

  Args:
    params: the base.
    adapters: the adapter.
    scale: alpha / rank of every module, or for each path one for each layer.

  Returns:
    Plain parameters.
  """
  flat = _flatten(params)
  for path, a, b in _modules(adapters):
    w = dense(flat[f'{path}/kernel'], jnp.float32)
    update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    scales = jnp.broadcast_to(jnp.asarray(_of(scale, path), jnp.float32), a.shape[:-2])
    flat[f'{path}/kernel'] = w + scales[..., None, None] * update
  return unflatten_dict(flat, sep='/')


def specs(param_specs: Params, adapters: Params) -> dict:
  """Shardings of an adapter from its base's.

  A takes its kernel's sharding of the input axis, B that of the output axis, so the
  low-rank products need no collective that the base's product does not need.

  Args:
    param_specs: the base's tree with a `PartitionSpec` of full rank at each leaf.
    adapters: the adapter, or its shapes.

  Returns:
    The adapter's tree of `PartitionSpec`.
  """
  flat = _flatten(param_specs)
  out = {}
  for path, _, _ in _modules(adapters):
    *lead, in_axis, out_axis = flat[f'{path}/kernel']
    out[f'{path}/a'] = PartitionSpec(*lead, in_axis, None)
    out[f'{path}/b'] = PartitionSpec(*lead, None, out_axis)
  return unflatten_dict(out, sep='/')


@dataclasses.dataclass(frozen=True)
class Summary:
  """What an adapter is made of.

  Attributes:
    modules: paths of the adapted modules.
    trainable_params: numbers in the adapter, over all layers.
    adapter_bytes: its size in memory and on disk, without any file's header.
  """

  modules: tuple[str, ...]
  trainable_params: int
  adapter_bytes: int

  def __str__(self) -> str:
    names = ', '.join(path.rsplit('/', 1)[-1] for path in self.modules)
    return (
      f'{names}: {self.trainable_params:,} trainable parameters, '
      f'{self.adapter_bytes / 2**20:.2f} MiB'
    )


def summarise(adapters: Params) -> Summary:
  """Counts an adapter, or its shapes."""
  leaves = jax.tree.leaves(adapters)
  return Summary(
    modules=tuple(path for path, _, _ in _modules(adapters)),
    trainable_params=sum(leaf.size for leaf in leaves),
    adapter_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
  )


def _of(scale: Scale, path: str) -> Any:
  return scale[path] if isinstance(scale, Mapping) else scale


def _modules(adapters: Params) -> list[tuple[str, Any, Any]]:
  """(path, a, b) of each adapted module."""
  flat = _flatten(adapters)
  paths = [path.removesuffix('/a') for path in flat if path.endswith('/a')]
  return [(path, flat[f'{path}/a'], flat[f'{path}/b']) for path in paths]


def _flatten(tree: Params) -> dict[str, Any]:
  """Leaves by path; a `LoraKernel` or a `PartitionSpec` is a leaf too."""
  return dict(flatten_dict(tree, sep='/'))

"""LoRA as a transform of the parameter tree.

An adapter is a sparse mirror of the parameters: for each adapted module
`layers/attn/o_proj/kernel` (L, in, out) it holds `layers/attn/o_proj/{a, b}` of
shapes (L, in, R) and (L, R, out), in float32 whatever the base is. `attach` puts
adapter and kernel together where the kernel stood; the model never hears of it.

  paths = resolve('o_proj,fc2', params)
  adapters = init(key, params, paths, rank=16)
  hidden, _ = model.apply({'params': attach(params, adapters, scale=2.0)}, tokens)

The rest of the family is more leaves of the same mirror, each there or not:

  .../o_proj/m         (L, out)    learned length of each output's weights (DoRA);
                                   0 in a layer that has no adapter
  .../o_proj/{a0, b0}  like a, b   where A and B began, frozen; the kernel goes without
                                   their product (PiSSA)
  .../qkv_proj/a                   one A for q_proj, k_proj and v_proj, which then hold
                                   b alone (fused); all three B are one over their outputs
  norm/scale, .../bias             anything named as in the base takes its leaf's place
"""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from lora_jax import targets
from lora_jax.errors import UserError
from lora_jax.kernels import LoraKernel, dense, lengths
from lora_jax.targets import GROUPS, canonical, resolve, split, targetable

__all__ = [
  'GROUPS', 'canonical', 'resolve', 'split', 'targetable',
  'init', 'attach', 'merge', 'split_fused', 'specs', 'summarise',
  'Module', 'modules', 'replaced', 'scales_of', 'gain', 'Summary',
]  # fmt: skip

Params = Mapping[str, Any]

# One for all modules, or path -> one for each layer.
Scale = float | jax.Array | Mapping[str, Sequence[float] | np.ndarray]

# Leaves of a module; every other leaf of an adapter replaces one of the base.
_OWN = ('a', 'b', 'm', 'a0', 'b0')
_FROZEN = ('a0', 'b0')


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
    shapes = {part: flat[f'{part}/kernel'].shape for part in targets.parts(path)}
    *lead, fan_in, _ = next(iter(shapes.values()))
    fan_out = sum(shape[-1] for shape in shapes.values())
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
    for part, shape in shapes.items():
      adapters[f'{part}/b'] = jnp.zeros((*lead, largest, shape[-1]), jnp.float32)
  return unflatten_dict(adapters, sep='/')


def attach(
  params: Params,
  adapters: Params,
  scale: Scale,
  dropout_key: jax.Array | None = None,
  dropout_rate: float = 0.0,
  may_be_idle: bool = False,
) -> dict:
  """Puts adapters onto their kernels; no base array is copied.

  Nothing is computed either, but for the lengths that DoRA divides by.

  Args:
    params: the base.
    adapters: from `init` or `lora_family.init`, or trained.
    scale: alpha / rank of every module, or for each path one for each layer.
    dropout_key: a key while training with dropout, or (B,) keys, one for each row of the
      batch, whose dropout then depends on no other row; None otherwise.
    dropout_rate: share of an adapter's input that is dropped, where there is a key.
    may_be_idle: whether some modules may have a scale of 0, which are then to cost nothing;
      see `LoraKernel.used`.

  Returns:
    The base's tree with a `LoraKernel` in place of each adapted kernel.
  """
  flat = _flatten(params) | replaced(adapters)
  for path, module in modules(adapters).items():
    w, leaves = flat[f'{path}/kernel'], module.leaves
    scales = scales_of(scale, module)
    if 'a0' in leaves:
      began = jax.lax.stop_gradient((leaves['a0'], leaves['b0']))
      w = LoraKernel(w, *began, -scales)
    pair = leaves['a'], leaves['b'], scales
    of_outputs = gain(LoraKernel(w, *pair), leaves['m']) if 'm' in leaves else None
    keys = None
    if dropout_key is not None and dropout_rate > 0:
      # The parts of a fused module see one input, and so drop the same of it.
      keys = _dropout_keys(dropout_key, module.owner, scales.shape)
    used = scales != 0 if may_be_idle else None
    flat[f'{path}/kernel'] = LoraKernel(w, *pair, keys, dropout_rate, of_outputs, used)
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
    The base's tree; a quantised kernel without an adapter stays what it is.
  """
  flat = _flatten(attach(params, adapters, scale))
  for path in modules(adapters):
    flat[f'{path}/kernel'] = dense(flat[f'{path}/kernel'], jnp.float32)
  return unflatten_dict(flat, sep='/')


def split_fused(adapters: Params) -> dict:
  """The same function with an A for every module: what fused ones share, each gets whole."""
  flat = replaced(adapters)
  for path, module in modules(adapters).items():
    flat |= {f'{path}/{name}': leaf for name, leaf in module.leaves.items()}
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
  out = {path: flat[path] for path in replaced(adapters)}
  for path, module in modules(adapters).items():
    *lead, in_axis, out_axis = flat[f'{path}/kernel']
    of = {'a': (in_axis, None), 'b': (None, out_axis), 'm': (out_axis,)}
    of |= {'a0': of['a'], 'b0': of['b']}
    for name in module.leaves:
      holder = module.owner if name in ('a', 'a0') else path
      out[f'{holder}/{name}'] = PartitionSpec(*lead, *of[name])
  return unflatten_dict(out, sep='/')


@dataclasses.dataclass(frozen=True)
class Module:
  """What an adapter holds for one kernel.

  Attributes:
    owner: path of the module as it was targeted: the kernel's own, or a fused one's.
    leaves: 'a' and 'b', and 'm', 'a0', 'b0' where there are such.
  """

  owner: str
  leaves: Mapping[str, Any]


def modules(adapters: Params) -> dict[str, Module]:
  """Path of each adapted kernel's module -> what the adapter holds for it."""
  flat = _flatten(adapters)
  found = {}
  for path in (path.removesuffix('/b') for path in flat if path.endswith('/b')):
    owner = path if f'{path}/a' in flat else targets.fused(path)
    held = {name: flat.get(f'{path}/{name}', flat.get(f'{owner}/{name}')) for name in _OWN}
    found[path] = Module(str(owner), {name: x for name, x in held.items() if x is not None})
  return found


def replaced(adapters: Params) -> dict[str, Any]:
  """Path -> leaf of all that takes the place of the base's own: norms and biases."""
  return {path: leaf for path, leaf in _flatten(adapters).items() if not _is_own(path)}


def scales_of(scale: Scale, module: Module) -> jax.Array:
  """The factor on a module's low-rank product, with the leading axes of its leaves.

  Layers must be on every leaf of a kernel, so that `scan` can take one off.
  """
  own = scale[module.owner] if isinstance(scale, Mapping) else scale
  return jnp.broadcast_to(jnp.asarray(own, jnp.float32), module.leaves['a'].shape[:-2])


@dataclasses.dataclass(frozen=True)
class Summary:
  """What an adapter is made of.

  Attributes:
    modules: paths of the adapted modules, and of norms and biases that train too.
    trainable_params: numbers that train, over all layers.
    adapter_bytes: its size without any file's header.
  """

  modules: tuple[str, ...]
  trainable_params: int
  adapter_bytes: int

  def __str__(self) -> str:
    names = ', '.join(targets.label(path) for path in self.modules)
    return (
      f'{names}: {self.trainable_params:,} trainable parameters, '
      f'{self.adapter_bytes / 2**20:.2f} MiB'
    )


def summarise(adapters: Params, ranks: Mapping[str, Sequence[int]] | None = None) -> Summary:
  """Counts an adapter, or its shapes.

  Args:
    adapters: the adapter.
    ranks: path -> rank of each layer, where some are less than R: zeros are not counted.
  """
  flat = _flatten(adapters)
  owners = {path: module.owner for path, module in modules(adapters).items()}
  owners |= {owner: owner for owner in owners.values()}

  def numbers(path: str) -> int:
    parent, name = path.rsplit('/', 1)
    if ranks is None or not _is_own(path):
      return flat[path].size
    held = ranks[owners[parent]]
    # By layer: what one column of A or row of B, or one magnitude vector, comes to.
    many = np.count_nonzero(held) if name == 'm' else sum(held)
    one = flat[path].shape[1] if name in ('a', 'a0') else flat[path].shape[-1]
    return int(many) * one

  return Summary(
    modules=(*dict.fromkeys(owners.values()), *replaced(adapters)),
    trainable_params=sum(numbers(path) for path in flat if _name(path) not in _FROZEN),
    adapter_bytes=sum(numbers(path) * leaf.dtype.itemsize for path, leaf in flat.items()),
  )


def _dropout_keys(key: jax.Array, owner: str, layers: tuple[int, ...]) -> jax.Array:
  """A module's keys: those of its layers first, then of rows, where rows have their own."""

  def of_layers(key):
    own = jax.random.fold_in(key, zlib.crc32(owner.encode()))
    return jax.random.split(own, layers) if layers else own

  if not key.ndim:
    return of_layers(key)
  # What sees images does not see the rows of the batch.
  return of_layers(key[0]) if targets.is_sight(owner) else jax.vmap(of_layers, 0, -1)(key)


def gain(kernel: LoraKernel, m: jax.Array) -> jax.Array:
  """Learned over actual length of each output's weights (Liu et al. 2024, equation 5).

  It is 1 in a layer without an adapter, whose `m` is 0. The actual one counts as a constant
  in the gradient (section 4.3), as in PEFT.
  """
  actual = lengths(jax.lax.stop_gradient(kernel))
  adapted = jnp.broadcast_to(jnp.any(m != 0, axis=-1, keepdims=True), m.shape)
  return jnp.where(adapted, m / jnp.where(actual == 0, 1, actual), 1)


def _name(path: str) -> str:
  return path.rsplit('/', 1)[-1]


def _is_own(path: str) -> bool:
  return _name(path) in _OWN


def _flatten(tree: Params) -> dict[str, Any]:
  """Leaves by path; a `LoraKernel` or a `PartitionSpec` is a leaf too."""
  return dict(flatten_dict(tree, sep='/'))

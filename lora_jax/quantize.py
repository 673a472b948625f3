"""Quantises a frozen base: its blocks' kernels in four or eight bits a weight.

  params = store(base.params, jnp.bfloat16, 'nf4')
  print(footprint(params))   # 210 kernels, 106,168,320 weights in 56.95 MiB, ...
  attached = lora.attach(params, adapters, scale=2.0)

Embeddings, norms, biases and the head stay arrays. Adapters are made, attached and
trained on such a tree as on any other (QLoRA, Dettmers et al. 2023); `lora.merge` gives
float32 kernels, since an update rounded back into four bits is mostly lost.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax import lora, sharding, targets
from lora_jax.errors import UserError
from lora_jax.kernels import LoraKernel, dense
from lora_jax.quantized import Int4Kernel, Int8Kernel, Nf4Kernel, QuantizedKernel

Params = Mapping[str, Any]

KINDS = {'nf4': Nf4Kernel, 'int4': Int4Kernel, 'int8': Int8Kernel}


def store(params: Params, dtype: jax.typing.DTypeLike, kind: str = 'none') -> dict:
  """Puts a base on the device, or on those of the current mesh, as runs keep it there.

  Args:
    params: the base, float32; numpy arrays will do.
    dtype: of everything that is not quantised.
    kind: how the blocks' kernels are stored: 'none' (in `dtype`), or one of `KINDS`.

  Raises:
    UserError: as `quantize`.
  """
  if kind != 'none':
    params = quantize(params, kind)
  mesh = sharding.current()
  # What numpy holds is cast while it is placed, a part at a time.
  waits = lambda leaf: mesh is not None and isinstance(leaf, np.ndarray)
  put = lambda leaf: leaf if _is_quantized(leaf) or waits(leaf) else jnp.asarray(leaf, dtype)
  put_all = jax.tree.map(put, dict(params), is_leaf=_is_quantized)
  if mesh is None:
    return put_all
  return sharding.place(put_all, sharding.base_shardings(put_all, mesh), dtype)


def quantize(params: Params, kind: str, paths: Iterable[str] | None = None) -> dict:
  """Quantises kernels, a layer at a time, so that no second whole copy is ever made.

  Args:
    params: the base, as exact as there is one; its shapes under `jax.eval_shape`.
    kind: one of `KINDS`.
    paths: modules whose kernels are quantised; None: all Dense modules in the blocks of
      the language model.

  Returns:
    The same tree with quantised kernels in place of those kernels.

  Raises:
    UserError: the kind is unknown, or a path holds no array to quantise.
  """
  if kind not in KINDS:
    raise UserError(f'cannot quantise to {kind!r}; give {", ".join(KINDS)}')
  flat: dict[str, Any] = dict(flatten_dict(params, sep='/'))
  for path in targets.language(params) if paths is None else paths:
    kernel = flat.get(f'{path}/kernel')
    if kernel is None:
      raise UserError(
        f'no kernel to quantise at {path!r}; there are {", ".join(lora.targetable(params))}'
      )
    if isinstance(kernel, QuantizedKernel | LoraKernel):
      raise UserError(
        f'{path} holds a {type(kernel).__name__}; quantise a plain base, once, and attach '
        'adapters to the result'
      )
    flat[f'{path}/kernel'] = _by_layer(kind, kernel)
  return unflatten_dict(flat, sep='/')


def dequantize(params: Params, dtype: jax.typing.DTypeLike) -> dict:
  """A tree without quantised kernels: each is the array, of `dtype`, that it stood for."""
  put = lambda leaf: dense(leaf, dtype) if _is_quantized(leaf) else leaf
  return jax.tree.map(put, dict(params), is_leaf=_is_quantized)


@dataclasses.dataclass(frozen=True)
class Footprint:
  """What quantised kernels take.

  Attributes:
    kernels: how many, each layer's counted.
    weights: numbers that they stand for.
    stored_bytes: size of their arrays.
  """

  kernels: int
  weights: int
  stored_bytes: int

  @property
  def of_float16(self) -> float:
    """Their size over that of as many weights in float16."""
    return self.stored_bytes / (2 * self.weights)

  def __str__(self) -> str:
    return (
      f'{self.kernels:,} kernels, {self.weights:,} weights in '
      f'{self.stored_bytes / 2**20:,.2f} MiB, {self.of_float16:.2f} of float16'
    )


def footprint(params: Params) -> Footprint:
  """Measures a tree's quantised kernels, or their shapes; there is at least one."""
  leaves = jax.tree.leaves(dict(params), is_leaf=_is_quantized)
  kernels = [leaf for leaf in leaves if _is_quantized(leaf)]
  arrays = jax.tree.leaves(kernels)
  return Footprint(
    kernels=sum(math.prod(kernel.shape[:-2]) for kernel in kernels),
    weights=sum(math.prod(kernel.shape) for kernel in kernels),
    stored_bytes=sum(array.size * array.dtype.itemsize for array in arrays),
  )


def _is_quantized(leaf: Any) -> bool:
  return isinstance(leaf, QuantizedKernel)


def _by_layer(kind: str, kernel: Any) -> QuantizedKernel:
  lead = kernel.shape[:-2]
  layers = [_one(kind, jnp.asarray(kernel[at])) for at in np.ndindex(*lead)]
  together = lambda *leaves: jnp.stack(leaves).reshape(*lead, *leaves[0].shape)
  return jax.tree.map(together, *layers)


@functools.partial(jax.jit, static_argnums=0)
def _one(kind: str, kernel: jax.Array) -> QuantizedKernel:
  return KINDS[kind].quantize(kernel)

"""`dot` and the kinds of kernel it can multiply by.

A kernel is whatever stands at a Dense module's `kernel` leaf: an array, or a pytree
node such as `LoraKernel` or a quantised kernel. The model calls `dot(x, kernel)` and
never asks which; `jit`, `scan`, `remat`, `vmap` and sharding see ordinary pytrees of
arrays.

>>> import jax.numpy as jnp
>>> w, a, b = jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.zeros((2, 3))
>>> x = jnp.ones((1, 4))
>>> bool((dot(x, LoraKernel(w, a, b, jnp.float32(2.0))) == dot(x, w)).all())
True
"""

import functools
from typing import TypeAlias

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.quantized import QuantizedKernel, frozen_product

Kernel: TypeAlias = 'jax.Array | QuantizedKernel | LoraKernel'


@flax.struct.dataclass
class LoraKernel:
  """A frozen kernel and the low-rank update that is added to its product.

  Computes `x @ w + scale * (dropout(x) @ a) @ b` (Hu et al. 2021, equation 3)
  without ever forming `a @ b`. Every leaf may carry leading axes that `scan` or
  `vmap` strips before `dot` sees it.

  Attributes:
    w: the base kernel, (in, out); any kind that `dot` accepts.
    a: (in, R), float32.
    b: (R, out), float32.
    scale: scalar, usually alpha / R.
    dropout_key: a PRNG key where the adapter's input is dropped out (training), or
      None (evaluation).
    dropout_rate: share of the input's entries that are dropped; read only where
      there is a key.
  """

  w: Kernel
  a: jax.Array
  b: jax.Array
  scale: jax.Array
  dropout_key: jax.Array | None = None
  dropout_rate: float = flax.struct.field(pytree_node=False, default=0.0)


def dot(x: jax.Array, kernel: Kernel, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
  """Multiplies `x` (..., in) by a kernel (in, out) of any kind, in the dtype of `x`.

  Args:
    x: activations, (..., in).
    kernel: an array, a quantised kernel, or a `LoraKernel`, whose adapters are cast to
      the dtype of `x` for the product while they and their gradients stay float32.
    dtype: what the sums are kept in; None: rounded to the dtype of `x`.

  Returns:
    (..., out), of `dtype`.
  """
  if isinstance(kernel, QuantizedKernel):
    return frozen_product(x, kernel, dtype or x.dtype)
  product = functools.partial(jnp.matmul, preferred_element_type=dtype or x.dtype)
  if not isinstance(kernel, LoraKernel):
    return product(x, kernel.astype(x.dtype))
  base = dot(x, kernel.w, dtype)
  if kernel.dropout_key is not None:
    keep = jax.random.bernoulli(kernel.dropout_key, 1.0 - kernel.dropout_rate, x.shape)
    x = jnp.where(keep, x / (1.0 - kernel.dropout_rate), 0).astype(x.dtype)
  low = jnp.matmul(x, kernel.a.astype(x.dtype))
  # The scale goes on the narrow (..., R) product, where it costs least.
  low = low * kernel.scale.astype(x.dtype)
  return base + product(low, kernel.b.astype(x.dtype))


def dense(kernel: jax.Array | QuantizedKernel, dtype: jax.typing.DTypeLike) -> jax.Array:
  """A base kernel, quantised or not, as one array (..., in, out): for norms and merging."""
  if isinstance(kernel, QuantizedKernel):
    return kernel.dequantize(dtype)
  return kernel.astype(dtype)

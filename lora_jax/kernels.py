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

import dataclasses
import functools
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.bank_kernel import BankKernel, add_updates
from lora_jax.quantized import QuantizedKernel, frozen_product

Kernel: TypeAlias = 'jax.Array | QuantizedKernel | TableKernel | LoraKernel | BankKernel'


@flax.struct.dataclass
class TableKernel:
  """A table of embeddings as the kernel of a tied head: (out, in), multiplied as it lies.

  As an array it would be a transposed view, of which loops make a copy.
  """

  table: jax.Array


@flax.struct.dataclass
class LoraKernel:
  """A frozen kernel and the low-rank update that is added to its product.

  Computes `gain * (x @ w + scale * (dropout(x) @ a) @ b)` (Hu et al. 2021, equation 3;
  gain: Liu et al. 2024, equation 5) without ever forming `a @ b`. Every leaf may carry
  leading axes that `scan` or `vmap` strips before `dot` sees it.

  Attributes:
    w: the base kernel, (in, out); any kind that `dot` accepts.
    a: (in, R), float32.
    b: (R, out), float32.
    scale: scalar, usually alpha / R.
    dropout_key: a PRNG key where the adapter's input is dropped out (training), or one for
      each entry of its first axis; None (evaluation).
    dropout_rate: share of the input's entries that are dropped; read only where
      there is a key.
    gain: (out,), float32, what each output is multiplied by (DoRA), or None.
    used: bool scalar, whether there is an update at all: one of zeros, as a cell of a union
      tree has, is then neither computed nor pulled back. Not for `vmap`, under which both
      ways would be gone. None: there is one.
  """

  w: Kernel
  a: jax.Array
  b: jax.Array
  scale: jax.Array
  dropout_key: jax.Array | None = None
  dropout_rate: float = flax.struct.field(pytree_node=False, default=0.0)
  gain: jax.Array | None = None
  used: jax.Array | None = None


def dot(x: jax.Array, kernel: Kernel, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
  """Multiplies `x` (..., in) by a kernel (in, out) of any kind, in the dtype of `x`.

  Args:
    x: activations, (..., in).
    kernel: an array, a quantised kernel, a `TableKernel`, a `LoraKernel`, whose adapters are
      cast to the dtype of `x` for the product while they and their gradients stay float32, or
      a `BankKernel`, which has an adapter for each entry of the first axis of `x`.
    dtype: what the sums are kept in; None: rounded to the dtype of `x`.

  Returns:
    (..., out), of `dtype`.
  """
  if isinstance(kernel, QuantizedKernel):
    return frozen_product(x, kernel, dtype or x.dtype)
  if isinstance(kernel, BankKernel):
    return add_updates(dot(x, kernel.w, dtype), x, kernel, dtype or x.dtype)
  product = functools.partial(jnp.matmul, preferred_element_type=dtype or x.dtype)
  if isinstance(kernel, TableKernel):
    return product(x, kernel.table.astype(x.dtype).T)
  if not isinstance(kernel, LoraKernel):
    return product(x, kernel.astype(x.dtype))
  if x.ndim > 2:
    # The gradients of A and B sum over all leading axes. As one axis that is a matrix product
    # like any other; over two, XLA on a CPU takes several times as long.
    flat = dot(x.reshape(-1, x.shape[-1]), kernel, dtype)
    return flat.reshape(*x.shape[:-1], flat.shape[-1])
  if kernel.used is not None:
    nothing: Any = dict.fromkeys(('a', 'b', 'gain'))
    rest = dataclasses.replace(kernel, **nothing)
    return _unless_idle(dtype or x.dtype, x, kernel.a, kernel.b, kernel.gain, rest)
  base = dot(x, kernel.w, dtype)
  seen = x
  if kernel.dropout_key is not None:
    keep = _kept(kernel.dropout_key, 1.0 - kernel.dropout_rate, x)
    seen = jnp.where(keep, x / (1.0 - kernel.dropout_rate), 0).astype(x.dtype)
  low = jnp.matmul(seen, kernel.a.astype(x.dtype))
  # The scale goes on the narrow (..., R) product, where it costs least.
  low = low * kernel.scale.astype(x.dtype)
  update = product(low, kernel.b.astype(x.dtype))
  if kernel.gain is None:
    return base + update
  # What the gain adds to the base is the adapter's too, so dropout reaches it, as in PEFT.
  of_base = base if seen is x else dot(seen, kernel.w, dtype)
  # In float32: a gain rounded to bfloat16 could not leave 1 by little.
  gain = jnp.broadcast_to(kernel.gain, base.shape)
  return (base + (gain - 1) * of_base + gain * update).astype(base.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unless_idle(dtype, x, a, b, gain, rest: LoraKernel) -> jax.Array:
  """`dot` by one of two branches; its gradient takes the same, which `cond` alone does not.

  Differentiating `cond` would keep for the backward pass what either branch wants kept.
  """
  return jax.lax.cond(rest.used, *_branches(dtype), x, a, b, gain, rest)


def _unless_idle_forward(dtype, *arguments):
  return _unless_idle(dtype, *arguments), arguments


def _unless_idle_backward(dtype, held, gradient):
  def pulled(branch):
    def of(gradient, *held):
      *differentiable, rest = held
      return jax.vjp(lambda *some: branch(*some, rest), *differentiable)[1](gradient)

    return of

  return *jax.lax.cond(held[-1].used, *map(pulled, _branches(dtype)), gradient, *held), None


_unless_idle.defvjp(_unless_idle_forward, _unless_idle_backward)


def _branches(dtype):
  """The product with the update, and without."""

  def adapted(x, a, b, gain, rest):
    return dot(x, dataclasses.replace(rest, a=a, b=b, gain=gain, used=None), dtype)

  return adapted, lambda x, a, b, gain, rest: dot(x, rest.w, dtype)


def _kept(key: jax.Array, share: float, x: jax.Array) -> jax.Array:
  """Which entries of `x` (..., in) stay; several keys have the same number of rows each."""
  keys = key.reshape(-1)
  shape = (x.size // x.shape[-1] // keys.size, x.shape[-1])
  return jax.vmap(lambda key: jax.random.bernoulli(key, share, shape))(keys).reshape(x.shape)


def dense(kernel: Kernel, dtype: jax.typing.DTypeLike) -> jax.Array:
  """The matrix (..., in, out) that a kernel of any kind multiplies by, dropout aside.

  An adapter is added in float32, whatever `dtype` the result then has. A `BankKernel` is as
  many matrices as it has slots, and none is meant.
  """
  if isinstance(kernel, BankKernel):
    raise TypeError('a bank of adapters is no one matrix')
  if isinstance(kernel, QuantizedKernel):
    return kernel.dequantize(dtype)
  if isinstance(kernel, TableKernel):
    return kernel.table.astype(dtype).T
  if not isinstance(kernel, LoraKernel):
    return kernel.astype(dtype)
  # An adapter from elsewhere may be stored in bfloat16, and its product is not to be.
  a, b = kernel.a.astype(jnp.float32), kernel.b.astype(jnp.float32)
  update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  whole = dense(kernel.w, jnp.float32) + kernel.scale[..., None, None] * update
  if kernel.gain is not None:
    whole = whole * kernel.gain[..., None, :]
  return whole.astype(dtype)


# Compiled once for kernels of one shape: a loop outside of `jit` is compiled anew each time.
@jax.jit
def lengths(kernel: LoraKernel) -> jax.Array:
  """Euclidean length of the weights of each output, (..., out), in float32.

  Layers are taken one after the other, so that only one is dense at a time.
  """
  length = lambda one: jnp.linalg.norm(dense(one, jnp.float32), axis=-2)
  return jax.lax.map(length, kernel) if kernel.a.ndim > 2 else length(kernel)

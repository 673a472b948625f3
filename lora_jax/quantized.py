"""Frozen kernels in four or eight bits a weight, for `dot`.

A quantised kernel is a pytree of arrays that all have the rank of the kernel they stand
for, layers first, so `scan`, `remat`, `vmap` and sharding treat it like one; `shape` and
`dtype` are those of that kernel. Only the gradient of the product's other side exists.

  kernel = Int4Kernel.quantize(w)                 # 0.29 of the bytes of float16
  y = frozen_product(x, kernel, x.dtype)          # x @ kernel.dequantize(x.dtype)
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# Weights of one output that share a scale in NF4.
BLOCK = 64
# And in 4-bit integers.
INT4_BLOCK = 32

# The 16 values of NF4 (Dettmers et al. 2023, appendix E): quantiles of a normal
# distribution, zero among them, scaled to end at -1 and 1.
NF4_LEVELS = (
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
)


@flax.struct.dataclass
class Nf4Kernel:
  """A kernel (..., in, out) in 4-bit normal floats (Dettmers et al. 2023, section 3).

  The weight from input i to output j is the level of its code times the largest
  magnitude of its block, which is 64 inputs of one output; the last block is shorter
  where 64 does not divide `in`.

  Attributes:
    codes: (..., ceil(in / 2), out) uint8: inputs 2i in the low four bits, 2i + 1 in the
      high ones.
    absmax: (..., ceil(in / 64), out) float32, of each block.
    fan_in: in.
  """

  codes: jax.Array
  absmax: jax.Array
  fan_in: int = flax.struct.field(pytree_node=False)

  @classmethod
  def quantize(cls, w: jax.Array) -> 'Nf4Kernel':
    """The nearest level for each weight of `w` (..., in, out)."""
    *lead, fan_in, fan_out = w.shape
    padding = -fan_in % BLOCK
    room = [(0, 0)] * len(lead) + [(0, padding), (0, 0)]
    blocks = jnp.pad(w.astype(jnp.float32), room).reshape(*lead, -1, BLOCK, fan_out)
    absmax = jnp.max(jnp.abs(blocks), axis=-2)
    relative = _over(blocks, absmax[..., None, :])
    codes = jnp.zeros(relative.shape, jnp.uint8)
    for bound in _nf4_bounds():
      codes += relative > bound
    return cls(_pack(codes.reshape(*lead, -1, fan_out), fan_in), absmax, fan_in)

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.codes.shape[:-2], self.fan_in, self.codes.shape[-1])

  @property
  def dtype(self) -> jnp.dtype:
    return self.absmax.dtype

  def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The kernel (..., in, out) that this one stands for, computed in float32."""
    codes = _unpack(self.codes, self.fan_in)
    absmax = _spread(self.absmax, BLOCK, self.fan_in)
    # A table, not a choice for each bit: with those XLA's training step on a CPU wanted
    # more room than all decoded kernels together, and decoding took half as long again.
    levels = jnp.take(jnp.asarray(NF4_LEVELS, jnp.float32), codes, mode='clip')
    return (levels * absmax).astype(dtype)


@flax.struct.dataclass
class Int4Kernel:
  """A kernel (..., in, out) in 4-bit integers between the ends of each block of weights.

  A block is 32 inputs of one output, as in GGUF's Q4_1: a weight is its block's lowest
  plus its code times its block's step. Lowest and step are kept in eight bits, relative
  to the largest of their output (double quantisation, Dettmers et al. 2023, section 3).
  A base that was dequantised from Q4_1 comes back almost as it was: its weights lie on
  such a grid already.

  Attributes:
    codes: (..., ceil(in / 2), out) uint8: inputs 2i in the low four bits, 2i + 1 in the
      high ones.
    steps: (..., ceil(in / 32), out) uint8, of each block.
    lows: (..., ceil(in / 32), out) int8, of each block.
    units: (..., 2, out) float32: what a step of 1 and a lowest of 1 stand for.
    fan_in: in.
  """

  codes: jax.Array
  steps: jax.Array
  lows: jax.Array
  units: jax.Array
  fan_in: int = flax.struct.field(pytree_node=False)

  @classmethod
  def quantize(cls, w: jax.Array) -> 'Int4Kernel':
    """The nearest code for each weight of `w` (..., in, out)."""
    *lead, fan_in, fan_out = w.shape
    # The last weight again, where a block is short: zeros could lie outside its ends.
    room = [(0, 0)] * len(lead) + [(0, -fan_in % INT4_BLOCK), (0, 0)]
    padded = jnp.pad(w.astype(jnp.float32), room, mode='edge')
    blocks = padded.reshape(*lead, -1, INT4_BLOCK, fan_out)
    low, high = blocks.min(-2), blocks.max(-2)
    step = (high - low) / 15
    step_unit = step.max(-2, keepdims=True) / 255
    low_unit = jnp.abs(low).max(-2, keepdims=True) / 127
    steps = jnp.round(_over(step, step_unit)).astype(jnp.uint8)
    lows = jnp.round(_over(low, low_unit)).astype(jnp.int8)
    # Codes of the steps as they are kept, so that their rounding is made up for.
    above = blocks - (lows * low_unit)[..., None, :]
    codes = jnp.clip(jnp.round(_over(above, (steps * step_unit)[..., None, :])), 0, 15)
    codes = codes.astype(jnp.uint8).reshape(*lead, -1, fan_out)
    units = jnp.concatenate([step_unit, low_unit], axis=-2)
    return cls(_pack(codes, fan_in), steps, lows, units, fan_in)

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.codes.shape[:-2], self.fan_in, self.codes.shape[-1])

  @property
  def dtype(self) -> jnp.dtype:
    return self.units.dtype

  def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The kernel (..., in, out) that this one stands for, computed in float32."""
    step_unit, low_unit = jnp.split(self.units, 2, axis=-2)
    step = _spread(self.steps * step_unit, INT4_BLOCK, self.fan_in)
    low = _spread(self.lows * low_unit, INT4_BLOCK, self.fan_in)
    return (_unpack(self.codes, self.fan_in) * step + low).astype(dtype)


@flax.struct.dataclass
class Int8Kernel:
  """A kernel (..., in, out) in 8-bit integers, with one scale for each output.

  Attributes:
    codes: (..., in, out) int8, from -127 to 127.
    step: (..., 1, out) float32: the weight that a code of 1 stands for.
  """

  codes: jax.Array
  step: jax.Array

  @classmethod
  def quantize(cls, w: jax.Array) -> 'Int8Kernel':
    """The nearest code for each weight of `w` (..., in, out)."""
    w = w.astype(jnp.float32)
    step = jnp.max(jnp.abs(w), axis=-2, keepdims=True) / 127
    codes = jnp.round(_over(w, step))
    return cls(codes.astype(jnp.int8), step)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  @property
  def dtype(self) -> jnp.dtype:
    return self.step.dtype

  def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The kernel (..., in, out) that this one stands for, computed in float32."""
    return (self.codes * self.step).astype(dtype)


QuantizedKernel = Nf4Kernel | Int4Kernel | Int8Kernel


def frozen_product(x: jax.Array, kernel: QuantizedKernel, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Multiplies `x` (..., in) by a kernel that is decoded for the moment of the product.

  The gradient of `x` decodes the kernel again, so that no decoded one outlives a layer
  in training; the kernel itself is frozen and has none (reverse mode, once).

  Args:
    x: activations; the kernel is decoded to their dtype.
    kernel: (in, out).
    dtype: of the result.

  Returns:
    (..., out).
  """
  return _product(jnp.dtype(x.dtype), jnp.dtype(dtype), x, kernel)


def _times(x: jax.Array, w: jax.Array, dtype: np.dtype) -> jax.Array:
  return jnp.matmul(x, w, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(x_dtype, dtype, x, kernel):
  return _times(x, kernel.dequantize(x_dtype), dtype)


def _product_forward(x_dtype, dtype, x, kernel):
  return _product(x_dtype, dtype, x, kernel), kernel


def _product_backward(x_dtype, dtype, kernel, gradient):
  w = kernel.dequantize(x_dtype)
  x = jax.ShapeDtypeStruct((*gradient.shape[:-1], w.shape[-2]), x_dtype)
  # In the dtypes of the plain product's gradient.
  (x_gradient,) = jax.linear_transpose(lambda x: _times(x, w, dtype), x)(gradient)
  return x_gradient, None


_product.defvjp(_product_forward, _product_backward)


def _over(x: jax.Array, unit: jax.Array) -> jax.Array:
  """Divides by a unit; a block of zeros is exact whatever it is divided by."""
  return x / jnp.where(unit == 0, 1, unit)


def _pack(codes: jax.Array, fan_in: int) -> jax.Array:
  """Codes of four bits (..., at least in, out), two neighbouring inputs to a byte."""
  *lead, _, fan_out = codes.shape
  pairs = codes[..., : fan_in + fan_in % 2, :].reshape(*lead, -1, 2, fan_out)
  return pairs[..., 0, :] | (pairs[..., 1, :] << 4)


def _unpack(packed: jax.Array, fan_in: int) -> jax.Array:
  """Undoes `_pack`: (..., in, out)."""
  codes = jnp.stack([packed & 15, packed >> 4], axis=-2)
  return codes.reshape(*packed.shape[:-2], -1, packed.shape[-1])[..., :fan_in, :]


def _spread(of_blocks: jax.Array, block: int, fan_in: int) -> jax.Array:
  """What each block has, for each of its inputs: (..., blocks, out) to (..., in, out)."""
  return jnp.repeat(of_blocks, block, axis=-2)[..., :fan_in, :]


def _nf4_bounds() -> np.ndarray:
  """Halfway between neighbouring levels."""
  levels = np.asarray(NF4_LEVELS, np.float32)
  return (levels[1:] + levels[:-1]) / 2

"""Quantised kernels alone: what they hold, and their product."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels import LoraKernel, dot
from lora_jax.quantized import BLOCK, INT4_BLOCK, NF4_LEVELS, Int4Kernel, Int8Kernel, Nf4Kernel

KINDS = [Nf4Kernel, Int4Kernel, Int8Kernel]
# Blocks that are whole, short, cut short, and odd.
SHAPES = [(2 * BLOCK, 5), (24, 5), (BLOCK + 6, 3), (BLOCK + 1, 3), (1, 2), (3, 2, BLOCK, 4)]


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def numpy_nf4(w):
  """Each column's blocks, one by one: the nearest level times the largest magnitude."""
  out = np.zeros_like(w)
  levels = np.asarray(NF4_LEVELS, np.float32)
  for at in np.ndindex(*w.shape[:-2], w.shape[-1]):
    column = w[(*at[:-1], slice(None), at[-1])]
    for start in range(0, len(column), BLOCK):
      block = column[start : start + BLOCK]
      absmax = np.abs(block).max()
      nearest = np.abs(block[:, None] / absmax - levels[None]).argmin(axis=1)
      out[(*at[:-1], slice(start, start + BLOCK), at[-1])] = levels[nearest] * absmax
  return out


def test_the_levels_are_quantiles_of_a_normal_distribution():
  quantile = statistics.NormalDist().inv_cdf
  # The paper's bound: half of 1 - 1/32 and 1 - 1/30, so that both ends are used.
  end = ((1 - 1 / 32) + (1 - 1 / 30)) / 2
  above = [quantile(p) for p in np.linspace(end, 0.5, 9)[:-1]]
  below = [-quantile(p) for p in np.linspace(end, 0.5, 8)[:-1]]
  expected = np.sort([*below, 0.0, *above]) / max(above)
  np.testing.assert_allclose(NF4_LEVELS, expected, atol=1e-6)


@pytest.mark.parametrize('shape', SHAPES)
def test_nf4_is_the_nearest_level_of_each_block(shape):
  w = draw(*shape)
  kernel = Nf4Kernel.quantize(w)
  np.testing.assert_array_equal(kernel.dequantize(jnp.float32), numpy_nf4(np.asarray(w)))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('shape', SHAPES)
def test_a_kernel_has_the_shape_it_stands_for_and_arrays_of_its_rank(kind, shape):
  kernel = kind.quantize(draw(*shape))
  assert kernel.shape == shape
  assert kernel.dtype == jnp.float32
  for leaf in jax.tree.leaves(kernel):
    assert leaf.ndim == len(shape)
    assert leaf.shape[:-2] == shape[:-2]


def test_every_code_comes_back():
  # All 16 levels in each block, at scales that are no powers of two.
  levels = np.tile(np.asarray(NF4_LEVELS, np.float32), 2 * BLOCK // 16)
  rng = np.random.default_rng(0)
  w = np.stack([rng.permutation(levels) for _ in range(3)], axis=1)
  scales = np.repeat(rng.uniform(0.1, 3, (2, 3)).astype(np.float32), BLOCK, axis=0)
  w = w.reshape(2, BLOCK, 3)
  assert np.abs(w).max(axis=1).min() == 1
  w = w.reshape(-1, 3) * scales
  kernel = Nf4Kernel.quantize(jnp.asarray(w))
  np.testing.assert_array_equal(kernel.dequantize(jnp.float32), w)
  assert kernel.codes.shape == (BLOCK, 3)
  assert kernel.codes.dtype == jnp.uint8

  codes = np.arange(-127, 128, dtype=np.float32)[:, None]
  eighth = Int8Kernel.quantize(jnp.asarray(codes / 8))
  np.testing.assert_array_equal(eighth.dequantize(jnp.float32), codes / 8)
  np.testing.assert_array_equal(eighth.codes, codes)


@pytest.mark.parametrize('kind', KINDS)
def test_what_was_decoded_encodes_to_itself(kind):
  kernel = kind.quantize(draw(2, BLOCK + 6, 7))
  again = kind.quantize(kernel.dequantize(jnp.float32))
  np.testing.assert_array_equal(again.codes, kernel.codes)
  np.testing.assert_allclose(
    again.dequantize(jnp.float32), kernel.dequantize(jnp.float32), rtol=1e-6, atol=2e-6
  )


def test_errors_are_bounded_by_half_the_widest_gap():
  w = draw(4 * BLOCK, 32)
  error = jnp.abs(Nf4Kernel.quantize(w).dequantize(jnp.float32) - w)
  absmax = jnp.repeat(jnp.abs(w.reshape(4, BLOCK, 32)).max(axis=1), BLOCK, axis=0)
  assert (error <= absmax * max(np.diff(NF4_LEVELS)) / 2 + 1e-6).all()
  # Of normal weights about a twelfth is lost.
  assert float(jnp.linalg.norm(error) / jnp.linalg.norm(w)) < 0.1
  kernel = Int8Kernel.quantize(w)
  error = jnp.abs(kernel.dequantize(jnp.float32) - w)
  assert (error <= jnp.broadcast_to(kernel.step, w.shape) / 2 + 1e-6).all()
  assert float(jnp.linalg.norm(error) / jnp.linalg.norm(w)) < 0.01


def test_int4_errors_are_bounded_by_half_a_step_and_the_rounding_of_its_ends():
  w = draw(4 * INT4_BLOCK + 5, 32)
  kernel = Int4Kernel.quantize(w)
  error = jnp.abs(kernel.dequantize(jnp.float32) - w)
  step, low = np.asarray(kernel.steps * kernel.units[:1]), np.abs(kernel.lows * kernel.units[1:])
  # Half a unit of the lowest and fifteen halves of one of the step, where a block ends.
  bound = step / 2 + low.max(0) / 127 + 15 * step.max(0) / 255
  assert (error <= np.repeat(bound, INT4_BLOCK, axis=0)[: len(w)] + 1e-6).all()
  assert float(jnp.linalg.norm(error) / jnp.linalg.norm(w)) < 0.085


def test_int4_gives_back_the_blocks_of_q4_1():
  # As GGUF stores them: 32 neighbouring weights of an output, a scale and a minimum in
  # float16, and codes of which the ends occur.
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 16, (6, INT4_BLOCK, 24))
  codes[:, :2] = [[0], [15]]
  step = rng.uniform(0.4, 1, (6, 1, 24)).astype(np.float16).astype(np.float32)
  low = -7.5 * step * rng.uniform(0.8, 1.2, (6, 1, 24)).astype(np.float16).astype(np.float32)
  w = (codes * step + low).reshape(-1, 24)
  kernel = Int4Kernel.quantize(jnp.asarray(w))
  unpacked = np.stack([kernel.codes & 15, kernel.codes >> 4], axis=1).reshape(-1, 24)
  np.testing.assert_array_equal(unpacked, codes.reshape(-1, 24))
  error = np.linalg.norm(kernel.dequantize(jnp.float32) - w) / np.linalg.norm(w)
  assert error < 0.01
  assert np.linalg.norm(Nf4Kernel.quantize(jnp.asarray(w)).dequantize(jnp.float32) - w) > 5 * (
    error * np.linalg.norm(w)
  )


@pytest.mark.parametrize('kind', KINDS)
def test_zeros_stay_zeros_and_what_is_no_number_is_not_hidden(kind):
  zeros = kind.quantize(jnp.zeros((BLOCK, 3)))
  np.testing.assert_array_equal(zeros.dequantize(jnp.float32), 0)
  broken = draw(BLOCK, 3).at[5, 1].set(jnp.nan)
  decoded = kind.quantize(broken).dequantize(jnp.float32)
  assert jnp.isnan(decoded[:, 1]).all()
  assert jnp.isfinite(decoded[:, jnp.asarray([0, 2])]).all()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('sums', [None, 'float32'])
def test_product_and_gradient_are_those_of_the_decoded_kernel(kind, dtype, sums):
  x = draw(2, 3, BLOCK + 6).astype(dtype)
  kernel = kind.quantize(draw(BLOCK + 6, 5))
  weights = draw(2, 3, 5)

  @jax.jit
  def run(kernel):
    loss = lambda x: jnp.vdot(weights, dot(x, kernel, sums).astype(jnp.float32))
    return jax.value_and_grad(loss)(x)

  assert dot(x, kernel, sums).dtype == (sums or dtype)
  for ours, expected in zip(run(kernel), run(kernel.dequantize(dtype)), strict=True):
    assert ours.dtype == expected.dtype
    tolerance = 1e-5 if dtype == 'float32' else 1e-2
    np.testing.assert_allclose(
      ours.astype(jnp.float32), expected.astype(jnp.float32), rtol=tolerance, atol=tolerance
    )


def equations(jaxpr):
  """All equations, those of inner programs too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


@pytest.mark.parametrize('kind', KINDS)
def test_many_adapters_share_one_product_and_one_decoded_kernel(kind):
  fan_in, fan_out, rank, count = 12, 20, 3, 4
  w = kind.quantize(draw(fan_in, fan_out))
  xs, a, b = draw(count, 5, fan_in), draw(count, fan_in, rank), draw(count, rank, fan_out)

  def loss(x, a, b):
    return jnp.sum(jnp.sin(dot(x, LoraKernel(w, a, b, jnp.float32(0.5)))))

  work = jax.grad(loss, (0, 1, 2))
  together = jax.jit(jax.vmap(work))(xs, a, b)
  for i in range(count):
    alone = work(xs[i], a[i], b[i])
    for packed, expected in zip(together, alone, strict=True):
      np.testing.assert_allclose(packed[i], expected, atol=1e-4)

  program = [*equations(jax.make_jaxpr(jax.vmap(work))(xs, a, b).jaxpr)]
  with_base = [
    eqn
    for eqn in program
    if eqn.primitive.name == 'dot_general'
    and (fan_in, fan_out) in [variable.aval.shape for variable in eqn.invars]
  ]
  # One in each direction; neither has a batch of kernels.
  assert len(with_base) == 2
  assert all(eqn.params['dimension_numbers'][1] == ((), ()) for eqn in with_base)

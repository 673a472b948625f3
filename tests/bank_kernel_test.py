"""A bank of adapters under one kernel: each row's product is that of its own adapter alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.bank_kernel import NONE, Bank, BankKernel
from lora_jax.kernels import LoraKernel, dense, dot
from lora_jax.quantize import KINDS

IN, OUT, RANK, SLOTS = 12, 20, 3, 5
# Repeated, out of order, without an adapter, and the last slot there is.
ROWS = jnp.asarray([3, NONE, 1, 3, 4, NONE], jnp.int32)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def bank(*lead, slots=SLOTS, dora=False, dtype=jnp.float32):
  """Every slot but `NONE` is full."""
  empty = Bank.empty(slots, *lead, fan_in=IN, fan_out=OUT, rank=RANK, dtype=dtype, dora=dora)
  at = len(lead)
  used = (jnp.arange(slots) != NONE).reshape(-1)
  keep = lambda leaf: used.reshape([1] * at + [slots] + [1] * (leaf.ndim - at - 1))
  fill = lambda leaf: jnp.where(
    jnp.broadcast_to(keep(leaf), leaf.shape), draw(*leaf.shape).astype(leaf.dtype), leaf
  )
  return jax.tree.map(fill, empty)


def alone(w, held, slot):
  gain = None if held.gain is None else held.gain[slot]
  return LoraKernel(w, held.a[slot], held.b[slot], held.scale[slot], gain=gain)


@pytest.mark.parametrize('form', ['', 'gather', 'grouped'])
@pytest.mark.parametrize('dora', [False, True])
@pytest.mark.parametrize('time', [1, 4])
def test_each_row_has_the_product_of_its_own_adapter(form, dora, time):
  x, w, held = draw(len(ROWS), time, IN), draw(IN, OUT), bank(dora=dora)
  together = jax.jit(dot)(x, BankKernel(w, held, ROWS, form))
  for row, slot in enumerate(ROWS):
    expected = dot(x[row], w) if slot == NONE else dot(x[row], alone(w, held, slot))
    np.testing.assert_allclose(together[row], expected, atol=1e-4)


@pytest.mark.parametrize('form', ['gather', 'grouped'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('dora', [False, True])
def test_a_row_without_an_adapter_is_the_bases_bit_for_bit(form, dtype, dora):
  x, w = draw(len(ROWS), 2, IN).astype(dtype), draw(IN, OUT).astype(dtype)
  together = dot(x, BankKernel(w, bank(dora=dora, dtype=dtype), ROWS, form))
  assert together.dtype == dtype
  of_base = np.asarray(dot(x, w))
  without = np.asarray(ROWS) == NONE
  assert np.asarray(together)[without].tobytes() == of_base[without].tobytes()
  assert (np.asarray(together)[~without] != of_base[~without]).any(axis=(1, 2)).all()


def test_a_row_depends_on_no_other():
  x, w, held = draw(len(ROWS), 1, IN), draw(IN, OUT), bank()
  multiply = jax.jit(dot)
  together = multiply(x, BankKernel(w, held, ROWS))
  for row in range(len(ROWS)):
    others = jnp.arange(len(ROWS)) != row
    changed = jnp.where(others, (ROWS + 1) % SLOTS, ROWS)
    x_changed = jnp.where(others[:, None, None], -x, x)
    np.testing.assert_array_equal(
      multiply(x_changed, BankKernel(w, held, changed))[row], together[row]
    )


@pytest.mark.parametrize('kind', KINDS)
def test_the_base_may_be_quantised(kind):
  x, held = draw(len(ROWS), 1, IN), bank()
  w = KINDS[kind].quantize(draw(IN, OUT))
  expected = dot(x, BankKernel(w.dequantize(jnp.float32), held, ROWS))
  np.testing.assert_allclose(dot(x, BankKernel(w, held, ROWS)), expected, atol=1e-4)


def test_layers_are_scanned_off():
  layers = 3
  x, w, held = draw(len(ROWS), 1, IN), draw(layers, IN, OUT), bank(layers, dora=True)
  kernel = BankKernel(w, held, jnp.broadcast_to(ROWS, (layers, len(ROWS))))
  _, scanned = jax.lax.scan(lambda _, layer: (None, dot(x, layer)), None, kernel)
  for layer in range(layers):
    one = BankKernel(w[layer], jax.tree.map(lambda leaf, at=layer: leaf[at], held), ROWS)
    np.testing.assert_allclose(scanned[layer], dot(x, one), atol=1e-4)


def test_the_work_does_not_grow_with_the_slots(optimised):
  def flops(slots):
    kernel = BankKernel(draw(IN, OUT), bank(slots=slots), ROWS)
    return jax.jit(dot).lower(draw(len(ROWS), 1, IN), kernel).compile().cost_analysis()['flops']

  assert flops(256) <= 1.01 * flops(8)


def test_a_bank_is_no_one_matrix():
  with pytest.raises(TypeError, match='no one matrix'):
    dense(BankKernel(draw(IN, OUT), bank(), ROWS), jnp.float32)

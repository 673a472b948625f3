import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels import LoraKernel, dense, dot

IN, OUT, RANK = 12, 20, 3


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def lora_kernel(seed=0, w=None, **changes):
  w = draw(IN, OUT) if w is None else w
  a, b = draw(IN, RANK, seed=seed), draw(RANK, OUT, seed=seed)
  return LoraKernel(w, a, b, jnp.float32(0.5), **changes)


def test_lora_kernel_equals_its_sum_in_value_and_gradient():
  x, weights = draw(2, 5, IN), draw(2, 5, OUT)
  kernel = lora_kernel()

  def through_kernel(x, a, b):
    return jnp.vdot(weights, dot(x, kernel.replace(a=a, b=b)))

  def through_sum(x, a, b):
    return jnp.vdot(weights, x @ (kernel.w + 0.5 * a @ b))

  of = (x, kernel.a, kernel.b)
  np.testing.assert_allclose(dot(x, kernel), x @ (kernel.w + 0.5 * kernel.a @ kernel.b), atol=1e-4)
  ours = jax.grad(through_kernel, (0, 1, 2))(*of)
  for one, other in zip(ours, jax.grad(through_sum, (0, 1, 2))(*of), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_zero_b_changes_no_bit(dtype):
  x = draw(3, IN).astype(dtype)
  kernel = lora_kernel(w=draw(IN, OUT).astype(dtype))
  fresh = kernel.replace(b=jnp.zeros_like(kernel.b))
  assert np.asarray(dot(x, fresh)).tobytes() == np.asarray(dot(x, kernel.w)).tobytes()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_product_has_the_dtype_of_x_and_gradients_that_of_the_adapters(dtype):
  x = draw(3, IN).astype(dtype)
  kernel = lora_kernel()
  assert dot(x, kernel.w).dtype == dtype
  assert dot(x, kernel).dtype == dtype
  grads = jax.grad(lambda a: dot(x, kernel.replace(a=a)).sum().astype(jnp.float32))(kernel.a)
  assert grads.dtype == jnp.float32


def test_an_adapter_stored_in_bfloat16_is_added_in_float32():
  kernel = lora_kernel()
  stored = kernel.replace(a=kernel.a.astype(jnp.bfloat16), b=kernel.b.astype(jnp.bfloat16))
  update = 0.5 * np.asarray(stored.a, np.float32) @ np.asarray(stored.b, np.float32)
  np.testing.assert_allclose(dense(stored, jnp.float32), kernel.w + update, atol=1e-6)


def test_adapters_stack():
  x, inner = draw(3, IN), lora_kernel(seed=1)
  outer = lora_kernel(seed=2, w=inner)
  expected = dot(x, inner) + 0.5 * x @ outer.a @ outer.b
  np.testing.assert_allclose(dot(x, outer), expected, atol=1e-4)


def test_many_adapters_share_one_product_with_the_base():
  xs = draw(4, 5, IN)
  alone = [lora_kernel(seed=i) for i in range(4)]
  stack = lambda name: jnp.stack([getattr(kernel, name) for kernel in alone])
  packed = LoraKernel(alone[0].w, stack('a'), stack('b'), stack('scale'))
  # Axes, not arrays, stand in the leaves: how vmap takes them, but not the fields' types.
  axes = jax.tree.unflatten(jax.tree.structure(packed), [None, 0, 0, 0])
  together = jax.vmap(dot, in_axes=(0, axes))
  expected = jnp.stack([dot(x, kernel) for x, kernel in zip(xs, alone, strict=True)])
  np.testing.assert_allclose(together(xs, packed), expected, atol=1e-4)

  products = [
    eqn for eqn in jax.make_jaxpr(together)(xs, packed).eqns if 'dot' in eqn.primitive.name
  ]
  with_base = [eqn for eqn in products if eqn.invars[1].aval.shape == (IN, OUT)]
  assert len(with_base) == 1
  assert with_base[0].params['dimension_numbers'][1] == ((), ())


class TestDropout:
  def test_acts_on_the_adapter_alone(self):
    x, kernel = draw(3, IN), lora_kernel(dropout_key=jax.random.key(0), dropout_rate=0.5)
    without_update = kernel.replace(b=jnp.zeros_like(kernel.b))
    np.testing.assert_array_equal(dot(x, without_update), dot(x, kernel.w))
    assert not np.allclose(dot(x, kernel), dot(x, kernel.replace(dropout_key=None)))

  def test_without_a_key_the_rate_is_not_read(self):
    x = draw(3, IN)
    np.testing.assert_array_equal(dot(x, lora_kernel(dropout_rate=0.9)), dot(x, lora_kernel()))

  def test_with_a_key_for_each_row_none_depends_on_the_others(self):
    x, keys = draw(3, 5, IN), jax.random.split(jax.random.key(0), 3)
    kernel = lora_kernel(dropout_rate=0.5)
    together = dot(x, kernel.replace(dropout_key=keys))
    for row, key in enumerate(keys):
      one = dot(x[row], kernel.replace(dropout_key=key))
      np.testing.assert_allclose(together[row], one, atol=1e-5)
    assert not np.allclose(together, dot(x, kernel.replace(dropout_key=keys[0])))

  def test_keeps_the_mean(self):
    x, rate, draws = draw(2, IN), 0.3, 4000
    keys = jax.random.split(jax.random.key(0), draws)
    kernel = lora_kernel(dropout_rate=rate)
    each = jax.vmap(lambda key: dot(x, kernel.replace(dropout_key=key)))(keys)
    error = each.std(axis=0) / draws**0.5
    assert jnp.all(jnp.abs(each.mean(axis=0) - dot(x, lora_kernel())) < 5 * error)

  def test_drops_that_share_of_the_entries(self):
    rate = 0.25
    # With A = identity, B = identity, W = 0 and scale 1 the product is the dropped x.
    eye, x = jnp.eye(IN), jnp.ones((5000, IN), jnp.float32)
    kernel = LoraKernel(0 * eye, eye, eye, jnp.float32(1), jax.random.key(3), rate)
    out = np.asarray(dot(x, kernel))
    assert (out == 0).mean() == pytest.approx(rate, abs=0.01)
    np.testing.assert_allclose(out[out != 0], 1 / (1 - rate), rtol=1e-6)


class TestGain:
  def test_multiplies_the_sum(self):
    x, gain = draw(3, IN), draw(OUT)
    kernel = lora_kernel()
    np.testing.assert_allclose(
      dot(x, kernel.replace(gain=gain)), dot(x, kernel) * jnp.stack([gain] * 3), atol=1e-4
    )

  def test_of_one_changes_no_bit(self):
    x, kernel = draw(3, IN), lora_kernel()
    fresh = kernel.replace(b=jnp.zeros_like(kernel.b), gain=jnp.ones(OUT))
    assert np.asarray(dot(x, fresh)).tobytes() == np.asarray(dot(x, kernel.w)).tobytes()

  def test_near_one_is_not_lost_in_bfloat16(self):
    x = 100 * jnp.ones((3, IN), jnp.bfloat16)
    kernel = lora_kernel(w=jnp.ones((IN, OUT), jnp.bfloat16))
    fresh = kernel.replace(b=jnp.zeros_like(kernel.b), gain=jnp.full(OUT, 1.004))
    # 1.004 is 1 in bfloat16, and 1204.8 is not 1200.
    assert float(dot(x, fresh, jnp.float32)[0, 0]) == pytest.approx(1204.8, rel=1e-5)

  def test_dropout_reaches_what_the_gain_adds_to_the_base_and_not_the_base(self):
    x, gain, rate = draw(4, IN), draw(OUT), 0.4
    kernel = lora_kernel(dropout_key=jax.random.key(1), dropout_rate=rate, gain=gain)
    keep = jax.random.bernoulli(jax.random.key(1), 1 - rate, x.shape)
    seen = jnp.where(keep, x / (1 - rate), 0)
    gains = jnp.stack([gain] * 4)
    # PEFT 0.21, DoraLinearLayer.forward on an input that was dropped out.
    expected = x @ kernel.w + (gains - 1) * (seen @ kernel.w)
    expected += gains * (0.5 * seen @ kernel.a @ kernel.b)
    np.testing.assert_allclose(dot(x, kernel), expected, atol=1e-4)


def test_dense_is_what_dot_multiplies_by():
  x = draw(3, IN)
  inner = lora_kernel(seed=1)
  kernel = lora_kernel(seed=2, w=inner).replace(gain=draw(OUT))
  np.testing.assert_allclose(x @ dense(kernel, jnp.float32), dot(x, kernel), atol=1e-4)


def loss_and_gradients(kernel, x):
  """Of what differentiates: `x`, A, B and the gain; under `jit`, `remat` and a scan over layers."""
  stacked = lambda leaf: jnp.stack([leaf, leaf])
  rest = jax.tree.map(stacked, kernel.replace(a=None, b=None, gain=None))

  def loss(x, a, b, gain):
    @jax.checkpoint
    def layer(x, rest):
      out = dot(x, rest.replace(a=a, b=b, gain=gain))
      return jnp.tanh(out @ jnp.ones((OUT, IN), x.dtype) / OUT), None

    return jnp.sum(jax.lax.scan(layer, x, rest)[0].astype(jnp.float32) ** 2)

  differentiable = (0, 1, 2) if kernel.gain is None else (0, 1, 2, 3)
  compiled = jax.jit(jax.value_and_grad(loss, differentiable))
  return compiled(x, kernel.a, kernel.b, kernel.gain)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'gain': draw(OUT)},
    {'dropout_key': jax.random.key(3), 'dropout_rate': 0.5},
  ],
)
def test_an_update_in_use_is_the_same_behind_a_branch(dtype, changes):
  x = draw(2, 5, IN).astype(dtype)
  plain = lora_kernel(**changes)
  value, gradients = loss_and_gradients(plain, x)
  behind = loss_and_gradients(plain.replace(used=jnp.bool_(True)), x)
  np.testing.assert_allclose(value, behind[0], rtol=1e-6)
  for one, other in zip(gradients, behind[1], strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=1e-5)
  assert all(np.abs(gradient).max() > 0 for gradient in gradients)


def test_an_update_that_is_not_used_is_as_if_there_were_none():
  x = draw(2, 5, IN)
  # As in a union tree, but not of zeros, to see that it is not looked at.
  idle = lora_kernel(used=jnp.bool_(False), dropout_key=jax.random.key(3), dropout_rate=0.5)
  none = lora_kernel(w=idle.w).replace(a=0 * idle.a, b=0 * idle.b)
  (value, (of_x, of_a, of_b)) = loss_and_gradients(idle, x)
  expected, (expected_of_x, _, _) = loss_and_gradients(none, x)
  assert value == expected
  np.testing.assert_array_equal(of_x, expected_of_x)
  assert not of_a.any()
  assert not of_b.any()

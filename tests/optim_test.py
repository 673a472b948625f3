import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.config import OptimConfig
from lora_jax.optim import Hyper, optimizer, schedule

CONFIG = OptimConfig(learning_rate=1e-2, lr_ratio=1.0, warmup=0.1, final_rate=0.1)


def adapters(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  module = lambda: {'a': draw(3, 8, 2), 'b': draw(3, 2, 6)}
  return {'layers': {'attn': {'o_proj': module()}, 'mlp': {'down_proj': module()}}}


def updates(config, gradients, steps=100):
  """What the optimiser adds to the adapters for each gradient in turn, and its last state."""
  tx = optimizer(Hyper.of(config, steps))
  state, given, out = tx.init(adapters()), adapters(), []
  update = jax.jit(tx.update)
  for gradient in gradients:
    added, state = update(gradient, state, given)
    given = optax.apply_updates(given, added)
    out.append(added)
  return out, state


@pytest.mark.parametrize('steps', [1, 2, 3, 5, 40, 100, 1000])
def test_rate_rises_to_its_peak_and_falls_to_its_floor(steps):
  rates = np.asarray([schedule(CONFIG, steps)(step) for step in range(steps)])
  peak, floor = CONFIG.learning_rate, CONFIG.final_rate * CONFIG.learning_rate
  assert (rates > 0).all()
  assert rates.max() <= peak * (1 + 1e-6)
  top = rates.argmax()
  assert (np.diff(rates[: top + 1]) > 0).all()
  assert (np.diff(rates[top:]) < 0).all()
  if steps >= 3:
    assert rates.max() == pytest.approx(peak)
    assert top == max(1, round(CONFIG.warmup * steps))
    assert schedule(CONFIG, steps)(steps) == pytest.approx(floor)
  if steps >= 40:
    assert rates[-1] == pytest.approx(floor, rel=0.1)


def test_ratio_multiplies_the_updates_of_b_alone():
  gradients = [adapters(seed) for seed in (1, 2)]
  plain, _ = updates(CONFIG, gradients)
  faster, _ = updates(dataclasses.replace(CONFIG, lr_ratio=16.0), gradients)
  for one, other in zip(plain, faster, strict=True):
    for path, leaf in jax.tree_util.tree_leaves_with_path(one):
      factor = 16 if path[-1].key == 'b' else 1
      other_leaf = other
      for key in path:
        other_leaf = other_leaf[key.key]
      np.testing.assert_allclose(other_leaf, factor * leaf, rtol=1e-5)


def test_first_update_is_adams_sign_at_the_first_rate():
  (first,), _ = updates(CONFIG, [adapters(1)])
  rate = float(schedule(CONFIG, 100)(0))
  expected = jax.tree.map(lambda g: -rate * jnp.sign(g), adapters(1))
  for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3)


def test_large_gradients_are_clipped_to_one_norm():
  # Adam forgets the scale of constant gradients; a sequence shows the clipping.
  small = jax.tree.map(lambda g: 1e-3 * g, adapters(1))
  big, huge = (jax.tree.map(lambda g, f=f: f * g, adapters(2)) for f in (1e3, 1e6))
  with_big, _ = updates(CONFIG, [big, small])
  with_huge, _ = updates(CONFIG, [huge, small])
  for one, other in zip(jax.tree.leaves(with_big), jax.tree.leaves(with_huge), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_weight_decay_pulls_towards_zero():
  still = jax.tree.map(jnp.zeros_like, adapters())
  (none,), _ = updates(CONFIG, [still])
  (decayed,), _ = updates(dataclasses.replace(CONFIG, weight_decay=0.1), [still])
  rate = float(schedule(CONFIG, 100)(0))
  for zero, pulled, given in zip(
    jax.tree.leaves(none), jax.tree.leaves(decayed), jax.tree.leaves(adapters()), strict=True
  ):
    assert not zero.any()
    np.testing.assert_allclose(pulled, -0.1 * rate * given, rtol=1e-5)


def test_weight_decay_leaves_magnitudes_norms_and_biases_alone():
  tree = {'o_proj': {'a': jnp.ones((2, 2)), 'm': jnp.ones(2)}, 'norm': {'scale': jnp.ones(2)}}
  tx = optimizer(Hyper.of(dataclasses.replace(CONFIG, weight_decay=0.1), 100))
  added, _ = tx.update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
  assert (added['o_proj']['a'] < 0).all()
  assert not added['o_proj']['m'].any()
  assert not added['norm']['scale'].any()


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad):
  broken = adapters(1)
  broken['layers']['mlp']['down_proj']['b'] = (
    broken['layers']['mlp']['down_proj']['b'].at[0, 0, 0].set(bad)
  )
  good = [adapters(2), adapters(3)]
  out, state = updates(CONFIG, [good[0], broken, broken, good[1]])
  for leaf in jax.tree.leaves(out[1:3]):
    assert not leaf.any()
  assert (int(state.notfinite_count), int(state.total_notfinite)) == (0, 2)
  # Moments and schedule are as if the bad steps had not been.
  expected, _ = updates(CONFIG, good)
  for one, other in zip(jax.tree.leaves(out[3]), jax.tree.leaves(expected[1]), strict=True):
    np.testing.assert_array_equal(one, other)
  assert int(updates(CONFIG, [good[0], broken, broken])[1].notfinite_count) == 2


def test_state_is_float32_and_mirrors_the_adapters():
  state = optimizer(Hyper.of(CONFIG, 10)).init(adapters())
  moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
  assert len(moments) == 2 * len(jax.tree.leaves(adapters()))
  assert {leaf.dtype for leaf in moments} == {jnp.dtype('float32')}


def test_one_program_serves_any_hyperparameters():
  others = [
    CONFIG,
    OptimConfig(3e-3, lr_ratio=8.0, warmup=0.3, weight_decay=0.1, clip_norm=0.5, beta1=0.8),
    OptimConfig(1e-4, final_rate=0.0, beta2=0.999),
  ]

  @jax.jit
  @jax.vmap
  def last(hyper):
    tx, given = optimizer(hyper), adapters()
    state = tx.init(given)
    for seed in range(4):
      added, state = tx.update(adapters(seed), state, given)
      given = optax.apply_updates(given, added)
    return given

  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(Hyper.of(c, 4) for c in others))
  together = last(stacked)
  for i, config in enumerate(others):
    given = adapters()
    for added in updates(config, [adapters(seed) for seed in range(4)], steps=4)[0]:
      given = optax.apply_updates(given, added)
    own = jax.tree.map(lambda leaf, i=i: leaf[i], together)
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(given), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)

"""What is drawn from logits: whether it follows the probabilities, and what decides it."""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.sampling import Draw, Sampling, choose, choose_rows

PROBS = np.asarray([0.1, 0.6, 0.05, 0.25], np.float32)
LOGITS = np.log(PROBS)


def draw(sampling):
  key = jax.random.key(sampling.seed)
  return Draw(key, sampling.temperature, sampling.top_p, sampling.top_k)


def drawn(count=400, **sampling):
  held = draw(Sampling(**sampling))
  one = jax.jit(jax.vmap(lambda step: choose(jnp.asarray(LOGITS), step, held)))
  return collections.Counter(np.asarray(one(jnp.arange(count))).tolist())


def assert_shares(counts, probs):
  total = sum(counts.values())
  np.testing.assert_allclose([counts[i] / total for i in range(len(probs))], probs, atol=0.03)


def test_draws_follow_temperature():
  assert drawn() == {1: 400}
  assert_shares(drawn(4000, temperature=1.0), PROBS)
  # So cold that float32 ends.
  assert drawn(temperature=1e-38) == drawn(temperature=1e-44) == {1: 400}
  # Colder: p ** 2, normalised.
  assert_shares(drawn(4000, temperature=0.5), PROBS**2 / (PROBS**2).sum())


def test_top_p_keeps_the_likeliest_that_reach_it():
  assert drawn(temperature=1.0, top_p=0.0) == {1: 400}
  assert drawn(temperature=1.0, top_p=0.5) == {1: 400}
  assert {*drawn(temperature=1.0, top_p=0.7)} == {1, 3}


def test_top_k_keeps_so_many_and_top_p_is_of_what_they_have():
  assert drawn(temperature=1.0, top_k=1) == {1: 400}
  assert_shares(drawn(4000, temperature=1.0, top_k=2), np.asarray([0, 0.6, 0, 0.25]) / 0.85)
  assert drawn(temperature=1.0, top_k=9) == drawn(temperature=1.0)
  # 0.6 of the 0.85 that two have is more than 0.65, of all it is less.
  assert drawn(temperature=1.0, top_k=2, top_p=0.65) == {1: 400}
  assert {*drawn(temperature=1.0, top_p=0.65)} == {1, 3}


def test_rows_are_drawn_each_as_alone():
  asked = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=2.0, top_p=0.9, seed=2),
    Sampling(temperature=0.7, top_k=3, seed=2**32 - 1),
  ]
  rng = np.random.default_rng(0)
  logits_BV = jnp.asarray(rng.standard_normal((len(asked), 50)), jnp.float32)
  steps_B = jnp.asarray([5, 0, 7, 7])
  draws = jax.tree.map(lambda *leaves: jnp.stack([*map(jnp.asarray, leaves)]), *map(draw, asked))
  together = jax.jit(choose_rows)(logits_BV, steps_B, draws)
  alone = [
    int(choose(logits_V, step, draw(one)))
    for logits_V, step, one in zip(logits_BV, steps_B, asked, strict=True)
  ]
  assert together.tolist() == alone
  greedy = draws.replace(temperature=jnp.zeros(len(asked)))
  np.testing.assert_array_equal(
    jax.jit(choose_rows)(logits_BV, steps_B, greedy), logits_BV.argmax(-1)
  )

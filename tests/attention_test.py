import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.attention import SHARED, attend, causal_mask, self_attend

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def draw(batch, time, dtype=jnp.float32, seed=0):
  """q_BTNH, k_BKTH, v_BKTH."""
  rng = np.random.default_rng([seed, time])
  q = rng.standard_normal((batch, time, HEADS, HEAD_DIM))
  k, v = rng.standard_normal((2, batch, KV_HEADS, time, HEAD_DIM))
  return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def rising(batch, time):
  return jnp.broadcast_to(jnp.arange(time), (batch, time))


def by_definition(q_BTNH, k_BKSH, v_BKSH, mask_BTS, scale=HEAD_DIM**-0.5, cap=np.inf):
  """Softmax attention in float64, each query head against its own key head."""
  out = np.zeros(q_BTNH.shape)
  for b in range(q_BTNH.shape[0]):
    for n in range(HEADS):
      q, kv_head = np.asarray(q_BTNH, np.float64)[b, :, n], n // (HEADS // KV_HEADS)
      k, v = (np.asarray(x, np.float64)[b, kv_head] for x in (k_BKSH, v_BKSH))
      scores = scale * q @ k.T
      if cap < np.inf:
        scores = cap * np.tanh(scores / cap)
      scores = np.where(mask_BTS[b], scores, -np.inf)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      out[b, :, n] = weights / weights.sum(-1, keepdims=True) @ v
  return out


def random_mask(batch, queries, keys):
  mask = np.random.default_rng(0).random((batch, queries, keys)) < 0.5
  # Every query sees something.
  mask[:, :, 0] = True
  return jnp.asarray(mask)


def test_follows_the_definition():
  (q, _, _), (_, k, v) = draw(2, 5), draw(2, 11)
  mask = random_mask(2, 5, 11)
  np.testing.assert_allclose(attend(q, [(k, v, mask)]), by_definition(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize('cuts', [(4,), (1, 7), (10,)])
def test_parts_equal_the_whole(cuts):
  (q, _, _), (_, k, v) = draw(2, 5), draw(2, 11)
  mask = random_mask(2, 5, 11)
  split = lambda x, axis: jnp.split(x, cuts, axis)
  parts = list(zip(split(k, 2), split(v, 2), split(mask, 2), strict=True))
  np.testing.assert_allclose(attend(q, parts), attend(q, [(k, v, mask)]), atol=1e-5)


def test_a_part_that_nobody_sees_changes_nothing():
  (q, k, v), (_, more_k, more_v) = draw(2, 5), draw(2, 3, seed=1)
  seen = (k, v, causal_mask(rising(2, 5), rising(2, 5)))
  hidden = (more_k, 100 * more_v, jnp.zeros((2, 5, 3), bool))
  for parts in ([seen, hidden], [hidden, seen]):
    np.testing.assert_allclose(attend(q, parts), attend(q, [seen]), atol=1e-6)


def test_large_scores_and_queries_that_see_nothing_stay_finite():
  q, k, v = draw(1, 4)
  mask = causal_mask(rising(1, 4), rising(1, 4)).at[0, 2].set(False)

  def loss(q, k, v):
    return jnp.sum(attend(q, [(k, v, mask)]) ** 2)

  for leaf in (loss(1e3 * q, 1e3 * k, v), *jax.grad(loss, (0, 1, 2))(1e3 * q, 1e3 * k, v)):
    assert jnp.isfinite(leaf).all()


def test_bfloat16_in_is_bfloat16_out():
  q, k, v = draw(2, 6, jnp.bfloat16)
  out = self_attend(q, k, v, rising(2, 6))
  assert out.dtype == jnp.bfloat16
  mask = causal_mask(rising(2, 6), rising(2, 6))
  np.testing.assert_allclose(out.astype(jnp.float32), by_definition(q, k, v, mask), atol=0.05)


def test_mask_is_causal_and_keeps_segments_apart():
  positions = jnp.asarray([[0, 1, 2, 0, 1]])
  segments = jnp.asarray([[1, 1, 1, 2, 2]])
  mask = causal_mask(positions, positions, segments, segments)[0]
  expected = [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [1, 1, 1, 0, 0],
    [0, 0, 0, 1, 0],
    [0, 0, 0, 1, 1],
  ]
  np.testing.assert_array_equal(mask, expected)


def test_every_segment_sees_what_is_shared_and_padding_is_seen_by_none():
  positions = jnp.asarray([[0, 1, 2, 3, 2, 3, 0, 0]])
  segments = jnp.asarray([[SHARED, SHARED, 1, 1, 2, 2, 0, 0]])
  mask = np.asarray(causal_mask(positions, positions, segments, segments)[0])
  expected = [
    [1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 0, 0],
    [1, 1, 0, 0, 1, 0],
    [1, 1, 0, 0, 1, 1],
  ]
  np.testing.assert_array_equal(mask[:6, :6], expected)
  assert not mask[:6, 6:].any()
  # A window reaches back into it.
  mask = causal_mask(positions, positions, segments, segments, window=jnp.asarray(2))[0]
  np.testing.assert_array_equal(mask[4, :6], [0, 1, 0, 0, 1, 0])
  np.testing.assert_array_equal(mask[5, :6], [0, 0, 0, 0, 1, 1])


def test_scale_and_cap_follow_the_definition():
  (q, _, _), (_, k, v) = draw(2, 5), draw(2, 11)
  mask = random_mask(2, 5, 11)
  plain = attend(q, [(k, v, mask)])
  for settings in ({'scale': 0.9}, {'cap': 0.4}, {'scale': 0.9, 'cap': 0.4}):
    out = attend(q, [(k, v, mask)], **settings)
    np.testing.assert_allclose(out, by_definition(q, k, v, mask, **settings), atol=1e-5)
    assert np.abs(out - plain).max() > 0.1


def test_a_window_holds_the_latest_tokens_and_the_query_itself():
  positions = jnp.asarray([[0, 1, 2, 3, 0, 1]])
  segments = jnp.asarray([[1, 1, 1, 1, 2, 2]])
  mask = causal_mask(positions, positions, segments, segments, window=jnp.asarray(2))[0]
  expected = [
    [1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0],
    [0, 1, 1, 0, 0, 0],
    [0, 0, 1, 1, 0, 0],
    [0, 0, 0, 0, 1, 0],
    [0, 0, 0, 0, 1, 1],
  ]
  np.testing.assert_array_equal(mask, expected)


# 150 is three blocks, the last of them short; segments end inside of blocks.
@pytest.mark.usefixtures('optimised')
@pytest.mark.parametrize('packed', [False, True, 'shared'])
@pytest.mark.parametrize(
  ('window', 'score'),
  [
    (None, {}),
    (40, {}),
    (1, {}),
    (None, {'cap': 0.7}),
    (None, {'scale': 0.8}),
    (75, {'cap': 1.5, 'scale': 0.6}),
  ],
)
def test_blocks_equal_one_block_in_value_and_gradient(packed, window, score):
  time = 150
  q, k, v = draw(2, time)
  ends = jnp.asarray([[65, 100, 150], [7, 128, 150]]) if packed else jnp.full((2, 1), time)
  segments = (jnp.arange(time)[None, :, None] >= ends[:, None, :]).sum(-1)
  starts = jnp.concatenate([jnp.zeros((2, 1), ends.dtype), ends], axis=1)
  positions = jnp.arange(time)[None] - jnp.take_along_axis(starts, segments, axis=1)
  if packed == 'shared':
    # What the first segments were is now shared, and the others go on from it.
    first = ends[:, :1]
    positions = jnp.where(segments > 0, positions + first, positions)
    segments = jnp.where(segments > 0, segments, SHARED)
  window = None if window is None else jnp.asarray(window)
  mask = causal_mask(positions, positions, segments, segments, window)
  weights = draw(2, time, seed=1)[0]

  def in_blocks(q, k, v):
    out = self_attend(q, k, v, positions, segments if packed else None, window, **score)
    return jnp.vdot(weights, out), out

  def at_once(q, k, v):
    out = attend(q, [(k, v, mask)], **score)
    return jnp.vdot(weights, out), out

  work = lambda f: jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(q, k, v)
  (ours, out), (theirs, expected) = work(in_blocks), work(at_once)
  np.testing.assert_allclose(out, expected, atol=1e-5)
  for one, other in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-4)


# Each way of sharing keys and each number of blocks lays out other products, and not all
# of them multiply bfloat16 into float32 on every backend.
@pytest.mark.usefixtures('optimised')
@pytest.mark.parametrize('time', [5, 64, 150])
@pytest.mark.parametrize(
  ('heads', 'kv_heads', 'window', 'cap'),
  [(6, 2, None, 0), (3, 3, None, 0), (4, 1, None, 0), (1, 1, None, 0), (6, 2, 60, 2.0)],
)
def test_bfloat16_gradients_follow_float32_ones(heads, kv_heads, time, window, cap):
  rng = np.random.default_rng(time)
  shapes = [(2, time, heads, 16), (2, kv_heads, time, 16), (2, kv_heads, time, 16)]
  rounded = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
  weights = rng.standard_normal(shapes[0]).astype(np.float32)
  window = None if window is None else jnp.asarray(window)
  mask = causal_mask(rising(2, time), rising(2, time), window=window)

  def in_blocks(q, k, v):
    out = self_attend(q, k, v, rising(2, time), None, window, cap=cap)
    return jnp.vdot(weights, out.astype(jnp.float32))

  def at_once(q, k, v):
    return jnp.vdot(weights, attend(q, [(k, v, mask)], cap=cap))

  ours = jax.jit(jax.grad(in_blocks, (0, 1, 2)))(*rounded)
  exact = jax.jit(jax.grad(at_once, (0, 1, 2)))(*(x.astype(jnp.float32) for x in rounded))
  for one, other in zip(ours, exact, strict=True):
    assert one.dtype == jnp.bfloat16
    np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.02 * np.abs(other).max())


def test_blocks_grow_when_there_would_be_too_many():
  time = 2_100
  q, k, v = draw(1, time)
  out = jax.jit(self_attend)(q, k, v, rising(1, time))
  mask = causal_mask(rising(1, time), rising(1, time))
  np.testing.assert_allclose(out, jax.jit(attend)(q, [(k, v, mask)]), atol=1e-5)

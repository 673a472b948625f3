import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.loss import completion_loss, token_losses, with_target

BATCH, TIME, DEPTH, VOCAB = 3, 17, 8, 29


def draw(seed, share, dtype=jnp.float32):
  """hidden_BTD, targets_BT, weights_BT; a `share` of the positions has a target."""
  rng = np.random.default_rng(seed)
  hidden = jnp.asarray(rng.standard_normal((BATCH, TIME, DEPTH)), dtype)
  targets = jnp.asarray(rng.integers(0, VOCAB, (BATCH, TIME)), jnp.int32)
  weights = (rng.random((BATCH, TIME)) < share) * rng.uniform(0.5, 2, (BATCH, TIME))
  return hidden, targets, jnp.asarray(weights, jnp.float32)


TABLE = jnp.asarray(np.random.default_rng(0).standard_normal((DEPTH, VOCAB)), jnp.float32)


def head(hidden):
  return jnp.matmul(hidden, TABLE.astype(hidden.dtype)).astype(jnp.float32)


def plain(hidden_BTD, targets_BT, weights_BT):
  log_probs_BTV = jax.nn.log_softmax(head(hidden_BTD))
  picked_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
  return -jnp.sum(picked_BT * weights_BT)


def ours(hidden_BTD, targets_BT, weights_BT, chunk=128):
  return completion_loss(head, hidden_BTD, targets_BT, weights_BT, chunk)


@functools.cache
def compiled(f, **options):
  return jax.jit(jax.value_and_grad(functools.partial(f, **options)))


def assert_same(result, expected, tolerance=1e-4):
  np.testing.assert_allclose(result[0], expected[0], rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(
    result[1].astype(jnp.float32), expected[1].astype(jnp.float32), rtol=tolerance, atol=tolerance
  )


# 51 positions: chunks that divide them, that do not, of one position, and larger than all.
@pytest.mark.parametrize('chunk', [1, 7, 17, 50, 51, 128])
def test_equals_cross_entropy_in_value_and_gradient(chunk):
  for seed, share in enumerate([0.0, 0.1, 0.5, 0.9, 1.0]):
    given = draw(seed, share)
    assert_same(compiled(ours, chunk=chunk)(*given), compiled(plain)(*given))


def test_positions_without_a_target_may_hold_anything():
  hidden, targets, weights = draw(0, 0.3)
  given = hidden, jnp.where(weights == 0, VOCAB - 1, targets), weights
  assert_same(compiled(ours)(*given), compiled(ours)(hidden, targets, weights), 1e-6)
  broken = jnp.where(weights[..., None] == 0, 1e4, hidden)
  loss, gradient = compiled(ours)(broken, targets, weights)
  np.testing.assert_allclose(loss, compiled(ours)(hidden, targets, weights)[0], rtol=1e-6)
  assert (gradient[weights == 0] == 0).all()


def test_no_target_is_no_loss_and_no_gradient():
  hidden, targets, weights = draw(0, 0.0)
  loss, gradient = compiled(ours)(hidden, targets, weights)
  assert loss == 0
  assert not gradient.any()


def test_cotangent_scales_the_gradient():
  hidden, targets, weights = draw(0, 0.5)
  gradient = compiled(ours)(hidden, targets, weights)[1]
  scaled = jax.grad(lambda h: ours(h, targets, weights) / 7)(hidden)
  np.testing.assert_allclose(scaled, gradient / 7, atol=1e-6)


def test_vmap_equals_each_alone():
  many = [draw(seed, share) for seed, share in enumerate([0.1, 0.9, 0.0, 0.4])]
  stacked = [jnp.stack(leaves) for leaves in zip(*many, strict=True)]
  work = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(ours, chunk=7))))
  losses, gradients = work(*stacked)
  for i, given in enumerate(many):
    assert_same((losses[i], gradients[i]), compiled(plain)(*given))


def test_vmap_with_one_count_for_all_equals_each_alone():
  many = [draw(seed, share) for seed, share in enumerate([0.1, 0.6, 0.0, 0.4])]
  in_use = max(with_target(weights) for *_, weights in many)
  assert 0 < in_use < BATCH * TIME - 7
  stacked = [jnp.stack(leaves) for leaves in zip(*many, strict=True)]
  one = lambda *given: completion_loss(head, *given, chunk=7, in_use=in_use)
  losses, gradients = jax.jit(jax.vmap(jax.value_and_grad(one)))(*stacked)
  for i, given in enumerate(many):
    assert_same((losses[i], gradients[i]), compiled(plain)(*given))


def test_the_head_runs_on_no_more_chunks_than_are_in_use():
  hidden, targets, weights = draw(0, 0.2)
  ran = []

  def counted(hidden_CD):
    jax.debug.callback(lambda: ran.append(1))
    return head(hidden_CD)

  stack = lambda x: jnp.stack([x, x])
  in_use = with_target(weights)
  one = lambda *given: completion_loss(counted, *given, chunk=3, in_use=jnp.int32(in_use))
  jax.block_until_ready(jax.vmap(one)(stack(hidden), stack(targets), stack(weights)))
  jax.effects_barrier()
  # Once for both.
  assert len(ran) == -(-in_use // 3) < BATCH * TIME // 3


@pytest.mark.parametrize(('targets', 'rows'), [(0, 0), (1, 32), (32, 32), (33, 64), (70, 128)])
def test_the_head_runs_on_part_of_a_chunk_with_few_targets(targets, rows):
  ran = []

  def counted(hidden):
    jax.debug.callback(lambda: ran.append(hidden.shape[0]))
    return head(hidden)

  random = np.random.default_rng(0)
  hidden_BTD = jnp.asarray(random.standard_normal((1, 300, DEPTH)), jnp.float32)
  weights_BT = np.zeros((1, 300), np.float32)
  weights_BT[0, random.permutation(300)[:targets]] = 1
  given = hidden_BTD, jnp.asarray(random.integers(0, VOCAB, (1, 300))), jnp.asarray(weights_BT)
  result = jax.value_and_grad(lambda *given: completion_loss(counted, *given))(*given)
  jax.effects_barrier()
  assert {*ran} == ({rows} if rows else set())
  assert_same(result, compiled(plain)(*given))


def test_bfloat16_hidden_states_give_a_float32_loss_and_bfloat16_gradients():
  given = draw(0, 0.5, jnp.bfloat16)
  loss, gradient = compiled(ours, chunk=7)(*given)
  assert (loss.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
  assert_same((loss, gradient), compiled(plain)(*given), 0.02)


def test_losses_of_large_logits_are_exact():
  logits = jnp.asarray([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
  losses = token_losses(logits, jnp.asarray([1, 2]))
  np.testing.assert_allclose(losses, [1e4, np.log(3)], rtol=1e-6)

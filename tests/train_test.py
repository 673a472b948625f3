import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import CONFIG, MODEL

from lora_jax import lora, packs
from lora_jax.config import LoraConfig, OptimConfig, TrainConfig
from lora_jax.parts import part_rows
from lora_jax.step import (
  batch_loss,
  init_state,
  make_evaluation,
  make_step,
  stack_batches,
)
from lora_jax.train import DivergedError, TrainJob, train
from lora_jax.transformer import Transformer

LORA = LoraConfig(rank=4, alpha=8.0)
OPTIM = OptimConfig(learning_rate=2e-2, lr_ratio=1.0)
STEPS = TrainConfig(steps=30, eval_every=10, dtype='float32')
ROWS, LENGTH = 4, 16
# Tokens that occur.
_USED = 12


def toy_batches(seed=0):
  """An endless stream in which each completion token is a fixed function of the one before.

  Two packed sequences a row, the second with padding after it.
  """
  rng = np.random.default_rng(seed)
  after = np.random.default_rng(0).permutation(_USED)
  half = LENGTH // 2
  while True:
    ids = np.zeros((ROWS, 2, half + 1), np.int32)
    ids[:, :, :3] = rng.integers(0, _USED, (ROWS, 2, 3))
    for i in range(3, half + 1):
      ids[:, :, i] = after[ids[:, :, i - 1]]
    weights = np.broadcast_to(np.arange(half) >= 2, (ROWS, 2, half)).astype(np.float32)
    segments = np.broadcast_to(np.asarray([[1], [2]]), (ROWS, 2, half)).copy()
    segments[:, 1, -1] = 0
    weights = weights * (segments > 0)
    flat = lambda x: np.ascontiguousarray(x.reshape(ROWS, LENGTH))
    yield {
      'tokens': flat(ids[:, :, :-1]),
      'targets': flat(ids[:, :, 1:]),
      'weights': flat(weights),
      'positions': flat(np.broadcast_to(np.arange(half, dtype=np.int32), (ROWS, 2, half))),
      'segments': flat(segments.astype(np.int32)),
    }


def run(
  seed=0,
  targets='all',
  base=None,
  log=lambda entry: None,
  model=MODEL,
  optim=OPTIM,
  stop=lambda: False,
  **changes,
):
  base = tiny_model.params() if base is None else base
  config = dataclasses.replace(STEPS, **changes)
  watched = list(itertools.islice(toy_batches(99), 2))
  job = TrainJob(lora.resolve(targets, base), LORA, optim, seed, toy_batches, watched, log)
  return train(model, base, job, config, stop=stop)


@functools.cache
def learned():
  entries = []
  return run(log=entries.append), entries


def test_the_loss_falls_on_rows_trained_on_and_on_rows_kept_out():
  outcome, _ = learned()
  assert np.mean(outcome.losses[-5:]) < 0.6 * outcome.losses[0]
  assert [step for step, _ in outcome.eval_losses] == [10, 20, 30]
  assert outcome.eval_losses[-1][1] < 0.7 * outcome.losses[0]
  assert outcome.bad_steps == 0


def test_a_fresh_adapter_starts_at_the_loss_of_the_base():
  outcome, _ = learned()
  batch = next(toy_batches())
  hidden_BTD, _ = MODEL.apply(
    {'params': tiny_model.params()}, batch['tokens'], batch['positions'], batch['segments']
  )
  logits_BTV = MODEL.apply({'params': tiny_model.params()}, hidden_BTD, method='head')
  picked = np.take_along_axis(jax.nn.log_softmax(logits_BTV), batch['targets'][..., None], -1)[
    ..., 0
  ]
  expected = -(picked * batch['weights']).sum() / batch['weights'].sum()
  assert outcome.losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_what_was_seen_is_counted():
  outcome, entries = learned()
  batch = next(toy_batches())
  assert outcome.tokens == 30 * (batch['segments'] > 0).sum()
  assert outcome.completion_tokens == 30 * batch['weights'].sum()
  assert outcome.examples == 30 * 2 * ROWS
  assert 0 < outcome.compile_seconds < outcome.seconds
  steps = [entry for entry in entries if 'loss' in entry]
  assert [entry['loss'] for entry in steps] == outcome.losses
  assert [entry['step'] for entry in steps] == [*range(1, 31)]
  evaluations = [(entry['step'], entry['eval_loss']) for entry in entries if 'eval_loss' in entry]
  assert evaluations == outcome.eval_losses


def test_the_seed_decides_the_run():
  outcome, _ = learned()
  again, other = run(), run(seed=1)
  assert again.losses == outcome.losses
  for one, two in zip(
    jax.tree.leaves(again.adapters), jax.tree.leaves(outcome.adapters), strict=True
  ):
    np.testing.assert_array_equal(one, two)
  assert other.losses != outcome.losses


def test_two_steps_end_to_end_leave_the_base_as_it_was():
  base = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tiny_model.params())
  before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(base)]
  model = Transformer(CONFIG, dtype=jnp.bfloat16, remat=True)
  outcome = run(base=base, model=model, targets='o_proj,fc2', steps=2, eval_every=2)
  assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(base)] == before
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base))
  assert outcome.losses[1] != outcome.losses[0]
  fresh = lora.init(jax.random.key(0), base, lora.resolve('o_proj,fc2', base), LORA.rank)
  assert jax.tree.structure(outcome.adapters) == jax.tree.structure(fresh)
  assert {leaf.dtype for leaf in jax.tree.leaves(outcome.adapters)} == {jnp.dtype('float32')}


@pytest.mark.slow
@pytest.mark.parametrize('positions', [1, LENGTH, 2 * LENGTH])
def test_parts_of_a_batch_add_up_to_it(positions):
  whole, parts = (run(positions=n, steps=4, eval_every=2) for n in (ROWS * LENGTH, positions))
  np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)
  np.testing.assert_allclose(parts.eval_losses, whole.eval_losses, rtol=1e-5)
  tiny_model.assert_trees_close(parts.adapters, whole.adapters, atol=1e-4)


@pytest.mark.parametrize(
  ('rows', 'length', 'cells', 'positions', 'together'),
  [
    (8, 128, 1, 1024, 8),
    (8, 256, 1, 1024, 4),
    (6, 256, 1, 1024, 3),
    (5, 384, 1, 1024, 1),
    (8, 128, 4, 1024, 2),
    (2, 2048, 1, 1024, 1),
    (8, 256, 1, 0, 4),
  ],
)
def test_parts_are_as_large_as_may_be_and_alike(rows, length, cells, positions, together):
  assert part_rows(rows, length, cells, positions) == together


def test_small_updates_survive_a_bfloat16_base():
  base = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tiny_model.params())
  model = Transformer(CONFIG, dtype=jnp.bfloat16)
  # Far below the resolution of bfloat16 next to A, whose entries are about 0.1.
  optim = OptimConfig(learning_rate=1e-6, lr_ratio=1.0)
  outcome = run(base=base, model=model, optim=optim, targets='o_proj', steps=3, eval_every=3)
  fresh = lora.init(jax.random.key(0), base, lora.resolve('o_proj', base), LORA.rank)
  a, start = (tree['layers']['attn']['o_proj']['a'] for tree in (outcome.adapters, fresh))
  assert (a != start).mean() > 0.95
  assert (a.astype(jnp.bfloat16) != start.astype(jnp.bfloat16)).mean() < 0.05
  assert (outcome.adapters['layers']['attn']['o_proj']['b'] != 0).mean() > 0.95


def evaluate(adapters, batches):
  states = packs.stack([init_state(adapters, LORA, OPTIM, 1, 0)])
  (mean,) = make_evaluation(MODEL, 1)(states.pack, tiny_model.params(), batches)
  return mean


@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_a_step_uses_dropout_where_asked_and_evaluation_never(dropout):
  adapters, batch = tiny_model.trained_adapters('all'), stack_batches([next(toy_batches())])
  step = make_step(MODEL, 1, dropout)
  losses = []
  for seed in range(2):
    states = packs.stack([init_state(adapters, LORA, OPTIM, 10, seed)])
    metrics = step(states, tiny_model.params(), batch, np.asarray([True]))[1]
    losses.append(float(metrics['loss'][0]))
  exact = evaluate(adapters, [batch])
  if dropout:
    assert abs(losses[0] - losses[1]) > 1e-4
    assert abs(losses[0] - exact) > 1e-4
  else:
    assert losses[0] == losses[1] == pytest.approx(exact, rel=1e-6)


def test_evaluation_weighs_tokens_not_batches():
  one, two = itertools.islice(toy_batches(5), 2)
  two = {**two, 'weights': two['weights'] * (np.arange(LENGTH) < 4)}
  adapters = tiny_model.trained_adapters('o_proj')
  mean = evaluate(adapters, [stack_batches([batch]) for batch in (one, two)])
  sums = [
    batch_loss(MODEL, tiny_model.params(), adapters, batch, LORA.scale) for batch in (one, two)
  ]
  totals, counts = zip(*sums, strict=True)
  assert counts[0] > 2 * counts[1]
  assert mean == pytest.approx(float(sum(totals) / sum(counts)), rel=1e-5)


def test_a_broken_base_is_given_up():
  broken = dict(tiny_model.params(), norm={'scale': jnp.full(CONFIG.model_dim, jnp.nan)})
  with pytest.raises(DivergedError, match='5 updates in a row were not finite, up to step 5'):
    run(base=broken)


def test_a_short_run_without_one_sound_update_is_given_up():
  broken = dict(tiny_model.params(), norm={'scale': jnp.full(CONFIG.model_dim, jnp.nan)})
  with pytest.raises(DivergedError):
    run(base=broken, steps=2)


def test_one_bad_batch_is_left_out_and_counted():
  batch = next(toy_batches())
  # No such token: its embedding is NaN.
  bad = batch | {'tokens': np.full_like(batch['tokens'], CONFIG.vocab_size)}
  sound = toy_batches()
  stream = itertools.chain(itertools.islice(sound, 3), [bad], sound)
  base = tiny_model.params()
  config = dataclasses.replace(STEPS, steps=6)
  outcome = train(
    MODEL, base, TrainJob(lora.resolve('all', base), LORA, OPTIM, 0, lambda: stream), config
  )
  assert outcome.bad_steps == 1
  assert list(np.isfinite(outcome.losses)) == [True] * 3 + [False] + [True] * 2
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome.adapters))


def test_a_rate_too_high_is_given_up():
  entries = []
  with pytest.raises(DivergedError):
    run(optim=OptimConfig(learning_rate=float('inf')), log=entries.append)
  # The first step was still sound.
  assert np.isfinite(entries[0]['loss'])
  assert len(entries) < 30


def scripted(monkeypatch, losses):
  """Evaluations that give these losses, whatever was learned."""
  given = iter(losses)
  monkeypatch.setattr(
    'lora_jax.train.make_evaluation', lambda model, cells: lambda *arguments: [next(given)]
  )


def trained(**changes):
  return run(targets='o_proj', steps=8, eval_every=2, **changes)


def same(one, other):
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return all(np.array_equal(a, b) for a, b in pairs)


def test_the_best_is_what_its_step_had(monkeypatch):
  scripted(monkeypatch, [9.0, 3.0, 1.0, 2.0, 1.5])
  outcome = trained(keep_best=True)
  assert (outcome.kept_step, outcome.stopped) == (4, 'finished')
  assert outcome.eval_losses == [(0, 9.0), (2, 3.0), (4, 1.0), (6, 2.0), (8, 1.5)]
  # The schedule spans 8 steps; an end after the fourth leaves what the best was.
  scripted(monkeypatch, [9.0] * 5)
  steps = iter(range(9))
  after_four = trained(stop=lambda: next(steps) == 4)
  assert (after_four.kept_step, after_four.stopped) == (4, 'interrupted')
  assert same(outcome.adapters, after_four.adapters)
  assert len(outcome.losses) == 8


def test_without_asking_the_last_is_given(monkeypatch):
  scripted(monkeypatch, [1.0, 2.0, 3.0, 4.0])
  last = trained()
  assert (last.kept_step, last.stopped) == (8, 'finished')
  assert [step for step, _ in last.eval_losses] == [2, 4, 6, 8]
  scripted(monkeypatch, [4.0, 3.0, 2.0, 1.0])
  assert same(trained().adapters, last.adapters)


@pytest.mark.parametrize(
  ('patience', 'steps', 'stopped'), [(1, 6, 'patience'), (2, 8, 'finished'), (0, 8, 'finished')]
)
def test_patience_counts_evaluations_without_a_lower_loss(monkeypatch, patience, steps, stopped):
  scripted(monkeypatch, [9.0, 3.0, 2.0, 2.0, 2.5])
  outcome = trained(keep_best=True, patience=patience)
  assert (len(outcome.losses), outcome.stopped) == (steps, stopped)
  assert outcome.kept_step == 4


def test_a_loss_that_is_no_number_is_never_the_best(monkeypatch):
  nan = float('nan')
  scripted(monkeypatch, [9.0, nan, 5.0, nan, nan])
  assert trained(keep_best=True).kept_step == 4
  scripted(monkeypatch, [9.0, nan, nan, nan, nan])
  assert trained(keep_best=True).kept_step == 8


def test_a_run_stopped_before_its_first_step_keeps_nothing():
  outcome = trained(stop=lambda: True)
  assert (outcome.kept_step, outcome.stopped, outcome.losses) == (0, 'interrupted', [])
  assert outcome.record()['stopped'] == 'interrupted'


def test_what_diverges_after_its_best_gives_the_best(monkeypatch):
  batch = next(toy_batches())
  bad = batch | {'tokens': np.full_like(batch['tokens'], CONFIG.vocab_size)}
  sound = itertools.islice(toy_batches(), 2)
  scripted(monkeypatch, [9.0, 3.0, 4.0, 5.0])
  base = tiny_model.params()
  config = dataclasses.replace(STEPS, steps=9, eval_every=2, keep_best=True)
  paths = lora.resolve('o_proj', base)
  stream = itertools.chain(sound, itertools.repeat(bad))
  outcome = train(MODEL, base, TrainJob(paths, LORA, OPTIM, 0, lambda: stream, [batch]), config)
  assert (outcome.kept_step, outcome.stopped) == (2, 'diverged')

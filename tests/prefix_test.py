"""Rows that share a prefix in a row of the batch compute what each would alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import CONFIG, SCALE

from lora_jax.attention import SHARED
from lora_jax.data import pipeline
from lora_jax.data.encode import Encoded
from lora_jax.step import batch_loss
from lora_jax.transformer import Transformer

PREFIX = 21


@functools.cache
def made_rows():
  """Rows that begin alike; one has a single token after that."""
  rng = np.random.default_rng(0)
  shared = rng.integers(0, CONFIG.vocab_size, PREFIX)
  rows = []
  for length in (1, *rng.integers(2, 40, 17)):
    ids = np.asarray([*shared, *rng.integers(0, CONFIG.vocab_size, length + 1)], np.int32)
    # Rows must not agree by chance.
    ids[PREFIX] = len(rows)
    weights = np.zeros(len(ids) - 1, np.float32)
    weights[PREFIX + rng.integers(0, length) :] = 1
    arrays = {'tokens': ids[:-1], 'targets': ids[1:], 'weights': weights}
    rows.append(Encoded(arrays, cut=False))
  return rows


def alone():
  """A batch with each row in a row of its own."""
  rows = made_rows()
  length = max(map(len, rows))
  pad = lambda array: np.pad(array, (0, length - len(array)))
  batch = {name: np.stack([pad(row.arrays[name]) for row in rows]) for name in rows[0].arrays}
  batch['segments'] = np.stack([pad(np.ones(len(row), np.int32)) for row in rows])
  batch['positions'] = np.broadcast_to(np.arange(length, dtype=np.int32), batch['tokens'].shape)
  return batch


def packed():
  """The same rows packed after what they share."""
  rows = made_rows()
  # A few rows of more than a block of attention each.
  shape = pipeline.BatchShape(2, 256, pipeline.shared_prefix(rows))
  assert len(shape.prefix) == PREFIX
  return pipeline.evaluation_batches(rows, shape)


def loss_and_gradient(model, base, batches):
  """Of the mean loss over all batches, and its gradient for every adapter."""
  adapters = tiny_model.trained_adapters('all', of=base)
  one = jax.jit(
    jax.value_and_grad(lambda *args: batch_loss(*args, SCALE), 2, has_aux=True), static_argnums=0
  )
  done = [one(model, base, adapters, batch) for batch in batches]
  count = sum(count for (_, count), _ in done)
  mean = lambda *leaves: sum(leaves) / count
  return mean(*(loss for (loss, _), _ in done)), jax.tree.map(mean, *(grad for _, grad in done))


WINDOWS = dataclasses.replace(CONFIG, windows=(4, 0, 25), qk_norm=True, attention_cap=3.0)


@pytest.mark.slow
@pytest.mark.parametrize(('config', 'remat'), [(CONFIG, False), (WINDOWS, True)])
def test_losses_and_gradients_are_those_of_the_rows_alone(config, remat):
  model, base = Transformer(config, remat=remat), tiny_model.params(config)
  loss, gradient = loss_and_gradient(model, base, packed())
  expected_loss, expected = loss_and_gradient(model, base, [alone()])
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  tiny_model.assert_trees_close(gradient, expected, atol=2e-6, rtol=1e-4)


def test_what_follows_the_prefix_depends_on_it_and_not_on_its_neighbours():
  model, base = Transformer(CONFIG), tiny_model.params()
  batch = packed()[0]
  segments = batch['segments']
  assert segments.max() > 2

  def hidden(tokens_BT):
    run = jax.jit(lambda t: model.apply({'params': base}, t, batch['positions'], segments)[0])
    return np.asarray(run(jnp.asarray(tokens_BT)))

  def changed(where):
    tokens_BT = np.where(where, (batch['tokens'] + 1) % CONFIG.vocab_size, batch['tokens'])
    return np.abs(hidden(tokens_BT) - hidden(batch['tokens'])).max(-1)

  by_prefix = changed(segments == SHARED)
  assert (by_prefix[segments != 0] > 0).all()
  by_neighbour = changed(segments == 1)
  assert (by_neighbour[segments == 1] > 0).all()
  assert (by_neighbour[segments != 1] == 0).all()

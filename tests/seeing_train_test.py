"""Rows with images in batches, in training, in generation: kept features change nothing."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seeing
import tiny_model
import tiny_vlm
from packs_test import assert_same

from lora_jax import evaluate, lora, packs
from lora_jax.config import LoraConfig, OptimConfig, TrainConfig
from lora_jax.data import encode, pipeline
from lora_jax.grid import Trainer
from lora_jax.step import batch_loss, stack_batches
from lora_jax.train import TrainJob, prepare, train_wave
from lora_jax.vision import Features

MODEL, SCALE = tiny_vlm.MODEL, 2.0
LORA = LoraConfig(rank=4, alpha=8)


@pytest.fixture(scope='module')
def rows_and_files(tmp_path_factory):
  rows, sight = seeing.looked(tmp_path_factory.mktemp('seeing'), seeing.rows(12))
  return rows, sight.files


def alone(rows, files):
  """Each row in a batch of its own, all of one shape."""
  room = max(row.embeddings for row in rows)
  shape = pipeline.BatchShape(1, 384, embeddings=room)
  return [pipeline.evaluation_batches([row], shape, files)[0] for row in rows]


@functools.cache
def compiled():
  loss = lambda adapters, batch: batch_loss(MODEL, tiny_vlm.params(), adapters, batch, SCALE)
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def loss_and_gradient(batches):
  """Of the mean loss over all batches."""
  adapters = tiny_model.trained_adapters('all', of=tiny_vlm.params())
  done = [compiled()(adapters, batch) for batch in batches]
  count = sum(count for (_, count), _ in done)
  mean = lambda *leaves: sum(leaves) / count
  return mean(*(loss for (loss, _), _ in done)), jax.tree.map(mean, *(grad for _, grad in done))


def test_packed_rows_with_several_images_are_the_rows_alone(rows_and_files):
  rows, files = rows_and_files
  shape = dataclasses.replace(pipeline.batch_shape(rows, 1024), rows=2)
  batches = pipeline.evaluation_batches(rows, shape, files)
  assert any(batch['segments'].max() > 2 for batch in batches)
  assert sum((batch['slots'] >= 0).sum() for batch in batches) == sum(r.embeddings for r in rows)
  for batch in batches:
    assert batch['features'].shape == (2, shape.embeddings, tiny_vlm.CONFIG.model_dim)
    # Each embedding is used once, in order.
    for slots in batch['slots']:
      used = slots[slots >= 0]
      assert used.tolist() == list(range(len(used)))
  loss, gradient = loss_and_gradient(batches)
  expected_loss, expected = loss_and_gradient(alone(rows, files))
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  tiny_model.assert_trees_close(gradient, expected, atol=2e-6, rtol=1e-4)


def test_the_loss_is_that_with_the_tower_in_the_loop(rows_and_files):
  rows, files = rows_and_files
  examples = seeing.rows(12)
  batch = alone(rows, files)[5]
  pixels = [
    seeing.EYES.tiles(image, picture)
    for image, picture in zip(examples[5]['images'], rows[5].pictures, strict=True)
  ]
  assert len(pixels) == 2
  adapters = tiny_model.trained_adapters('all', of=tiny_vlm.params())

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def in_the_loop(adapters, batch, pixels_IYXC):
    params = lora.attach(tiny_vlm.params(), adapters, SCALE)
    seen = MODEL.apply({'params': params}, pixels_IYXC, method='see')
    values_1ED = jax.lax.stop_gradient(seen).reshape(1, -1, tiny_vlm.CONFIG.model_dim)
    whole = {**batch, 'features': values_1ED}
    return batch_loss(MODEL, tiny_vlm.params(), adapters, whole, SCALE)

  (loss, count), gradient = compiled()(adapters, batch)
  (expected, of), expected_gradient = in_the_loop(adapters, batch, np.concatenate(pixels))
  assert count == of > 0
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  tiny_model.assert_trees_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)
  blind = {**batch, 'features': np.zeros_like(batch['features'])}
  (other, _), _ = compiled()(adapters, blind)
  assert abs(other - loss) > 1e-3


def test_all_batches_of_an_endless_stream_have_one_shape(rows_and_files):
  rows, files = rows_and_files
  shape = pipeline.batch_shape(rows, 512)
  stream = pipeline.training_batches(rows, shape, 3, files)
  shapes = {
    tuple((name, array.shape) for name, array in sorted(batch.items()))
    for batch in itertools.islice(stream, 40)
  }
  empty = pipeline.empty_batch(shape, files.width, files.dtype)
  assert shapes == {tuple((name, array.shape) for name, array in sorted(empty.items()))}
  assert shape.embeddings <= shape.length


def test_rows_without_images_have_batches_as_ever(rows_and_files):
  rows, files = rows_and_files
  text = [row for row in rows if not row.pictures]
  assert len(text) == 4
  shape = pipeline.batch_shape(text, 512)
  assert shape.embeddings == 0
  batch = next(pipeline.training_batches(text, shape, 0, files))
  assert {*batch} == {'tokens', 'targets', 'positions', 'segments', 'weights'}
  with pytest.raises(ValueError, match='need the features'):
    pipeline.evaluation_batches(rows, pipeline.batch_shape(rows, 512))


def test_what_is_shared_ends_before_the_first_image(tmp_path):
  tokenizer = seeing.tokenizer(tmp_path / 'tokenizer')
  like = lambda i: {
    'id': str(i),
    'text': 'the same words in all of them',
    'images': (seeing.encoded(seed=i),),
    'answer': 'ABCDEFGH'[i],
  }
  encoded = pipeline.encode_split(
    seeing.TASK, [like(i) for i in range(8)], tokenizer, seeing.LIMITS, seeing.EYES
  )
  first = int((encoded[0].arrays['slots'] >= 0).argmax())
  # All of their prompts are the same tokens.
  tokens = {tuple(row.arrays['tokens'][: len(row) - 2].tolist()) for row in encoded}
  assert len(tokens) == 1
  prefix = pipeline.shared_prefix(encoded)
  assert prefix == tuple(encoded[0].arrays['tokens'][:first].tolist())
  # As text alone they would share all of it.
  assert len(pipeline.shared_prefix([without_images(row) for row in encoded])) > first + 20


def without_images(row):
  arrays = {name: array for name, array in row.arrays.items() if name != 'slots'}
  return encode.Encoded(arrays, row.cut)


def test_features_stand_where_their_images_do_behind_a_shared_prefix(rows_and_files):
  rows, files = rows_and_files
  prefix = pipeline.shared_prefix(rows)
  assert prefix
  shape = pipeline.batch_shape(rows, 1024)
  shape = dataclasses.replace(shape, prefix=prefix, rows=2)
  loss, gradient = loss_and_gradient(pipeline.evaluation_batches(rows, shape, files))
  expected_loss, expected = loss_and_gradient(alone(rows, files))
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  tiny_model.assert_trees_close(gradient, expected, atol=2e-6, rtol=1e-4)


def job(targets, seed, rows, shape, files):
  return TrainJob(
    lora.resolve(targets, tiny_vlm.params()),
    LORA,
    OptimConfig(),
    seed,
    lambda: pipeline.training_batches(rows[:-3], shape, seed, files),
    pipeline.evaluation_batches(rows[-3:], shape, files),
  )


@pytest.mark.slow
def test_packed_cells_and_parts_train_as_alone(rows_and_files):
  rows, files = rows_and_files
  shape = dataclasses.replace(pipeline.batch_shape(rows, 512), rows=2)
  base, cells = tiny_vlm.params(), [('o_proj', 0), ('fc2', 1)]
  config = TrainConfig(steps=4, eval_every=2, dtype='float32')
  jobs = [job(*cell, rows, shape, files) for cell in cells]
  ((_, together),) = Trainer(MODEL, base, config, cells=2).train(jobs, shape)
  in_parts = dataclasses.replace(config, positions=shape.length)
  for cell, outcome in zip(cells, together, strict=True):
    one = job(*cell, rows, shape, files)
    batch = stack_batches([next(one.batches())], shape.length)
    assert batch['features'].shape[:3] == (1, 2, 1)
    wave = prepare(base, [one], config.steps)
    assert_same(outcome, train_wave(MODEL, base, wave, in_parts)[0])
    assert outcome.cells == 2


def questions(rows_and_files, directory):
  rows, files = rows_and_files
  examples, tokenizer = seeing.rows(12)[:6], seeing.tokenizer(directory / 'tokenizer')
  return evaluate.Questions(
    seeing.TASK,
    examples,
    [encode.encode_prompt(seeing.TASK, e, tokenizer, 480, seeing.EYES) for e in examples],
    tokenizer,
    6,
    eyes=seeing.EYES,
    pictures=[row.pictures for row in rows[:6]],
    features=files,
  )


def by_full_forward(params, ids, values_ED, new):
  """Greedy tokens with neither cache nor batch."""
  ids = list(ids)
  for _ in range(new):
    tokens_1T = jnp.asarray([ids + [0] * (512 - len(ids))], jnp.int32)
    slots_1T = jnp.asarray(seeing.EYES.slots(np.asarray(tokens_1T)))
    hidden_1TD, _ = _forward(params, tokens_1T, Features(jnp.asarray(values_ED[None]), slots_1T))
    logits_V = MODEL.apply({'params': params}, hidden_1TD[:, len(ids) - 1], method='head')[0]
    ids.append(int(logits_V.argmax()))
  return ids[-new:]


@jax.jit
def _forward(params, tokens_BT, features):
  return MODEL.apply({'params': params}, tokens_BT, features=features)


def test_predictions_are_those_of_a_full_forward_and_of_packed_cells(rows_and_files, tmp_path):
  asked = questions(rows_and_files, tmp_path)
  base, (_, files) = tiny_vlm.params(), rows_and_files
  trees = [
    tiny_model.trained_adapters(names, seed, base) for seed, names in enumerate(('all', 'fc2'))
  ]
  of_pack = evaluate.score_pack(MODEL, base, pack(trees), 2, asked, batch_rows=8)
  for tree, packed in zip(trees, of_pack, strict=True):
    params = lora.attach(base, tree, SCALE)
    scores = evaluate.score_task(MODEL, params, asked, batch_rows=4)
    said = [row.prediction for row in scores.rows]
    assert said == [row.prediction for row in packed.rows]
    assert len(set(said)) > 1
    for i, prediction in enumerate(said[:3]):
      values_ED = np.zeros((64, files.width), np.float32)
      seen = files.of(asked.pictures[i])
      values_ED[: len(seen)] = seen
      found = by_full_forward(params, asked.prompts[i], values_ED, asked.max_new_tokens)
      assert asked.tokenizer.decode(found) == prediction
  blank = dataclasses.replace(asked, features=_Blank(files))
  other = evaluate.score_task(MODEL, lora.attach(base, trees[0], SCALE), blank, batch_rows=4)
  shown = [bool(pictures) for pictures in asked.pictures]
  pairs = zip(other.rows, of_pack[0].rows, strict=True)
  differ = [one.prediction != theirs.prediction for one, theirs in pairs]
  assert any(differ)
  assert all(sees or not differs for sees, differs in zip(shown, differ, strict=True))


class _Blank:
  """Features that say nothing."""

  def __init__(self, files):
    self.width, self.dtype, self.of = files.width, files.dtype, lambda p: 0 * files.of(p)


def pack(trees):
  shapes = packs.union(trees)
  scale = dataclasses.replace(LORA, rank=4, alpha=4 * SCALE)
  return packs.stack(
    [packs.Pack(packs.embed(tree, shapes), packs.scales(tree, scale, shapes)) for tree in trees]
  )

import itertools

import numpy as np
import pytest

from lora_jax.data import pipeline
from lora_jax.data.encode import Encoded, budget
from lora_jax.data.tasks import TASKS
from lora_jax.hub import bases


def made_rows(count, low=5, high=120, seed=0):
  """Rows whose every token is their own, so that each can be found again."""
  rng = np.random.default_rng(seed)
  rows, start = [], 1
  for length in rng.integers(low, high, count):
    ids = np.arange(start, start + length + 1, dtype=np.int32)
    start += length + 1
    weights = (np.arange(length) >= rng.integers(0, length)).astype(np.float32)
    arrays = {'tokens': ids[:-1], 'targets': ids[1:], 'weights': weights}
    rows.append(Encoded(arrays, cut=False))
  return rows


def unpacked(batch):
  """(tokens, targets, weights) of each sequence in a batch, checking how it is laid out."""
  found = []
  for row in range(len(batch['tokens'])):
    segments = batch['segments'][row]
    assert set(segments) - {0} == set(range(1, segments.max() + 1))
    for segment in range(1, segments.max() + 1):
      at = np.flatnonzero(segments == segment)
      # In one piece and in order.
      assert (np.diff(at) == 1).all()
      assert batch['positions'][row, at].tolist() == list(range(len(at)))
      found.append(
        tuple(tuple(batch[name][row, at].tolist()) for name in ('tokens', 'targets', 'weights'))
      )
  return found


def as_tuples(rows):
  return [
    tuple(tuple(row.arrays[name].tolist()) for name in ('tokens', 'targets', 'weights'))
    for row in rows
  ]


@pytest.mark.parametrize('count', [1, 2, 37, 150])
def test_evaluation_sees_every_row_once_and_whole(count):
  rows = made_rows(count)
  shape = pipeline.batch_shape(rows, 1024)
  batches = pipeline.evaluation_batches(rows, shape)
  for batch in batches:
    assert {array.shape for array in batch.values()} == {(shape.rows, shape.length)}
    assert (batch['weights'][batch['segments'] == 0] == 0).all()
  assert sorted(itertools.chain(*map(unpacked, batches))) == sorted(as_tuples(rows))


def test_training_sees_whole_rows_equally_often():
  rows = made_rows(30)
  shape = pipeline.batch_shape(rows, 1024)
  seen = {tokens: 0 for tokens, _, _ in as_tuples(rows)}
  known = set(as_tuples(rows))
  stream = pipeline.training_batches(rows, shape, seed=0)
  for batch in itertools.islice(stream, 30):
    assert {array.shape for array in batch.values()} == {(shape.rows, shape.length)}
    assert (batch['weights'][batch['segments'] == 0] == 0).all()
    for sequence in unpacked(batch):
      assert sequence in known
      seen[sequence[0]] += 1
  # Rows waiting in open bins make the difference.
  assert min(seen.values()) > 5
  assert max(seen.values()) - min(seen.values()) <= 4


def same(one, other):
  return all(np.array_equal(one[name], other[name]) for name in one)


def test_the_seed_decides_the_stream():
  rows = made_rows(60)
  shape = pipeline.batch_shape(rows, 512)
  take = lambda seed: list(itertools.islice(pipeline.training_batches(rows, shape, seed), 8))
  first, again, other = take(0), take(0), take(1)
  assert all(map(same, first, again))
  assert not any(map(same, first, other))
  # Another epoch comes in another order.
  assert not any(same(a, b) for a, b in itertools.combinations(first, 2))


def test_a_stream_goes_on_where_its_state_was_saved():
  rows = made_rows(60)
  shape = pipeline.batch_shape(rows, 512)
  stream = pipeline.training_batches(rows, shape, seed=3)
  for _ in range(5):
    next(stream)
  state = stream.get_state()
  expected = [next(stream) for _ in range(6)]
  resumed = pipeline.training_batches(rows, shape, seed=3)
  resumed.set_state(state)
  assert all(map(same, [next(resumed) for _ in range(6)], expected))


# Rows longer than half of a batch's row cannot share it, so theirs is another matter.
@pytest.mark.parametrize(('low', 'high'), [(5, 30), (20, 60), (5, 64)])
def test_little_of_a_batch_is_padding_where_rows_are_short(low, high):
  rows = made_rows(300, low, high)
  shape = pipeline.batch_shape(rows, 2048)
  batches = list(itertools.islice(pipeline.training_batches(rows, shape, seed=0), 20))
  assert np.mean([batch['segments'] == 0 for batch in batches]) < 0.08


def test_shape_holds_every_row_and_keeps_to_the_token_budget():
  for count, high, budgeted in itertools.product((1, 40), (20, 129, 600), (256, 2048)):
    rows = made_rows(count, 5, high)
    shape = pipeline.batch_shape(rows, budgeted)
    longest = max(len(row) for row in rows)
    assert longest <= shape.length < max(longest + 128, budgeted + 1)
    assert shape.length % 128 == 0
    assert shape.rows * shape.length <= budgeted or shape.rows == 1
    assert (shape.rows + 1) * shape.length > budgeted


def padding(rows, shape):
  stream = pipeline.training_batches(rows, shape, seed=0)
  return np.mean([batch['segments'] == 0 for batch in itertools.islice(stream, 60)])


def test_a_row_of_the_batch_is_longer_where_that_saves_more_than_attention_costs():
  # Just over half of 384: each would have a row of 384 for itself.
  wasteful = made_rows(300, 200, 260)
  shape = pipeline.batch_shape(wasteful, 2048)
  assert shape.length > 384
  alone = pipeline.BatchShape(4, 384)
  assert padding(wasteful, shape) < padding(wasteful, alone) - 0.15
  # These fill theirs, and a longer one would only cost more.
  assert pipeline.batch_shape(made_rows(300, 500, 511), 4096).length == 512


def test_the_expected_filling_is_that_of_the_batches():
  for low, high, length in ((5, 60, 128), (200, 260, 512), (20, 300, 384)):
    rows = made_rows(400, low, high)
    expected = pipeline._share_filled([len(row) for row in rows], length)
    assert 1 - padding(rows, pipeline.BatchShape(2, length)) == pytest.approx(expected, abs=0.04)


def test_encodes_a_split_in_order():
  task, tokenizer = TASKS['medmcqa'], bases.load('tiny').tokenizer
  examples = [{'id': str(i), **row} for i, row in enumerate(task.synthetic(0, 12))]
  rows = pipeline.encode_split(task, examples, tokenizer, budget(task, 1024, 100))
  assert len(rows) == 12
  for row, example in zip(rows, examples, strict=True):
    learned = row.arrays['targets'][row.arrays['weights'] == 1]
    assert tokenizer.decode(learned) == task.target(example)
    assert example['question'].strip() in tokenizer.decode(row.arrays['tokens'])


def test_rows_too_long_to_train_on_are_left_out():
  task, tokenizer = TASKS['medmcqa'], bases.load('tiny').tokenizer
  examples = [{'id': str(i), **row} for i, row in enumerate(task.synthetic(0, 5))]
  examples[2] = {**examples[2], 'question': 'why ' * 1000}
  rows = pipeline.encode_split(task, examples, tokenizer, budget(task, 1024, 100))
  kept = pipeline.encode_split(
    task, examples[:2] + examples[3:], tokenizer, budget(task, 1024, 100)
  )
  assert as_tuples(rows) == as_tuples(kept)
  assert len(rows) == 4

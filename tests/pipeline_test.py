import itertools

import numpy as np
import pytest

from lora_jax.attention import SHARED
from lora_jax.data import pipeline
from lora_jax.data.encode import Encoded, budget
from lora_jax.data.tasks import TASKS
from lora_jax.hub import bases


def made_rows(count, low=5, high=120, seed=0, prefix=0):
  """Rows whose every token is their own, but for a prefix, so that each can be found again.

  They are `low` to `high` - 1 tokens long, the prefix not counted.
  """
  rng = np.random.default_rng(seed)
  shared = np.arange(1_000_000, 1_000_000 + prefix, dtype=np.int32)
  rows, start = [], 1
  for length in rng.integers(low, high, count):
    ids = np.concatenate([shared, np.arange(start, start + length + 1, dtype=np.int32)])
    start += length + 1
    weights = np.arange(prefix + length) >= prefix + rng.integers(0, length)
    arrays = {'tokens': ids[:-1], 'targets': ids[1:], 'weights': weights.astype(np.float32)}
    rows.append(Encoded(arrays, cut=False))
  return rows


def unpacked(batch, shape):
  """(tokens, targets, weights) of each sequence in a batch, checking how it is laid out."""
  found, shared = [], len(shape.prefix)
  assert (batch['weights'][batch['segments'] <= 0] == 0).all()
  assert {array.shape for array in batch.values()} == {(shape.rows, shape.length)}
  for row in range(shape.rows):
    segments = batch['segments'][row]
    assert set(segments) - {0, SHARED} == set(range(1, segments.max() + 1))
    if segments.max():
      assert np.flatnonzero(segments == SHARED).tolist() == list(range(shared))
      assert batch['tokens'][row, :shared].tolist() == list(shape.prefix)
      assert batch['positions'][row, :shared].tolist() == list(range(shared))
    else:
      # A row of padding is padding all over.
      assert not segments.any()
    for segment in range(1, segments.max() + 1):
      at = np.flatnonzero(segments == segment)
      # In one piece and in order.
      assert (np.diff(at) == 1).all()
      assert batch['positions'][row, at].tolist() == list(range(shared, shared + len(at)))
      found.append(
        tuple(tuple(batch[name][row, at].tolist()) for name in ('tokens', 'targets', 'weights'))
      )
  return found


def as_tuples(rows, shape):
  """What `unpacked` should find."""
  return [
    tuple(
      tuple(row.arrays[name][len(shape.prefix) :].tolist())
      for name in ('tokens', 'targets', 'weights')
    )
    for row in rows
  ]


@pytest.mark.parametrize('prefix', [0, 40])
@pytest.mark.parametrize('count', [1, 2, 37, 150])
def test_evaluation_sees_every_row_once_and_whole(count, prefix):
  rows = made_rows(count, prefix=prefix)
  shape = pipeline.batch_shape(rows, 1024)
  batches = pipeline.evaluation_batches(rows, shape)
  assert len(batches) == pipeline.batches_per_epoch(rows, shape)
  found = itertools.chain(*(unpacked(batch, shape) for batch in batches))
  assert sorted(found) == sorted(as_tuples(rows, shape))


@pytest.mark.parametrize('prefix', [0, 40])
@pytest.mark.parametrize('count', [1, 3, 100])
def test_training_sees_every_row_once_an_epoch(count, prefix):
  rows = made_rows(count, prefix=prefix)
  shape = pipeline.batch_shape(rows, 512)
  stream = pipeline.training_batches(rows, shape, seed=0)
  expected = as_tuples(rows, shape)
  # Epochs end inside of batches, but each row of a batch is of one epoch.
  found = []
  while len(found) < 3 * count:
    found += unpacked(next(stream), shape)
  for epoch in range(3):
    assert sorted(found[epoch * count : (epoch + 1) * count]) == sorted(expected)


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


def padding(rows, shape):
  stream = pipeline.training_batches(rows, shape, seed=0)
  return np.mean([batch['segments'] == 0 for batch in itertools.islice(stream, 60)])


# Rows longer than half of a batch's row cannot share it, so theirs is another matter.
@pytest.mark.parametrize(('low', 'high'), [(5, 30), (20, 60), (5, 64)])
@pytest.mark.parametrize('prefix', [0, 40])
def test_hardly_any_of_a_batch_is_padding_where_rows_are_short(low, high, prefix):
  rows = made_rows(300, low, high, prefix=prefix)
  shape = pipeline.batch_shape(rows, 2048)
  assert padding(rows, shape) < 0.03


def test_shape_holds_every_row_and_keeps_to_the_token_budget():
  for count, high, budgeted in itertools.product((1, 40), (20, 129, 600), (256, 2048)):
    rows = made_rows(count, 5, high)
    shape = pipeline.batch_shape(rows, budgeted)
    longest = max(len(row) for row in rows)
    assert longest <= shape.length < max(longest + 128, budgeted + 1)
    assert shape.length % 128 == 0
    assert shape.rows * shape.length <= budgeted or shape.rows == 1
    assert (shape.rows + 1) * shape.length > budgeted


def test_a_row_of_the_batch_is_longer_where_that_saves_more_than_attention_costs():
  # Just over half of 384: each would have a row of 384 for itself.
  wasteful = made_rows(300, 200, 260)
  shape = pipeline.batch_shape(wasteful, 2048)
  assert shape.length > 384
  alone = pipeline.BatchShape(4, 384)
  assert padding(wasteful, shape) < padding(wasteful, alone) - 0.15
  # These fill theirs, and a longer one would only cost more.
  assert pipeline.batch_shape(made_rows(300, 500, 511), 4096).length == 512


def test_the_cost_of_a_shape_is_that_of_its_batches():
  for low, high, length, prefix in ((5, 60, 128, 0), (200, 260, 512, 0), (20, 300, 384, 30)):
    rows = made_rows(400, low, high, prefix=prefix)
    shape = pipeline.BatchShape(2, length, pipeline.shared_prefix(rows))
    stream = pipeline.training_batches(rows, shape, seed=1)
    held = [pipeline.counts(next(stream)) for _ in range(200)]
    positions_a_token = sum(c.positions for c in held) / sum(c.tokens for c in held)
    expected = (1 + length / 768) * positions_a_token
    assert pipeline._cost(rows, shape) == pytest.approx(expected, rel=0.02)


def test_a_prefix_is_shared_where_that_is_cheaper():
  rows = made_rows(300, 20, 60, prefix=40)
  shape = pipeline.batch_shape(rows, 2048)
  assert shape.prefix == tuple(range(1_000_000, 1_000_040))
  # Half of a row is prefix, and nearly all of it is saved.
  held = [pipeline.counts(batch) for batch in pipeline.evaluation_batches(rows, shape)]
  assert sum(c.tokens for c in held) > 1.4 * sum(c.positions for c in held)
  # Two of these share no row of the batch, whatever begins them.
  assert pipeline.batch_shape(made_rows(300, 430, 470, prefix=40), 512).prefix == ()
  # Too little to be worth it.
  assert pipeline.batch_shape(made_rows(300, 100, 200, prefix=1), 512).prefix == ()


def row_of(tokens, learned_from):
  ids = np.asarray([*tokens, 0], np.int32)
  weights = (np.arange(len(tokens)) >= learned_from).astype(np.float32)
  return Encoded({'tokens': ids[:-1], 'targets': ids[1:], 'weights': weights}, cut=False)


@pytest.mark.parametrize(
  ('rows', 'prefix'),
  [
    ([([1, 2, 3, 4], 3), ([1, 2, 3, 5], 3)], (1, 2, 3)),
    # The first loss ends it, wherever it is.
    ([([1, 2, 3, 4], 3), ([1, 2, 3, 5], 1)], (1,)),
    ([([1, 2, 3, 4], 0), ([1, 2, 3, 5], 3)], ()),
    # Each row keeps a token, the shortest one and equal ones too.
    ([([1, 2, 3, 4], 3), ([1, 2], 1)], (1,)),
    ([([1, 2, 3], 2)] * 3, (1, 2)),
    ([([1, 2, 3], 9)], (1, 2)),
    ([([1], 0), ([1], 0)], ()),
    # Rows that begin otherwise share nothing, a single one among many as well.
    ([([1, 2, 3, 4], 3), ([1, 2, 9, 4], 3), ([1, 7, 3, 4], 3)], (1,)),
    ([([1, 2, 3], 2)] * 5 + [([8, 2, 3], 2)], ()),
  ],
)
def test_the_prefix_is_what_all_rows_begin_with_and_none_learns(rows, prefix):
  assert pipeline.shared_prefix([row_of(*row) for row in rows]) == prefix


@pytest.mark.parametrize('count', [1, 200])
def test_one_token_after_the_prefix_is_enough(count):
  rows = [row_of([*range(100), 100 + i], 100) for i in range(count)]
  shape = pipeline.BatchShape(2, 128, pipeline.shared_prefix(rows))
  assert len(shape.prefix) == 100
  found = [s for batch in pipeline.evaluation_batches(rows, shape) for s in unpacked(batch, shape)]
  assert sorted(found) == sorted(as_tuples(rows, shape))


def test_rows_that_do_not_belong_to_the_shape_are_refused():
  rows = [row_of([1, 2, 3, 4], 2), row_of([1, 2, 3, 5], 2)]
  for prefix, message in (((1, 9), 'begin with'), ((1, 2, 3), 'a loss inside')):
    with pytest.raises(ValueError, match=message):
      pipeline.training_batches(rows, pipeline.BatchShape(1, 128, prefix), seed=0)
  with pytest.raises(ValueError, match='do not go into'):
    pipeline.evaluation_batches(rows, pipeline.BatchShape(1, 3))


@pytest.mark.parametrize('prefix', [0, 40])
def test_counts_are_those_of_the_rows_alone(prefix):
  rows = made_rows(70, 20, 60, prefix=prefix)
  shape = pipeline.batch_shape(rows, 1024)
  assert len(shape.prefix) == prefix
  batches = pipeline.evaluation_batches(rows, shape)
  held = [pipeline.counts(batch) for batch in batches]
  assert sum(c.examples for c in held) == 70
  assert sum(c.tokens for c in held) == sum(map(len, rows))
  learned = sum(int(row.arrays['weights'].sum()) for row in rows)
  assert sum(c.completion_tokens for c in held) == learned
  assert {c.positions for c in held} == {shape.rows * shape.length}
  # Batches of several runs, one on another, hold what they hold together.
  stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
  assert pipeline.counts(stacked).tokens == sum(map(len, rows))
  assert pipeline.counts(stacked).examples == 70


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
  whole = pipeline.BatchShape(1, 1024)
  assert as_tuples(rows, whole) == as_tuples(kept, whole)
  assert len(rows) == 4

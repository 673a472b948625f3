"""Encoded rows into batches, through grain: shuffle, pack, batch, prefetch.

Short rows are packed several to a row of the batch, so that little of it is padding
and its shape never changes. Attention keeps packed rows apart by `segments`.

  rows = encode_split(task, examples, tokenizer, limits)
  shape = batch_shape(rows, tokens_per_batch=4096)
  for batch in training_batches(rows, shape, seed=0): ...
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from lora_jax.data.encode import Budget, Encoded, PromptTooLongError, encode_example
from lora_jax.data.task import Example, Task
from lora_jax.hub.tokenizer import ChatTokenizer

# Rows of a batch are a multiple of this, which suits every device's matrix units.
_ROW_MULTIPLE = 128

# Attention over a row of so many tokens costs as much as all else (BUILD_NOTES.md, Speed).
_EVEN_LENGTH = 768

# Rows that packing keeps open at once; more of them leave less padding, up to here.
_OPEN_ROWS = 32
# Very short rows are not all tried.
_MOST_PACKED = 10_000

# tokens, targets, positions, segments: (B, T) int32; weights: (B, T) float32.
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchShape:
  """Rows of a batch (B) and tokens of a row (T)."""

  rows: int
  length: int


def encode_split(
  task: Task, examples: Sequence[Example], tokenizer: ChatTokenizer, limits: Budget
) -> list[Encoded]:
  """Reads and encodes a split through grain, in order; rows too long to train on are left out."""

  def encode(example: Example) -> Encoded | None:
    try:
      return encode_example(task, example, tokenizer, limits)
    except PromptTooLongError:
      return None

  encoded = grain.MapDataset.source(examples).map(encode).to_iter_dataset(allow_nones=True)
  return [row for row in encoded if row is not None]


def batch_shape(rows: Sequence[Encoded], tokens_per_batch: int) -> BatchShape:
  """The shape that holds every row, with at most `tokens_per_batch` where one row allows it.

  A row of the batch holds the longest row of the data. It is longer than that where
  packing then leaves so much less of it empty that a real token costs less, although
  attention costs more with length.
  """
  lengths = [len(row) for row in rows]
  least = math.ceil(max(lengths) / _ROW_MULTIPLE) * _ROW_MULTIPLE
  most = max(least, min(tokens_per_batch, 2 * _EVEN_LENGTH))
  cost = lambda length: (1 + length / _EVEN_LENGTH) / _share_filled(lengths, length)
  length = min(range(least, most + 1, _ROW_MULTIPLE), key=cost)
  return BatchShape(rows=max(1, tokens_per_batch // length), length=length)


def _share_filled(lengths: Sequence[int], length: int) -> float:
  """How much of a packed batch is not padding, from packing the first rows as grain does."""
  placed, room = 0, [length] * _OPEN_ROWS
  for rounds, size in enumerate(itertools.cycle(lengths)):
    fits = next((i for i, left in enumerate(room) if size <= left), None)
    # Once a row fits nowhere, all open rows of the batch are full enough and are handed on.
    if fits is None or rounds == _MOST_PACKED:
      break
    room[fits] -= size
    placed += size
  return placed / (length * _OPEN_ROWS)


def training_batches(rows: Sequence[Encoded], shape: BatchShape, seed: int) -> Iterator[Batch]:
  """An endless stream of packed batches, reshuffled every epoch.

  The same arguments give the same stream, and the iterator's state can be saved and
  restored (grain's `get_state` and `set_state`).
  """
  dataset = (
    grain.MapDataset.source([row.arrays for row in rows])
    .seed(seed)
    .shuffle()
    .repeat()
    .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64))
  )
  packed = grain.experimental.FirstFitPackIterDataset(
    dataset,
    length_struct=_lengths(rows[0], shape),
    num_packing_bins=max(_OPEN_ROWS, shape.rows),
    seed=seed,
  )
  return iter(packed.batch(shape.rows, drop_remainder=True).map(_named))


def evaluation_batches(rows: Sequence[Encoded], shape: BatchShape) -> list[Batch]:
  """All rows once, packed; the last batch is filled up with rows of weight 0."""
  batches = [_named(batch) for batch in _packed_once(rows, shape)]
  return [{name: _fill(array, shape.rows) for name, array in batch.items()} for batch in batches]


def batches_per_epoch(rows: Sequence[Encoded], shape: BatchShape) -> int:
  """How many batches all rows fill once."""
  return sum(1 for _ in _packed_once(rows, shape))


def _packed_once(rows: Sequence[Encoded], shape: BatchShape):
  packed = grain.experimental.FirstFitPackIterDataset(
    grain.MapDataset.source([row.arrays for row in rows]).to_iter_dataset(),
    length_struct=_lengths(rows[0], shape),
    num_packing_bins=max(_OPEN_ROWS, shape.rows),
    shuffle_bins=False,
  )
  return packed.batch(shape.rows)


def _lengths(row: Encoded, shape: BatchShape) -> dict[str, int]:
  return dict.fromkeys(row.arrays, shape.length)


def _fill(array: np.ndarray, rows: int) -> np.ndarray:
  return np.pad(array, ((0, rows - len(array)), (0, 0)))


def _named(packed: dict[str, np.ndarray]) -> Batch:
  # grain makes positions and segments for each feature; those of the tokens serve all.
  return {
    'tokens': packed['tokens'],
    'targets': packed['targets'],
    'weights': packed['weights'],
    'positions': packed['tokens_positions'],
    'segments': packed['tokens_segment_ids'],
  }

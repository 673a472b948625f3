"""Encoded rows into batches, through grain: shuffle, pack, batch, prefetch.

Short rows are packed several to a row of the batch, so that little of it is padding
and its shape never changes. Attention keeps packed rows apart by `segments`.

  rows = encode_split(task, examples, tokenizer, limits)
  shape = batch_shape(rows, tokens_per_batch=4096)
  for batch in training_batches(rows, shape, seed=0): ...
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from lora_jax.data.encode import Budget, Encoded, PromptTooLongError, encode_example
from lora_jax.data.task import Example, Task
from lora_jax.hub.tokenizer import ChatTokenizer

# Rows of a batch are a multiple of this, which suits every device's matrix units.
_ROW_MULTIPLE = 128

# A row of the batch holds about so many rows of the data, for then little of it stays
# empty; but it grows no longer than this for it, since attention costs more with length.
_ROWS_PER_ROW = 4
_LENGTH_FOR_PACKING = 256

# Rows that packing keeps open at once; more of them leave less padding, up to here.
_OPEN_ROWS = 32

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

  A row of the batch is as long as the longest row of the data, and longer where those
  are short, so that several are packed into it.
  """
  lengths = [len(row) for row in rows]
  several = min(_ROWS_PER_ROW * sum(lengths) / len(lengths), _LENGTH_FOR_PACKING, tokens_per_batch)
  length = math.ceil(max(*lengths, several) / _ROW_MULTIPLE) * _ROW_MULTIPLE
  return BatchShape(rows=max(1, tokens_per_batch // length), length=length)


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
  dataset = grain.MapDataset.source([row.arrays for row in rows]).to_iter_dataset()
  packed = grain.experimental.FirstFitPackIterDataset(
    dataset,
    length_struct=_lengths(rows[0], shape),
    num_packing_bins=max(_OPEN_ROWS, shape.rows),
    shuffle_bins=False,
  )
  batches = [_named(batch) for batch in packed.batch(shape.rows)]
  return [{name: _fill(array, shape.rows) for name, array in batch.items()} for batch in batches]


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

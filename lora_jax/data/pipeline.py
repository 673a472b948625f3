"""Encoded rows into batches: shuffled, packed and prefetched.

Short rows are packed several to a row of the batch (`lora_jax.data.packing`), so that
little of it is padding and its shape never changes. Where the rows of a dataset all begin
with the same tokens, as chats with one instruction do, a row of the batch begins with
these, once, and its packed rows hold what follows. Attention keeps packed rows apart by
`segments` and lets all of them see what is `SHARED`; what they compute is what each
would alone, except that dropout falls on the shared tokens once for all of them.

  rows = encode_split(task, examples, tokenizer, limits)
  shape = batch_shape(rows, tokens_per_batch=4096)
  for batch in training_batches(rows, shape, seed=0): ...

Rows with images bring the features of a frozen tower, which are read from disk when a
batch is made, ahead of the step; a row of the batch holds those of its packed rows one
after the other. What is shared ends before the first image: tokens of images are alike
where the images are not.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from lora_jax.attention import SHARED
from lora_jax.data.encode import Budget, Encoded, PromptTooLongError, encode_example
from lora_jax.data.eyes import Eyes, most_embeddings
from lora_jax.data.features import FeatureFiles
from lora_jax.data.packing import Epochs, Group, plan
from lora_jax.data.task import Example, Task
from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.sharding import row_shards

# Rows of a batch are a multiple of this, which suits every device's matrix units.
_ROW_MULTIPLE = 128

# Attention over a row of so many tokens costs as much as all else (BUILD_NOTES.md, Speed).
_EVEN_LENGTH = 768

# Rows that a shape is tried out on.
_MOST_TRIED = 2048

# A shared prefix must save this share of the cost: plain causal segments suit more kernels.
_LEAST_SAVED = 0.02

# Batches made ahead of the one in use; those with features are large.
_AHEAD, _AHEAD_SEEN = 16, 3

# tokens, targets, positions, segments: (B, T) int32; weights: (B, T) float32. Segments are
# 1, 2, ... for the packed rows, `SHARED` for what all of them begin with, 0 for padding.
# Where a shape has embeddings: features (B, E, D) in the tower's dtype and slots (B, T) int32,
# as in `vision.Features`.
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchShape:
  """Rows of a batch (B), tokens of a row (T), and the tokens that each row begins with.

  Packed rows hold what follows `prefix`, which must begin all rows of the data. There is
  room for so many embeddings of images in a row (E), however rows are packed.
  """

  rows: int
  length: int
  prefix: tuple[int, ...] = ()
  embeddings: int = 0


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a batch holds.

  Attributes:
    examples: packed rows.
    tokens: of these rows as they would be alone, a shared prefix counted for each.
    completion_tokens: those of them with a loss.
    positions: computed, padding included. With a shared prefix they may be fewer than
      `tokens`.
  """

  examples: int
  tokens: int
  completion_tokens: int
  positions: int


def counts(batch: Batch) -> Counts:
  """Counts what a batch holds; arrays may have further axes before (B, T)."""
  segments = batch['segments']
  examples_B = np.maximum(segments.max(axis=-1), 0)
  repeated_B = examples_B * (segments == SHARED).sum(axis=-1)
  return Counts(
    examples=int(examples_B.sum()),
    tokens=int((segments > 0).sum() + repeated_B.sum()),
    completion_tokens=int((batch['weights'] > 0).sum()),
    positions=segments.size,
  )


def encode_split(
  task: Task,
  examples: Sequence[Example],
  tokenizer: ChatTokenizer,
  limits: Budget,
  eyes: Eyes | None = None,
) -> list[Encoded]:
  """Reads and encodes a split through grain, in order; rows too long to train on are left out."""

  def encode(example: Example) -> Encoded | None:
    try:
      return encode_example(task, example, tokenizer, limits, eyes)
    except PromptTooLongError:
      return None

  encoded = grain.MapDataset.source(examples).map(encode).to_iter_dataset(allow_nones=True)
  return [row for row in encoded if row is not None]


def shared_prefix(rows: Sequence[Encoded]) -> tuple[int, ...]:
  """The tokens that all rows begin with, up to the first loss or image.

  Each row keeps one of its own.
  """
  first = rows[0].arrays['tokens']
  length = len(first)
  for row in rows:
    length = min(length, len(row) - 1)
    ends = row.arrays['weights'][:length] != 0
    ends |= row.arrays['tokens'][:length] != first[:length]
    if 'slots' in row.arrays:
      ends |= row.arrays['slots'][:length] >= 0
    if ends.any():
      length = int(ends.argmax())
  return tuple(first[:length].tolist())


def batch_shape(rows: Sequence[Encoded], tokens_per_batch: int) -> BatchShape:
  """The cheapest shape that holds every row, with at most `tokens_per_batch` if one row allows it.

  What is compared is the cost of a real token, by packing the rows into the shape: a row
  of the batch that is longer leaves less of itself empty and repeats a shared prefix less
  often, but attention costs more with length. Over a mesh, the devices that share a batch
  have as many of its rows each.
  """
  longest = max(len(row) for row in rows)
  least = math.ceil(longest / _ROW_MULTIPLE) * _ROW_MULTIPLE
  most = max(least, min(tokens_per_batch, 2 * _EVEN_LENGTH))
  lengths = range(least, most + 1, _ROW_MULTIPLE)
  shards = row_shards()
  tried = rows[:: math.ceil(len(rows) / _MOST_TRIED)]

  def seen(shape: BatchShape) -> BatchShape:
    own = [(len(row) - len(shape.prefix), row.embeddings) for row in rows]
    return dataclasses.replace(shape, embeddings=most_embeddings(own, _room(shape)))

  def cheapest(prefix: tuple[int, ...]) -> tuple[float, BatchShape]:
    count = lambda length: shards * max(1, tokens_per_batch // (shards * length))
    shapes = [BatchShape(count(length), length, prefix) for length in lengths]
    return min(((_cost(tried, shape), shape) for shape in shapes), key=lambda pair: pair[0])

  cost, shape = cheapest(())
  prefix = shared_prefix(rows)
  if prefix:
    cost_shared, shape_shared = cheapest(prefix)
    if cost_shared <= (1 - _LEAST_SAVED) * cost:
      return seen(shape_shared)
  return seen(shape)


def _cost(rows: Sequence[Encoded], shape: BatchShape) -> float:
  """Of a real token, in those of a position without attention."""
  positions = shape.length * len(groups(rows, shape))
  return (1 + shape.length / _EVEN_LENGTH) * positions / sum(len(row) for row in rows)


def training_batches(
  rows: Sequence[Encoded], shape: BatchShape, seed: int, features: FeatureFiles | None = None
) -> Iterator[Batch]:
  """An endless stream of packed batches, reshuffled and packed anew every epoch.

  An epoch has every row once, and ends where it ends: inside of a batch, the next one
  follows. The same arguments give the same stream, and the iterator's state can be saved
  and restored (grain's `get_state` and `set_state`).

  Args:
    rows: to learn.
    shape: from `batch_shape`, of these and maybe more.
    seed: of the order.
    features: of the rows' images, where they have any.

  Raises:
    ValueError: there are no rows, or one does not go into the shape.
    UserError: features are gone or damaged.
  """
  epochs = Epochs(_sizes(rows, shape), _room(shape), seed)

  def batch(number: int) -> Batch:
    first = number * shape.rows
    return filled(rows, [epochs[i] for i in range(first, first + shape.rows)], shape, features)

  # One thread: `Epochs` is not for several.
  buffer = _AHEAD_SEEN if shape.embeddings else _AHEAD
  ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffer)
  return iter(grain.MapDataset.range(sys.maxsize).map(batch).to_iter_dataset(ahead))


def evaluation_batches(
  rows: Sequence[Encoded], shape: BatchShape, features: FeatureFiles | None = None
) -> list[Batch]:
  """All rows once, packed; the last batch is filled up with rows of weight 0.

  Raises:
    ValueError: a row does not go into the shape.
    UserError: features are gone or damaged.
  """
  packed = groups(rows, shape)
  starts = range(0, len(packed), shape.rows)
  return [filled(rows, packed[start : start + shape.rows], shape, features) for start in starts]


def batches_per_epoch(rows: Sequence[Encoded], shape: BatchShape) -> int:
  """How many batches all rows fill once."""
  return math.ceil(len(groups(rows, shape)) / shape.rows)


def groups(rows: Sequence[Encoded], shape: BatchShape, seed: int = 0) -> list[Group]:
  """Which rows share a row of the batch: the first epoch of a seed, all others differ by chance."""
  return plan(_sizes(rows, shape), _room(shape), seed)


def _room(shape: BatchShape) -> int:
  return shape.length - len(shape.prefix)


def _sizes(rows: Sequence[Encoded], shape: BatchShape) -> list[int]:
  """Tokens of each row that are its own."""
  shared = len(shape.prefix)
  prefix = np.asarray(shape.prefix, np.int32)
  for row in rows:
    if not np.array_equal(row.arrays['tokens'][:shared], prefix):
      raise ValueError('a row does not begin with the prefix of the shape')
    if row.arrays['weights'][:shared].any():
      raise ValueError('a row has a loss inside of the prefix of the shape')
  return [len(row) - shared for row in rows]


def empty_batch(shape: BatchShape, width: int, dtype: np.typing.DTypeLike) -> Batch:
  """A batch of padding.

  Args:
    shape: its shape.
    width: of features, where the shape has embeddings.
    dtype: of features.
  """
  zeros = lambda dtype: np.zeros((shape.rows, shape.length), dtype)
  names = ('tokens', 'targets', 'positions', 'segments')
  batch: Batch = {name: zeros(np.int32) for name in names}
  batch['weights'] = zeros(np.float32)
  if shape.embeddings:
    batch['slots'] = np.full_like(batch['tokens'], -1)
    batch['features'] = np.zeros((shape.rows, shape.embeddings, width), dtype)
  return batch


def filled(
  rows: Sequence[Encoded],
  groups: Sequence[Group],
  shape: BatchShape,
  features: FeatureFiles | None = None,
) -> Batch:
  """The batch that holds these groups, a row of it each; rows without a group are padding.

  Rows with images need the features of these.
  """
  if shape.embeddings and features is None:
    raise ValueError('rows with images need the features of these')
  width, dtype = (0, np.dtype(np.float32)) if features is None else (features.width, features.dtype)
  batch = empty_batch(shape, width, dtype)
  shared = len(shape.prefix)
  for row, group in enumerate(groups):
    batch['tokens'][row, :shared] = shape.prefix
    batch['positions'][row, :shared] = np.arange(shared)
    batch['segments'][row, :shared] = SHARED
    start, embeddings = shared, 0
    for segment, index in enumerate(group, start=1):
      length = len(rows[index])
      at = slice(start, start + length - shared)
      for name in ('tokens', 'targets', 'weights'):
        batch[name][row, at] = rows[index].arrays[name][shared:]
      if rows[index].pictures and features is not None:
        slots = rows[index].arrays['slots'][shared:]
        batch['slots'][row, at] = np.where(slots >= 0, slots + embeddings, -1)
        values_ED = features.of(rows[index].pictures)
        batch['features'][row, embeddings : embeddings + len(values_ED)] = values_ED
        embeddings += len(values_ED)
      batch['positions'][row, at] = np.arange(shared, length)
      batch['segments'][row, at] = segment
      start = at.stop
  return batch

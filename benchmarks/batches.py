"""The same rows as batches for each side of a comparison, and files to hand them over."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.data import encode, pipeline

_ARRAYS = ('tokens', 'targets', 'weights', 'positions', 'segments')

# The label that transformers' loss leaves out.
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
  """Rows padded to the longest of them.

  Attributes:
    tokens_BT: token ids.
    labels_BT: the same where a loss is taken on the token, else `IGNORED`.
    mask_BT: 1 on real tokens, 0 on padding.
  """

  tokens_BT: np.ndarray
  labels_BT: np.ndarray
  mask_BT: np.ndarray


@dataclasses.dataclass(frozen=True)
class Setting:
  """The same rows, batched by each side."""

  name: str
  ours: list[pipeline.Batch]
  theirs: list[PaddedBatch]

  @property
  def one_shape(self) -> bool:
    """Whether all of their batches have the same shape."""
    return len({batch.tokens_BT.shape for batch in self.theirs}) == 1


def pad(
  rows: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]],
  rows_per_batch: int,
  pad_id: int,
) -> list[PaddedBatch]:
  """Batches rows in their order, as a collator that pads to the longest row does.

  Args:
    rows: token ids of a row, and for each whether a loss is taken on it.
    rows_per_batch: B; the last batch may be smaller.
    pad_id: the token that fills up, on the right.
  """
  batches = []
  for start in range(0, len(rows), rows_per_batch):
    chosen = rows[start : start + rows_per_batch]
    shape = (len(chosen), max(len(tokens) for tokens, _ in chosen))
    tokens_BT = np.full(shape, pad_id, np.int32)
    labels_BT = np.full(shape, IGNORED, np.int32)
    mask_BT = np.zeros(shape, np.int32)
    for i, (tokens, learned) in enumerate(chosen):
      tokens_BT[i, : len(tokens)] = tokens
      labels_BT[i, : len(tokens)] = np.where(learned, tokens, IGNORED)
      mask_BT[i, : len(tokens)] = 1
    batches.append(PaddedBatch(tokens_BT, labels_BT, mask_BT))
  return batches


def whole(row: encode.Encoded) -> tuple[list[int], list[bool]]:
  """A row as `pad` takes it: all its tokens, and which are learned."""
  ids = [*row.arrays['tokens'], row.arrays['targets'][-1]]
  return ids, [False, *(row.arrays['weights'] > 0)]


def real_tokens(batch: pipeline.Batch) -> int:
  """Tokens of the rows in a batch of ours as they would be alone, padding not counted."""
  return pipeline.counts(batch).tokens


def computed_positions(batch: pipeline.Batch) -> np.ndarray:
  """The position in its row of everything that is computed and is not padding."""
  return batch['positions'][batch['segments'] != 0]


def equal_setting(
  vocab_size: int, shape: tuple[int, int], count: int, name: str = 'equal'
) -> Setting:
  """Random tokens in unpadded batches of `shape`, a loss at every position."""
  rng = np.random.default_rng(0)
  rows, length = shape
  ours, theirs = [], []
  for _ in range(count):
    ids = rng.integers(0, vocab_size, (rows, length + 1), dtype=np.int32)
    ours.append(
      {
        'tokens': ids[:, :-1],
        'targets': ids[:, 1:],
        'weights': np.ones(shape, np.float32),
        'positions': np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        'segments': np.ones(shape, np.int32),
      }
    )
    learned = np.ones(length, bool)
    theirs += pad([(row, learned) for row in ids[:, :-1]], rows, pad_id=0)
  return Setting(name, ours, theirs)


def rows_setting(
  rows: Sequence[encode.Encoded], tokens_per_batch: int, count: int, peer_rows: int
) -> Setting:
  """Encoded rows, packed on our side and padded to the longest of `peer_rows` on theirs."""
  shape = pipeline.batch_shape(rows, tokens_per_batch)
  stream = pipeline.training_batches(rows, shape, seed=0)
  order = np.random.default_rng(0).permutation(len(rows))
  theirs = pad([whole(rows[i]) for i in order], peer_rows, pad_id=0)
  return Setting('rows', [next(stream) for _ in range(count)], theirs)


def write(path: Path, batches: Sequence[pipeline.Batch]) -> None:
  """Batches of ours into an npz file: `<name>_<i>` for each array of batch i."""
  arrays: dict[str, Any] = {
    f'{name}_{i}': batch[name] for i, batch in enumerate(batches) for name in _ARRAYS
  }
  np.savez(path, **arrays)


def read(path: Path) -> list[pipeline.Batch]:
  """What `write` wrote."""
  with np.load(path) as file:
    count = len(file.files) // len(_ARRAYS)
    return [{name: file[f'{name}_{i}'] for name in _ARRAYS} for i in range(count)]


def write_padded(path: Path, batches: Sequence[PaddedBatch]) -> None:
  """Batches of a peer's: `tokens_<i>`, `labels_<i>` and `mask_<i>`."""
  arrays: dict[str, Any] = {}
  for i, batch in enumerate(batches):
    arrays |= {
      f'tokens_{i}': batch.tokens_BT,
      f'labels_{i}': batch.labels_BT,
      f'mask_{i}': batch.mask_BT,
    }
  np.savez(path, **arrays)

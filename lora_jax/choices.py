"""What a model holds likely right after its prompts: many prompts read at once, none continued.

Prompts are packed as rows to train on are: several share a row of the batch, and what all
of them begin with is read once a row (`lora_jax.data.pipeline`). All prompts are then of
one shape, so that they compile one program.

  packed = pack_prompts(prompts, batch_rows=16)
  for batch in packed.batches:
    log_probs_EV = next_log_probs(packed.fit(model), params, batch.arrays, batch.ends_E)
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import packs
from lora_jax.data.encode import Encoded
from lora_jax.data.pipeline import BatchShape, batch_shape, filled, groups
from lora_jax.head import head_kernel, logits
from lora_jax.kernels import Kernel
from lora_jax.parts import part_rows
from lora_jax.step import for_batches
from lora_jax.transformer import Transformer

# Of a batch to train on, what reading takes.
_READ = ('tokens', 'positions', 'segments')


@dataclasses.dataclass(frozen=True)
class PromptBatch:
  """Packed prompts; E is the same for all batches.

  Attributes:
    prompts: which prompts they are, by number; at most E.
    arrays: 'tokens', 'positions' and 'segments', (B, T) int32.
    ends_E: where each prompt's last token is, counted over B x T; 0 after the last prompt.
  """

  prompts: Sequence[int]
  arrays: Mapping[str, np.ndarray]
  ends_E: np.ndarray


@dataclasses.dataclass(frozen=True)
class PackedPrompts:
  """All prompts, each once.

  Attributes:
    shape: of every batch.
    batches: the prompts.
  """

  shape: BatchShape
  batches: Sequence[PromptBatch]

  def fit(self, model: Transformer) -> Transformer:
    """The model as it is fastest on these batches."""
    return for_batches(model, self.shape)


def pack_prompts(prompts: Sequence[Sequence[int]], batch_rows: int) -> PackedPrompts:
  """Packs prompts into batches.

  Args:
    prompts: token ids of each, at least one.
    batch_rows: a batch is no larger than so many of the longest prompt.
  """
  rows = [_without_loss(prompt) for prompt in prompts]
  shape = batch_shape(rows, batch_rows * max(map(len, rows)))
  packed = groups(rows, shape)
  # As even as they come, or most of the last batch could be padding.
  count = math.ceil(len(packed) / shape.rows)
  shape = dataclasses.replace(shape, rows=math.ceil(len(packed) / count))
  parts = [packed[at : at + shape.rows] for at in range(0, len(packed), shape.rows)]
  most = max(sum(map(len, part)) for part in parts)
  batches = []
  for part in parts:
    arrays = filled(rows, part, shape)
    segments = arrays['segments']
    # A prompt's last token is the last of its segment; rows and segments are in order.
    last = (segments > 0) & (segments != np.pad(segments, ((0, 0), (0, 1)))[:, 1:])
    ends_E = np.zeros(most, np.int32)
    chosen = [number for group in part for number in group]
    ends_E[: len(chosen)] = np.flatnonzero(last)
    batches.append(PromptBatch(chosen, {name: arrays[name] for name in _READ}, ends_E))
  return PackedPrompts(shape, batches)


@functools.partial(jax.jit, static_argnames='model')
def next_log_probs(
  model: Transformer, params: Mapping[str, Any], arrays: Mapping[str, Any], ends_E: jax.Array
) -> jax.Array:
  """Log probabilities (E, V) of the token after each prompt of a batch."""
  return _next_log_probs(model, params, head_kernel(model, params, ends_E.size), 1, arrays, ends_E)


@functools.partial(jax.jit, static_argnames='model')
def next_log_probs_pack(
  model: Transformer,
  base: Mapping[str, Any],
  pack: packs.Pack,
  arrays: Mapping[str, Any],
  ends_E: jax.Array,
) -> jax.Array:
  """As `next_log_probs`, for all cells of a pack: (C, E, V)."""
  head = head_kernel(model, base, pack.cells * ends_E.size)
  one = lambda params: _next_log_probs(model, params, head, pack.cells, arrays, ends_E)
  return pack.over_cells(base)(one)


def _next_log_probs(
  model: Transformer,
  params: Mapping[str, Any],
  head: Kernel,
  cells: int,
  arrays: Mapping[str, Any],
  ends_E: jax.Array,
) -> jax.Array:
  def read(part: Mapping[str, Any]) -> jax.Array:
    hidden_BTD, _ = model.apply({'params': params}, *(part[name] for name in _READ))
    return hidden_BTD

  rows, length = arrays['tokens'].shape
  together = part_rows(rows, length, cells)
  if together == rows:
    hidden = read(arrays)
  else:
    parts = {name: x.reshape(-1, together, length) for name, x in arrays.items()}
    hidden = jax.lax.map(read, parts)
  hidden_ED = hidden.reshape(rows * length, -1)[ends_E]
  return jax.nn.log_softmax(logits(model, hidden_ED, head))


def _without_loss(prompt: Sequence[int]) -> Encoded:
  tokens = np.asarray(prompt, np.int32)
  nothing = np.zeros(len(tokens), np.float32)
  return Encoded({'tokens': tokens, 'targets': 0 * tokens, 'weights': nothing}, cut=False)

"""Speaking: a frozen language model answers from what a tower shows it.

Questions and answers are the drawing's own, in the base's chat. Only the tower and its
connector learn, through all layers of the language model, which stays as it is.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.align.read import drawn
from lora_jax.align.recipe import Recipe, Stage
from lora_jax.data import tiles
from lora_jax.drawings.fonts import Face
from lora_jax.errors import UserError
from lora_jax.head import head_kernel, logits
from lora_jax.hub.base import Base
from lora_jax.loss import completion_loss
from lora_jax.transformer import Transformer
from lora_jax.vision import Features

# Drawings in a row whose questions are all too long.
_PATIENCE = 200


class Conversations:
  """Batches of questions on drawings, each a function of its number."""

  def __init__(self, recipe: Recipe, stage: Stage, base: Base, faces: Sequence[Face], seed: int):
    """On drawings of `seed`, set in `faces`, for a joined base."""
    self._recipe, self._stage, self._faces, self._seed = recipe, stage, faces, seed
    # Not the whole base: what runs in another process is sent there.
    self._tokenizer, self._config = base.tokenizer, base.config

  def __getitem__(self, number: int) -> dict[str, np.ndarray]:
    """A batch.

    Returns:
      'pixels' (I, Y, X, C) uint8, as many tiles of each row; 'tokens', 'targets' and 'slots'
      (B, T) int32 and 'weights' (B, T) float32, as training has them.
    """
    rng = random.Random(f'{self._stage.name} {self._seed} {number}')
    rows = [self._row(rng) for _ in range(self._stage.rows)]
    pixels = np.concatenate([row.pop('pixels') for row in rows])
    return {'pixels': pixels, **{name: np.stack([row[name] for row in rows]) for name in rows[0]}}

  def _row(self, rng: random.Random) -> dict[str, np.ndarray]:
    stage, vision = self._stage, self._config.vision
    assert vision is not None
    for _ in range(_PATIENCE):
      one, images = drawn(rng, self._recipe, stage, self._seed, self._faces)
      question, answer = rng.choice(one.questions)
      grid = tiles.grid(one.image.size, images)
      if grid[0] * grid[1] + 1 > stage.tiles:
        continue
      content = [{'type': 'image'}, {'type': 'text', 'text': question}]
      ids = self._tokenizer.encode_chat([{'role': 'user', 'content': content}])
      prompt = tiles.expand(ids, self._tokenizer, vision, images, [grid])
      said = [*self._tokenizer.encode_plain(answer), self._tokenizer.eos_id]
      if len(prompt) + len(said) <= stage.length + 1:
        return self._arrays(tiles.cut(one.image, images).pixels_IYXC, prompt, said)
    raise UserError(
      f'{_PATIENCE} drawings in a row have no question that {stage.length} tokens and '
      f'{stage.tiles} tiles have room for; raise the length of the stage {stage.name}'
    )

  def _arrays(
    self, pixels_IYXC: np.ndarray, prompt: Sequence[int], said: Sequence[int]
  ) -> dict[str, np.ndarray]:
    stage, vision = self._stage, self._config.vision
    assert vision is not None
    whole = np.zeros((stage.tiles, *pixels_IYXC.shape[1:]), np.uint8)
    whole[: len(pixels_IYXC)] = pixels_IYXC
    ids = np.full(stage.length + 1, self._tokenizer.pad_id, np.int32)
    ids[: len(prompt) + len(said)] = [*prompt, *said]
    weights = np.zeros(stage.length, np.float32)
    weights[len(prompt) - 1 : len(prompt) + len(said) - 1] = 1
    shown = ids[:-1] == vision.image_token
    slots = np.where(shown, np.cumsum(shown) - 1, -1).astype(np.int32)
    return {
      'pixels': whole,
      'tokens': ids[:-1],
      'targets': ids[1:],
      'weights': weights,
      'slots': slots,
    }


def loss(
  model: Transformer,
  params: Mapping[str, Any],
  frozen: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """How well a batch is answered.

  Args:
    model: that sees.
    params: its 'sight': 'vision' and 'connector'.
    frozen: all its other parameters.
    batch: of `Conversations`, with its pixels as the tower takes them.

  Returns:
    Mean loss of an answer's token, in nats, and for 'loss' a sum and what to divide it by.
  """
  whole = {'params': {**frozen, **params['sight']}}
  features_IED: Any = model.apply(whole, batch['pixels'], method='see')
  rows, width = batch['tokens'].shape[0], features_IED.shape[-1]
  features = Features(features_IED.reshape(rows, -1, width), batch['slots'])
  hidden_BTD, _ = model.apply(whole, batch['tokens'], features=features)
  kernel = head_kernel(model, frozen)
  head = lambda hidden_CD: logits(model, hidden_CD, kernel, model.dtype)
  total = completion_loss(head, hidden_BTD, batch['targets'], batch['weights'])
  count = batch['weights'].sum()
  return total / count, {'loss': jnp.stack([total, count])}

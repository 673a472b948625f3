"""Reading: each embedding is to say what lies in its cell; no language model runs.

Three things are asked of an embedding f of the connector, by heads that are thrown away after:

- the character in each of its slots, its shape and its colour: linear maps of f and cross
  entropy, so that all of it lies open in f;
- which tokens of the language model are written in it: of the tokens of the whole batch and
  some others, those whose own input embeddings are nearest to f by cosine (InfoNCE, van den
  Oord et al. 2018, with several right answers). What f holds is then in the language that the
  model reads: to its own embedding of `Total` it knows what follows.
- to be as long as the model's embeddings are.

Lengths and cosines are taken from the mean of the table, which all of its rows share.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.align import cells
from lora_jax.align.recipe import Recipe, Stage
from lora_jax.align.sight import Sight
from lora_jax.config import ImageConfig
from lora_jax.drawings.drawing import Drawing, draw
from lora_jax.drawings.fonts import Face
from lora_jax.hub.tokenizer import ChatTokenizer

# Tokens that those of a cell are told from.
CANDIDATES = 1024
_SHARPNESS = 20.0
# What a cell or slot that holds nothing counts: most do.
_NOTHING = 0.1
_LENGTH_WEIGHT = 0.1
_HEADS = {
  'characters': (cells.SLOTS, cells.CHARACTERS),
  'kinds': (1, len(cells.KINDS)),
  'colours': (1, len(cells.COLOURS)),
}

Batch = Mapping[str, Any]


def drawn(
  rng: random.Random, recipe: Recipe, stage: Stage, seed: int, faces: Sequence[Face]
) -> tuple[Drawing, ImageConfig]:
  """A drawing of a stage, and how it is to be cut."""
  one = rng.choices(stage.drawn, [drawn.often for drawn in stage.drawn])[0]
  longest = rng.choice(one.edges) * recipe.images.tile
  images = dataclasses.replace(recipe.images, longest_edge=longest)
  return draw(one.kind, seed, rng.getrandbits(48), faces), images


class Batches:
  """Batches of tiles and what lies in them, each a function of its number."""

  def __init__(
    self,
    recipe: Recipe,
    stage: Stage,
    tokenizer: ChatTokenizer,
    faces: Sequence[Face],
    seed: int,
  ):
    """Of drawings of `seed`, set in `faces`; tokens are those of a base of text."""
    self._recipe, self._stage, self._tokenizer = recipe, stage, tokenizer
    self._faces, self._seed = faces, seed
    self._blank = tokenizer.encode_plain(' ')[0]

  def __getitem__(self, number: int) -> dict[str, np.ndarray]:
    """'pixels' (I, Y, X, C) uint8, the labels of `cells.tile_cells`, and 'candidates' (C,).

    'tokens' are places in 'candidates', whose first is what stands for nothing.
    """
    rng = random.Random(f'{self._stage.name} {self._seed} {number}')
    parts, held = [], []
    while len(parts) < self._stage.rows:
      one, images = drawn(rng, self._recipe, self._stage, self._seed, self._faces)
      seen, of_tiles = cells.cut(one, self._tokenizer, images, self._recipe.vision)
      # A batch has several drawings.
      for tile in rng.sample(range(len(seen)), min(len(seen), -(-self._stage.rows // 4))):
        parts.append(seen[tile])
        held.append(of_tiles[tile])
    batch = {name: np.stack([one[name] for one in held]) for name in held[0]}
    rows = self._stage.rows
    batch = {'pixels': np.stack(parts), **batch}
    return self._with_candidates({name: x[:rows] for name, x in batch.items()}, rng)

  def _with_candidates(self, batch: dict[str, np.ndarray], rng: random.Random):
    tokens = batch['tokens']
    written = [i for i in np.unique(tokens[tokens >= 0]).tolist() if i != self._blank]
    count = min(CANDIDATES, self._tokenizer.vocab_size)
    rng.shuffle(written)
    ids = [self._blank, *written[: count - 1]]
    others = rng.sample(
      range(self._tokenizer.vocab_size), min(self._tokenizer.vocab_size, 2 * count)
    )
    ids += [i for i in others if i not in {*ids}][: count - len(ids)]
    ids_C = np.asarray(ids, np.int32)
    order_C = np.argsort(ids_C)
    place = np.searchsorted(ids_C, tokens, sorter=order_C).clip(max=len(ids_C) - 1)
    places = order_C[place]
    known = (tokens >= 0) & (ids_C[places] == tokens)
    return {**batch, 'tokens': np.where(known, places, -1).astype(np.int32), 'candidates': ids_C}


def init_heads(features: int, key: jax.Array) -> dict[str, Any]:
  """Random linear maps, one a label."""
  heads = {}
  for name, (slots, classes) in _HEADS.items():
    key, own = jax.random.split(key)
    kernel = jax.random.normal(own, (features, slots * classes)) / np.sqrt(features)
    heads[name] = {'kernel': kernel, 'bias': jnp.zeros(slots * classes)}
  return heads


def table(embedding_VD: np.ndarray) -> dict[str, jax.Array]:
  """A language model's embeddings about their mean, that mean, and how long they are."""
  mean_D = np.asarray(embedding_VD, np.float32).mean(0)
  rows_VD = embedding_VD - mean_D
  length = np.median(np.sqrt(np.mean(rows_VD**2, axis=1)))
  return {'rows': jnp.asarray(rows_VD), 'mean': jnp.asarray(mean_D), 'length': jnp.asarray(length)}


def loss(
  model: Sight,
  params: Mapping[str, Any],
  frozen: Mapping[str, jax.Array],
  batch: Batch,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """What a batch is read with.

  Args:
    model: the tower.
    params: its 'sight', and 'heads'.
    frozen: from `table`.
    batch: of `Batches`, with its pixels as the tower takes them.

  Returns:
    The loss, in nats, and for 'loss', 'characters', 'kinds', 'colours' and 'tokens' a sum and
    what to divide it by: of all that there are, those that are told rightly.
  """
  features_IED: Any = model.apply({'params': params['sight']}, batch['pixels'])
  features_IED = features_IED.astype(jnp.float32)
  own_IED = features_IED - jnp.broadcast_to(frozen['mean'], features_IED.shape)
  length_IE1 = jnp.sqrt(jnp.mean(own_IED**2, axis=-1, keepdims=True) + 1e-8)
  plain_IED = own_IED / length_IE1
  total = _LENGTH_WEIGHT * jnp.mean(jnp.log(length_IE1 / frozen['length']) ** 2)
  metrics = {}
  for name, (slots, classes) in _HEADS.items():
    head = params['heads'][name]
    logits = plain_IED @ head['kernel']
    logits = logits + jnp.broadcast_to(head['bias'], logits.shape)
    logits = logits.reshape(*logits.shape[:2], slots, classes)
    right = batch[name].reshape(logits.shape[:-1])
    part, metrics[name] = _told(logits, right)
    total += part
  part, metrics['tokens'] = _named(plain_IED, frozen['rows'], batch)
  total += part
  return total, {'loss': jnp.stack([total, jnp.ones_like(total)]), **metrics}


def _told(logits: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross entropy, and how much is right of what is something."""
  asked = right >= 0
  weights = jnp.where(right > 0, 1.0, _NOTHING) * asked
  log_p = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(log_p, jnp.maximum(right, 0)[..., None], axis=-1)[..., 0]
  there = right > 0
  hits = (jnp.argmax(logits, axis=-1) == right) & there
  return -jnp.sum(picked * weights) / jnp.maximum(weights.sum(), 1), _share(hits, there)


def _named(plain_IED: jax.Array, rows_VD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """The tokens of each cell among the candidates, and how often the likeliest is one of them."""
  candidates_CD = rows_VD[batch['candidates']]
  length_C1 = jnp.linalg.norm(candidates_CD, axis=-1, keepdims=True)
  directions_IED = plain_IED / np.sqrt(plain_IED.shape[-1])
  logits_IEC = _SHARPNESS * (directions_IED @ (candidates_CD / length_C1).T)
  tokens_IEt = batch['tokens']
  there_IEt = tokens_IEt >= 0
  some_IE = there_IEt.any(-1)
  # A cell with nothing in it is to be the token of nothing, which is the first.
  asked_IEt = there_IEt.at[..., 0].set(True)
  log_p_IEt = jnp.take_along_axis(
    jax.nn.log_softmax(logits_IEC), jnp.maximum(tokens_IEt, 0), axis=-1
  )
  mean_IE = jnp.sum(log_p_IEt * asked_IEt, -1) / asked_IEt.sum(-1)
  weights_IE = jnp.where(some_IE, 1.0, _NOTHING) * batch['asked']
  best_IE1 = jnp.argmax(logits_IEC, axis=-1)[..., None]
  hits_IE = ((best_IE1 == tokens_IEt) & there_IEt).any(-1)
  loss = -jnp.sum(mean_IE * weights_IE) / jnp.maximum(weights_IE.sum(), 1)
  return loss, _share(hits_IE, some_IE)


def _share(hits: jax.Array, there: jax.Array) -> jax.Array:
  return jnp.stack([hits.sum(), there.sum()]).astype(jnp.float32)

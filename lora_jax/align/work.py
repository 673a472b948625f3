"""What a stage trains, on what, and by which loss: the same form for all of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.align import read, sight, speak
from lora_jax.align.recipe import Recipe, Stage
from lora_jax.drawings import fonts
from lora_jax.drawings.fonts import Face
from lora_jax.hub import seeing
from lora_jax.hub.base import Base
from lora_jax.transformer import Transformer

READ = 'read'
# Of drawings that are looked at and never learnt from: far from any that are.
_KEPT_OUT = 1_000_000
# Of those that a patch embedding begins with, and how many tiles.
_FOR_PATCHES, _TILES = 2_000_000, 48


class Batches(Protocol):
  """Batches by number."""

  def __getitem__(self, number: int) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Work:
  """A stage, ready to be done.

  Attributes:
    fresh: what is trained, as it is before the first step.
    frozen: what is not.
    loss: (trained, frozen, batch) -> mean loss, and metrics as sums and what to divide by.
    batches: (faces, seed) -> batches.
  """

  fresh: Mapping[str, Any]
  frozen: Any
  loss: Callable[[Any, Any, Mapping[str, Any]], tuple[jax.Array, dict[str, jax.Array]]]
  batches: Callable[[Sequence[Face], int], Batches]


def work(recipe: Recipe, stage: Stage, base: Base, held: Mapping[str, Any] | None) -> Work:
  """A stage of a recipe.

  Args:
    recipe: the recipe.
    stage: of it.
    base: of text, in numpy.
    held: 'vision' and 'connector' as the stage before left them, of length 1; None: none did.
  """
  width, dtype = base.config.model_dim, jnp.dtype(recipe.dtype)
  key_sight, key_heads, key_patches = jax.random.split(jax.random.key(recipe.seed), 3)
  table = read.table(base.params['embed_tokens']['embedding'])
  if held is None:
    held = sight.init(recipe.vision, width, key_sight)
    held = sight.sharpened(held, recipe.vision, _tiles(recipe, stage, base), key_patches)
  # Copied, since steps give their state's memory back.
  own: dict[str, Any] = jax.tree.map(jnp.array, dict(held))
  if stage.name == READ:
    model = sight.Sight(recipe.vision, width, dtype, recipe.remat)
    return Work(
      {'sight': own, 'heads': read.init_heads(width, key_heads)},
      table,
      _seen(recipe, float(table['length']), functools.partial(read.loss, model)),
      lambda faces, seed: read.Batches(recipe, stage, base.tokenizer, faces, seed),
    )
  joined = seeing.join(base, recipe.vision, recipe.images, own)
  text = {name: part for name, part in joined.params.items() if name not in own}
  model = Transformer(joined.config, dtype=dtype, remat=recipe.remat)
  return Work(
    {'sight': own},
    jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), text),
    _seen(recipe, float(table['length']), functools.partial(speak.loss, model)),
    lambda faces, seed: speak.Conversations(recipe, stage, joined, faces, seed),
  )


def watched(stage: Stage, of: Work, seed: int) -> dict[str, list[dict[str, np.ndarray]]]:
  """Batches of drawings kept out: 'known' faces, 'new' ones, and what is asked of 'blank' tiles.

  How much worse answers are to blank images is what seeing is worth.
  """
  numbers = range(stage.eval_batches)
  kept_out = {
    'known': of.batches(fonts.FACES, seed + _KEPT_OUT),
    'new': of.batches(fonts.HELD_OUT, seed + _KEPT_OUT),
  }
  sets = {name: [batches[i] for i in numbers] for name, batches in kept_out.items()}
  if stage.name != READ:
    blank = lambda batch: {**batch, 'pixels': np.full_like(batch['pixels'], 255)}
    sets['blank'] = [blank(batch) for batch in sets['known']]
  return sets


def finished(base: Base, held: Mapping[str, Any]) -> dict[str, Any]:
  """What the last stage left, as it goes with the base."""
  length = read.table(base.params['embed_tokens']['embedding'])['length']
  return jax.tree.map(np.asarray, sight.lengthened(held, length))


def _tiles(recipe: Recipe, stage: Stage, base: Base) -> np.ndarray:
  """Some tiles as a stage draws them, (I, Y, X, C), normalised."""
  batches = read.Batches(recipe, stage, base.tokenizer, fonts.FACES, recipe.seed + _FOR_PATCHES)
  some = [batches[i]['pixels'] for i in range(-(-_TILES // stage.rows))]
  return np.asarray(_normalised(recipe, np.concatenate(some)))


def _normalised(recipe: Recipe, pixels: jax.typing.ArrayLike) -> jax.Array:
  """Pixels in 0..255 as a tower takes them."""
  values = jnp.asarray(pixels, jnp.float32) / 255
  mean_C, std_C = (np.asarray(x, np.float32) for x in (recipe.images.mean, recipe.images.std))
  at = lambda x_C: jnp.broadcast_to(x_C, values.shape)
  return (values - at(mean_C)) / at(std_C)


def _seen(recipe: Recipe, length: float, loss: Callable) -> Callable:
  """The loss of a tower of length 1, given pixels in 0..255: four times fewer bytes to send."""

  def of(params, frozen, batch):
    params = {**params, 'sight': sight.lengthened(params['sight'], length)}
    return loss(params, frozen, {**batch, 'pixels': _normalised(recipe, batch['pixels'])})

  return of

"""What a frozen tower makes of images: each is looked at once, and never again.

    sight = Sight(model, params, eyes, cache_dir)
    sight.look(task, examples, pictures)        # whatever is not on disk yet
    sight.files.of(row.pictures)                # values_ED
    print(sight)                                # sight: 120 images, 30 of them new

Features of an image depend on its bytes, on how it is made ready, on the weights of tower
and connector, and on the arithmetic; a directory is named by all of it but the first. So
all cells of a grid, all its datasets and all later runs share them, and whatever else
changes finds none. Images are decoded and cut by grain's threads, a few ahead; the tower
takes a fixed number of tiles at a time, of whichever images they are, in one program.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from lora_jax.data.eyes import Eyes, Picture
from lora_jax.data.features import FeatureFiles
from lora_jax.data.task import Example, Task
from lora_jax.errors import UserError
from lora_jax.progress import Progress
from lora_jax.transformer import Transformer

# Part of every key: raise it where the tower's arithmetic or the files change.
_VERSION = 1

# Tiles that the tower takes at a time: of a CPU they only fill the caches.
_TILES, _TILES_CPU = 16, 4

# Images decoded ahead of the tower. Those of a large one take 50 MB.
_AHEAD, _THREADS = 4, 4

# Of the parameters, what sees.
SIGHT = ('vision', 'connector')

# A picture and its tiles, ready for the tower.
_Ready = tuple[Picture, np.ndarray]


class Sight:
  """A frozen tower, and what it has made of images.

  Attributes:
    eyes: how images are made ready.
    looked_at: how many images the tower ran on.
  """

  def __init__(self, model: Transformer, params: Mapping[str, Any], eyes: Eyes, directory: Path):
    """Computes nothing yet.

    Args:
      model: the Transformer, of a base that sees.
      params: its parameters.
      eyes: how images are made ready for it.
      directory: where features of all towers are kept.
    """
    self.eyes = eyes
    self.looked_at = 0
    self._model = model
    self._params = {name: params[name] for name in SIGHT}
    self._directory = directory
    self._asked: set[str] = set()

  def __str__(self) -> str:
    return f'sight: {len(self._asked)} images, {self.looked_at} of them new'

  @functools.cached_property
  def files(self) -> FeatureFiles:
    """The features of this tower on disk."""
    config = self._model.config
    directory = self._directory / _key(self._params, self.eyes, self._model.dtype)
    return FeatureFiles(directory, config.model_dim, self._model.dtype)

  def look(self, task: Task, examples: Sequence[Example], pictures: Sequence[Picture]) -> None:
    """Sees to it that all pictures have features on disk.

    Args:
      task: posed by image.
      examples: rows that the pictures are of.
      pictures: which images of theirs are needed.

    Raises:
      UserError: an image is damaged; its row is named. Images of rows before it are kept.
    """
    # Of the rows that have an image in common, the first.
    needed = {picture.key: picture for picture in reversed(pictures)}
    self._asked |= needed.keys()
    # Whole files, since those that are damaged are to be made again.
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      found = pool.map(lambda picture: self.files.read(picture) is not None, needed.values())
      missing = {key: needed[key] for key, there in zip(needed, found, strict=True) if not there}
    if not missing:
      return
    with Progress(f'look at {task.name}', len(missing), unit='image') as progress:
      for picture, values_ED in self._features(_ready(task, examples, missing, self.eyes)):
        self.files.write(picture, values_ED)
        self.looked_at += 1
        progress.advance()

  def _features(self, coming: Iterator[_Ready]) -> Iterator[tuple[Picture, np.ndarray]]:
    """Runs the tower over tiles as they come, and gives each image's when it has them all."""
    together = tiles_together()
    waiting: list[np.ndarray] = []
    begun: list[Picture] = []
    made: list[np.ndarray] = []

    def run() -> Iterator[tuple[Picture, np.ndarray]]:
      tiles = waiting[:together]
      del waiting[:together]
      filled = [*tiles, *[np.zeros_like(tiles[0])] * (together - len(tiles))]
      made.extend(np.asarray(see(self._model, self._params, np.stack(filled)))[: len(tiles)])
      while begun and len(made) >= begun[0].tiles:
        picture = begun.pop(0)
        yield picture, np.concatenate(made[: picture.tiles])
        del made[: picture.tiles]

    damaged = None
    try:
      for picture, pixels_IYXC in coming:
        begun.append(picture)
        waiting.extend(pixels_IYXC)
        while len(waiting) >= together:
          yield from run()
    except UserError as error:
      damaged = error
    while waiting:
      yield from run()
    if damaged is not None:
      raise damaged


def tiles_together() -> int:
  """How many tiles the tower is given at a time on this device: of fewer, the rest are empty."""
  return _TILES_CPU if jax.default_backend() == 'cpu' else _TILES


@functools.partial(jax.jit, static_argnames='model')
def see(model: Transformer, params: Mapping[str, Any], pixels_IYXC: jax.Array) -> jax.Array:
  """features_IED of tiles."""
  features_IED: Any = model.apply({'params': params}, pixels_IYXC, method='see')
  return features_IED


def _ready(
  task: Task, examples: Sequence[Example], missing: Mapping[str, Picture], eyes: Eyes
) -> Iterator[_Ready]:
  """Each of the missing images once, in the order of the rows, decoded and cut ahead."""

  def of_row(example: Example) -> list[_Ready]:
    where = f'{task.name} row {example["id"]}'
    images = {eyes.picture(data, where).key: data for data in task.prompt(example).images}
    return [
      (missing[key], eyes.tiles(data, missing[key]))
      for key, data in images.items()
      if key in missing and missing[key].where == where
    ]

  ahead = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
  for ready in grain.MapDataset.source(examples).map(of_row).to_iter_dataset(ahead):
    yield from ready


def _key(params: Mapping[str, Any], eyes: Eyes, dtype: Any) -> str:
  """Names all that features depend on beside the image."""
  about = {'version': _VERSION, 'eyes': dataclasses.asdict(eyes), 'dtype': np.dtype(dtype).name}
  digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    held = np.asarray(leaf)
    digest.update(f'{jax.tree_util.keystr(path)} {held.dtype} {held.shape}'.encode())
    digest.update(held.tobytes())
  return digest.hexdigest()[:16]

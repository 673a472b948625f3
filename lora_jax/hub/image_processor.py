"""How a checkpoint's images are made ready: preprocessor_config.json as an `ImageConfig`.

    images = image_config(directory, config.vision)

Read are the processors of Idefics3 and SmolVLM; newer releases of transformers write them
into processor_config.json. What `lora_jax.data.tiles` does not do is refused by name.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lora_jax.config import LONGEST_EDGE, ImageConfig, VisionConfig
from lora_jax.errors import UserError
from lora_jax.hub.json_file import read_object

_OWN, _SHARED = 'preprocessor_config.json', 'processor_config.json'
_TYPES = ('Idefics3ImageProcessor', 'SmolVLMImageProcessor')
_DEFAULTS = {
  'size': {'longest_edge': 4 * 364},
  'max_image_size': {'longest_edge': 364},
  'do_image_splitting': True,
  'resample': 1,
  'image_mean': [0.5] * 3,
  'image_std': [0.5] * 3,
  'rescale_factor': 1 / 255,
  **dict.fromkeys(('do_resize', 'do_rescale', 'do_normalize', 'do_convert_rgb', 'do_pad'), True),
}


def image_config(directory: Path, vision: VisionConfig) -> ImageConfig:
  """Reads the settings of a checkpoint's image processor.

  Args:
    directory: of the checkpoint.
    vision: of the model that they are for.

  Raises:
    UserError: there are none, they are damaged, or they ask for something else than
      `lora_jax.data.tiles` does or than the model takes.
  """
  file, shared = _file(directory), read_object(directory / _SHARED, missing={})
  settings = read_object(file)
  if file.name == _SHARED:
    settings = settings['image_processor']
  reader = _Reader(file, {**_DEFAULTS, **settings})
  config = reader.config()
  side, embeddings = vision.patches(config.tile), vision.embeddings(config.tile)
  if side % vision.shuffle or not side:
    reader.refuse(
      f'tiles of {config.tile} pixels, whose {side} patches a side its model does not join by '
      f'{vision.shuffle}'
    )
  promised = shared.get('image_seq_len', embeddings)
  if promised != embeddings:
    raise UserError(
      f'{directory / _SHARED}: image_seq_len is {promised}, and a tile of {config.tile} pixels '
      f'becomes {embeddings}; give the files that belong together'
    )
  return config


def _file(directory: Path) -> Path:
  shared = directory / _SHARED
  if isinstance(read_object(shared, missing={}).get('image_processor'), dict):
    return shared
  if not (directory / _OWN).is_file():
    raise UserError(f'no {directory / _OWN}; copy the whole checkpoint')
  return directory / _OWN


class _Reader:
  """The settings of an image processor with the class's defaults under them."""

  def __init__(self, file: Path, settings: Mapping[str, Any]):
    self.file = file
    self.settings = settings

  def config(self) -> ImageConfig:
    kind = str(self.settings.get('image_processor_type', _TYPES[0]))
    # Suffixes name the library that resizes.
    if kind.removesuffix('Fast').removesuffix('Pil') not in _TYPES:
      self.refuse(f'image_processor_type {kind!r}', ' or '.join(_TYPES))
    for key in ('do_resize', 'do_rescale', 'do_normalize', 'do_convert_rgb'):
      if self.settings[key] is not True:
        self.refuse(f'{key} {self.settings[key]!r}', 'true')
    factor = self.settings['rescale_factor']
    if type(factor) is not float or not math.isclose(factor, 1 / 255, rel_tol=1e-9):
      self.refuse(f'rescale_factor {factor!r}', '1/255')
    longest = self.edge('size')
    if longest > LONGEST_EDGE:
      self.refuse(f'a longest edge of {longest}', f'at most {LONGEST_EDGE}')
    if self.settings['resample'] not in range(6):
      self.refuse(f'resample {self.settings["resample"]!r}', 'a filter of Pillow, 0 to 5')
    if self.settings['do_image_splitting'] not in (True, False):
      self.refuse(f'do_image_splitting {self.settings["do_image_splitting"]!r}', 'true or false')
    return ImageConfig(
      longest_edge=longest,
      tile=self.edge('max_image_size'),
      split=bool(self.settings['do_image_splitting']),
      resample=int(self.settings['resample']),
      mean=self.channels('image_mean'),
      std=self.channels('image_std'),
    )

  def edge(self, key: str) -> int:
    held = self.settings[key]
    # Sides that are null are not asked for.
    sides = {k: v for k, v in held.items() if v is not None} if isinstance(held, dict) else {}
    longest = sides.pop('longest_edge', None)
    if type(longest) is not int or longest < 1 or sides:
      self.refuse(f'{key} {held!r}', "{'longest_edge': a number of pixels}")
    return longest

  def channels(self, key: str) -> tuple[float, float, float]:
    held = self.settings[key]
    known = isinstance(held, list) and len(held) == 3
    if not known or not all(type(value) in (int, float) for value in held):
      self.refuse(f'{key} {held!r}', 'three numbers')
    if key == 'image_std' and min(held) <= 0:
      self.refuse(f'{key} {held!r}', 'three numbers above 0')
    red, green, blue = map(float, held)
    return red, green, blue

  def refuse(self, what: str, instead: str = '') -> NoReturn:
    raise UserError(
      f'{self.file}: has {what}, which is not supported' + (f'; give {instead}' if instead else '')
    )

"""An image as a vision tower takes it: scaled, cut into tiles, and named in the prompt.

As Idefics3 (Laurencon et al. 2024, section 3.1) has it. An image is scaled so that its
longer side has a fixed length and both are multiples of a tile's, cut into tiles, and
followed by the whole of it squeezed into one more:

    tiles = cut(decode(row['image'], where), images)
    pixels_IYXC = normalise(tiles.pixels_IYXC, images)
    grids = [(tiles.rows, tiles.columns)]
    ids = expand(tokenizer.encode_chat(messages), tokenizer, vision, images, grids)

An `<image>` in the prompt becomes, for each tile, its place and a token for each of its
embeddings; the shape of the cut follows from an image's size alone (`grid`).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lora_jax.config import ImageConfig, VisionConfig
from lora_jax.errors import UserError
from lora_jax.hub.chat_template import IMAGE
from lora_jax.hub.tokenizer import ChatTokenizer

_AROUND = '<fake_token_around_image>'
_WHOLE = '<global-img>'


@dataclasses.dataclass(frozen=True)
class Tiles:
  """An image, cut.

  Attributes:
    pixels_IYXC: uint8, RGB: the tiles row by row, and last the whole image; or that alone.
    rows: of tiles; 0 where the image was not cut.
    columns: of tiles.
  """

  pixels_IYXC: np.ndarray
  rows: int
  columns: int


def cut(image: Image.Image, config: ImageConfig) -> Tiles:
  """Scales an RGB image and cuts it."""
  resize = lambda image, size: image.resize(size, Image.Resampling(config.resample))
  image = resize(image, _scaled(image.size, config.longest_edge))
  tile = config.tile
  rows, columns = 0, 0
  parts = []
  if config.split:
    image = resize(image, _multiple(image.size, tile))
    columns, rows = image.size[0] // tile, image.size[1] // tile
    if rows * columns > 1:
      whole = np.asarray(image).reshape(rows, tile, columns, tile, 3)
      parts = [*whole.swapaxes(1, 2).reshape(-1, tile, tile, 3)]
    else:
      rows, columns = 0, 0
  return Tiles(np.stack([*parts, np.asarray(resize(image, (tile, tile)))]), rows, columns)


def grid(size: tuple[int, int], config: ImageConfig) -> tuple[int, int]:
  """Rows and columns that an image of (width, height) is cut into; (0, 0): it is not."""
  if not config.split:
    return 0, 0
  width, height = _multiple(_scaled(size, config.longest_edge), config.tile)
  rows, columns = height // config.tile, width // config.tile
  return (rows, columns) if rows * columns > 1 else (0, 0)


def normalise(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
  """Pixels (..., C) in 0..255 as the float32 values that a tower takes."""
  # By a table of all values, which rounds as the reference does and is quick.
  values_V1 = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
  mean_1C, std_1C = np.asarray([config.mean], np.float32), np.asarray([config.std], np.float32)
  table_VC = (values_V1 - mean_1C) / std_1C
  return table_VC[pixels, np.arange(pixels.shape[-1])]


def image_text(rows: int, columns: int, embeddings: int) -> str:
  """What stands in a prompt for an image that was cut into so many rows and columns."""
  held = IMAGE * embeddings
  text = ''
  for row in range(1, rows + 1):
    for column in range(1, columns + 1):
      text += f'{_AROUND}<row_{row}_col_{column}>{held}'
    text += '\n'
  before = '\n' if rows else ''
  return f'{text}{before}{_AROUND}{_WHOLE}{held}{_AROUND}'


def expand(
  ids: Sequence[int],
  tokenizer: ChatTokenizer,
  vision: VisionConfig,
  images: ImageConfig,
  grids: Sequence[tuple[int, int]],
) -> list[int]:
  """A chat's ids with a token for each embedding of its images.

  Args:
    ids: from `ChatTokenizer.encode_chat`, one image token for an image.
    tokenizer: which gave them.
    vision: of the base.
    images: how its images are cut.
    grids: rows and columns of each image, in order; see `grid`.

  Raises:
    UserError: there are more or fewer images than image tokens.
  """
  places = [i for i, token in enumerate(ids) if token == vision.image_token]
  if len(places) != len(grids):
    raise UserError(f'a prompt has places for {len(places)} images, and {len(grids)} are given')
  embeddings = vision.embeddings(images.tile)
  out, start = [], 0
  for place, shape in zip(places, grids, strict=True):
    # The text between special tokens is encoded by itself, so that its ids are the same here.
    out += [*ids[start:place], *tokenizer.encode(image_text(*shape, embeddings))]
    start = place + 1
  return [*out, *ids[start:]]


def _scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
  """Width and height with the longer side made `longest`, and the other even."""
  width, height = size
  aspect = width / height
  even = lambda side: max(side + side % 2, 1)
  if width >= height:
    return longest, even(int(longest / aspect))
  return even(int(longest * aspect)), longest


def _multiple(size: tuple[int, int], tile: int) -> tuple[int, int]:
  """Width and height as whole tiles: the longer side rounded up, the other after it."""
  width, height = size
  aspect = width / height
  up = lambda side: math.ceil(side / tile) * tile
  if width >= height:
    return up(width), up(int(up(width) / aspect))
  return up(int(up(height) * aspect)), up(height)

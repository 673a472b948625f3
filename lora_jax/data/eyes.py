"""How a base takes images: which tokens stand for one, and which pixels its tower is shown.

    eyes = Eyes(base.config.vision, base.images)
    picture = eyes.picture(row['image'], 'invoice_ocr row 17')     by the image's head alone
    ids = eyes.spell(tokenizer.encode_chat(messages), tokenizer, [picture])
    tiles_IYXC = eyes.tiles(row['image'], picture)                 decoded, cut, normalised

A `Picture` is all that is remembered of an image: a hash of its bytes, by which its
features are found again (`lora_jax.data.features`), and how it is cut.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lora_jax.config import ImageConfig, VisionConfig
from lora_jax.data import images, tiles
from lora_jax.errors import UserError
from lora_jax.hub.tokenizer import ChatTokenizer

_GREY = (128, 128, 128)


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image of a row.

  Attributes:
    key: hash of what is looked at; equal images have one.
    where: the first row that it was found in, for messages.
    rows: of tiles that it is cut into; 0: it is not cut.
    columns: of tiles.
    embeddings: tokens of a prompt that its features take the place of.
  """

  key: str
  where: str
  rows: int
  columns: int
  embeddings: int

  @property
  def tiles(self) -> int:
    """I: its tiles, and the whole of it squeezed into one more."""
    return self.rows * self.columns + 1


@dataclasses.dataclass(frozen=True)
class Eyes:
  """All that decides what a base makes of an image, but for weights.

  Attributes:
    vision: of the base.
    images: how its images are cut and normalised.
    blank: show it a grey image of the same size instead.
  """

  vision: VisionConfig
  images: ImageConfig
  blank: bool = False

  def picture(self, data: bytes | None, where: str) -> Picture:
    """What is known of an encoded image by its head.

    Raises:
      UserError: there is none, or it cannot be one; `where` is named.
    """
    width, height = images.size(data, where)
    # A blank image is its size, so that those of one size are looked at once.
    content = f'{width} x {height}'.encode() if self.blank else data or b''
    rows, columns = tiles.grid((width, height), self.images)
    embeddings = (rows * columns + 1) * self.vision.embeddings(self.images.tile)
    return Picture(hashlib.sha256(content).hexdigest(), where, rows, columns, embeddings)

  def tiles(self, data: bytes | None, picture: Picture) -> np.ndarray:
    """Normalised float32 pixels_IYXC of an encoded image.

    Raises:
      UserError: it is damaged or cut short; the picture's row is named.
    """
    if self.blank:
      image = Image.new('RGB', images.size(data, picture.where), _GREY)
    else:
      image = images.decode(data, picture.where)
    cut = tiles.cut(image, self.images)
    if (cut.rows, cut.columns) != (picture.rows, picture.columns):
      raise UserError(
        f'{picture.where}: its image is {image.width} x {image.height}, and its head says '
        'otherwise; save it again'
      )
    return tiles.normalise(cut.pixels_IYXC, self.images)

  def spell(
    self, ids: Sequence[int], tokenizer: ChatTokenizer, pictures: Sequence[Picture]
  ) -> list[int]:
    """A chat's ids with a token for each embedding of its images; see `tiles.expand`."""
    grids = [(picture.rows, picture.columns) for picture in pictures]
    return tiles.expand(ids, tokenizer, self.vision, self.images, grids)

  def slots(self, tokens: np.ndarray) -> np.ndarray:
    """int32: which of its row's embeddings each token (..., T) becomes, or -1."""
    is_image = tokens == self.vision.image_token
    return np.where(is_image, np.cumsum(is_image, axis=-1) - 1, -1).astype(np.int32)


def most_embeddings(rows: Sequence[tuple[int, int]], room: int) -> int:
  """Embeddings that rows can bring together whose tokens add up to at most `room`.

  Args:
    rows: tokens and embeddings of each.
    room: at least the tokens of the longest.

  Returns:
    A bound that holds however they are packed; 0 where none has any.
  """
  # In whole numbers: a quotient that is rounded down leaves no room for rows that just fit.
  return max(room * embeddings // tokens for tokens, embeddings in rows)

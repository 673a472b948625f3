"""Encoded images of rows, as pixels: what a user expects, or an error that names the row.

    image = decode(row['image'], where='invoice_ocr row 17')

Whatever comes out is upright, RGB, 8 bits a channel: the first frame of an animation, on
white where it is transparent, of 16 bits the upper ones, CMYK as it is seen.
"""

import contextlib
import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

from lora_jax.errors import UserError, one_line

# What Pillow reads by itself. It knows formats that call other programs, or hold scripts.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')
_GIVE = 'give PNG, JPEG, WebP, GIF, BMP, TIFF or PPM'

# More are not unpacked: no photograph or scan has them, and a few bytes can claim to.
MOST_PIXELS = 2**26

# How a camera was held, and the ways in which width and height change places.
_ORIENTATION, _TURNED = ExifTags.Base.Orientation, range(5, 9)


def decode(data: bytes | None, where: str) -> Image.Image:
  """An image in memory, RGB.

  Args:
    data: an encoded image.
    where: which row it is of, for the message.

  Raises:
    UserError: there is none, it is of no kind that is read, damaged, cut short, empty, or
      larger than `MOST_PIXELS`.
  """
  image = _opened(data, where)
  try:
    image.load()
    return _rgb(_upright(image))
  except Exception as error:
    raise UserError(
      f'{where}: its image is damaged or cut short ({one_line(error)}); copy it again, or leave '
      'the row out'
    ) from error


def size(data: bytes | None, where: str) -> tuple[int, int]:
  """Width and height as `decode` would have them, by the image's head alone: it may be cut short.

  Raises:
    UserError: as `decode`, but for damage past the head.
  """
  image = _opened(data, where)
  width, height = image.size
  # Pillow gives a TIFF's size as it will be turned. A PNG's own `getexif` would decode it.
  if image.format != 'TIFF':
    with contextlib.suppress(Exception):
      if Image.Image.getexif(image).get(_ORIENTATION) in _TURNED:
        return height, width
  return width, height


def _opened(data: bytes | None, where: str) -> Image.Image:
  """An image whose head was read."""
  if not data:
    raise UserError(f'{where}: has no image; give one, or leave the row out')
  try:
    # Pillow's own limits lie above ours; at the lower of them it warns alone.
    with warnings.catch_warnings():
      warnings.simplefilter('error', Image.DecompressionBombWarning)
      image = Image.open(io.BytesIO(data), formats=FORMATS)
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise UserError(
      f'{where}: its image has more than {MOST_PIXELS:,} pixels; scale it down'
    ) from error
  # Readers and decoders raise whatever the bytes led them to.
  except Exception as error:
    raise UserError(
      f'{where}: its image ({len(data):,} bytes) is damaged, or of a kind that is not read; {_GIVE}'
    ) from error
  width, height = image.size
  if not width or not height:
    raise UserError(f'{where}: its image is {width} x {height} pixels; leave the row out')
  if width * height > MOST_PIXELS:
    raise UserError(
      f'{where}: its image is {width} x {height}, more than {MOST_PIXELS:,} pixels; scale it down'
    )
  return image


def _upright(image: Image.Image) -> Image.Image:
  """Turned as the camera says it was held; damaged tags say nothing."""
  with contextlib.suppress(Exception):
    return ImageOps.exif_transpose(image)
  return image


def _rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith('I'):
    # Pillow's own conversion would clip 16 bits to white.
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65_535:
      raise ValueError('its channel has more than 16 bits')
    image = Image.fromarray((values // 256).astype(np.uint8))
  if image.mode == 'F':
    raise ValueError('its pixels are fractions, of no known range')
  if 'A' in image.getbands() or 'transparency' in image.info:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return image.convert('RGB')

"""data/images.py: images as users have them, and those that nobody can read."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import tiny_vlm
from PIL import Image

from lora_jax.data.images import MOST_PIXELS, decode, size
from lora_jax.errors import UserError

WHERE = 'receipts row 17'


def encoded(image, kind='PNG', **options):
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def pixels(data):
  image = decode(data, WHERE)
  assert image.mode == 'RGB'
  return np.asarray(image)


def claims(width, height, data=b''):
  """A PNG of one grey channel that says it is so large, whatever it holds."""
  chunk = lambda kind, held: (
    struct.pack('>I', len(held)) + kind + held + struct.pack('>I', zlib.crc32(kind + held))
  )
  header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
  body = chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + header + body


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'PPM'])
def test_common_kinds(kind):
  image = tiny_vlm.image(31, 17)
  options = {'lossless': True} if kind == 'WEBP' else {}
  found = pixels(encoded(image, kind, **options))
  assert found.shape == (17, 31, 3)
  if kind != 'JPEG':
    np.testing.assert_array_equal(found, np.asarray(image))


def test_sixteen_bits_keep_the_upper_eight():
  values = np.linspace(0, 65_535, 40 * 9).astype(np.uint16).reshape(9, 40)
  for kind in ('PNG', 'TIFF', 'PPM'):
    found = pixels(encoded(Image.fromarray(values), kind))
    np.testing.assert_array_equal(found, np.repeat((values // 256)[..., None], 3, axis=2))


def test_cmyk_and_grey_and_palettes():
  image = tiny_vlm.image(24, 24)
  printed = pixels(encoded(image.convert('CMYK'), 'JPEG', quality=95))
  assert np.abs(printed.astype(int) - np.asarray(image)).mean() < 12
  grey = pixels(encoded(image.convert('L')))
  np.testing.assert_array_equal(grey, np.repeat(np.asarray(image.convert('L'))[..., None], 3, 2))
  assert set(np.unique(pixels(encoded(image.convert('1'))))) == {0, 255}
  palette = image.quantize(16)
  np.testing.assert_array_equal(pixels(encoded(palette)), np.asarray(palette.convert('RGB')))


def test_what_is_transparent_is_white():
  image = Image.new('RGBA', (3, 1))
  for x, alpha in enumerate((0, 51, 255)):
    image.putpixel((x, 0), (10, 20, 250, alpha))
  found = pixels(encoded(image))[0]
  np.testing.assert_array_equal(found[[0, 2]], [[255] * 3, [10, 20, 250]])
  np.testing.assert_allclose(found[1], [206, 208, 254], atol=1)
  keyed = Image.new('P', (2, 1))
  keyed.putpalette([0, 0, 0, 90, 80, 70])
  keyed.putpixel((1, 0), 1)
  found = pixels(encoded(keyed, 'GIF', transparency=0))[0]
  np.testing.assert_array_equal(found, [[255] * 3, [90, 80, 70]])


@pytest.mark.parametrize('kind', ['GIF', 'PNG', 'WEBP', 'TIFF'])
def test_of_an_animation_the_first_frame(kind):
  frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'lime', 'blue')]
  options = {'lossless': True} if kind == 'WEBP' else {}
  data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
  assert Image.open(io.BytesIO(data)).n_frames == 3
  np.testing.assert_array_equal(pixels(data)[4, 4], [255, 0, 0])


def test_a_photograph_is_upright():
  image = tiny_vlm.image(40, 20)
  exif = Image.Exif()
  exif[0x0112] = 6
  found = pixels(encoded(image, 'PNG', exif=exif))
  np.testing.assert_array_equal(found, np.rot90(np.asarray(image), -1))
  # A tag that is damaged turns nothing.
  found = pixels(encoded(image, 'PNG', exif=b'Exif\x00\x00II*\x00\xff\xff'))
  np.testing.assert_array_equal(found, np.asarray(image))


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'TIFF', 'GIF', 'BMP', 'PPM'])
def test_the_head_alone_says_the_size(kind):
  image = tiny_vlm.image(31, 17)
  held = [{}] if kind in ('GIF', 'BMP', 'PPM') else [{'exif': turned(i)} for i in range(1, 9)]
  found = set()
  for options in held:
    data = encoded(image, kind, **options)
    found.add(size(data, WHERE))
    assert size(data, WHERE) == decode(data, WHERE).size
    # What lies past the head is not looked at.
    if kind in ('PNG', 'JPEG', 'BMP', 'PPM'):
      assert size(data[: len(data) - 40], WHERE) == size(data, WHERE)
  assert found == ({(31, 17)} if len(held) == 1 else {(31, 17), (17, 31)})


def turned(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif


PNG = encoded(tiny_vlm.image(50, 40))
JPEG = encoded(tiny_vlm.image(50, 40), 'JPEG')
BAD = {
  'missing': (None, 'has no image'),
  'empty': (b'', 'has no image'),
  'text': (b'<html>404 Not Found</html>', 'of a kind that is not read; give PNG'),
  'script': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'of a kind that is not read'),
  'truncated png': (PNG[: len(PNG) // 2], 'damaged or cut short'),
  'truncated jpeg': (JPEG[: len(JPEG) // 2], 'damaged or cut short'),
  'truncated header': (PNG[:20], 'is damaged, or of a kind'),
  'damaged': (PNG[:60] + bytes(len(PNG) - 60), 'damaged or cut short'),
  'zero wide': (claims(0, 5), 'damaged|0 x 5'),
  'large': (claims(8193, 8192, bytes(9)), '8193 x 8192, more than 67,108,864 pixels; scale it'),
  'huge': (claims(12_000, 9_000), 'more than 67,108,864 pixels'),
  'a bomb': (claims(200_000, 200_000), 'more than 67,108,864 pixels'),
  'fractions': (encoded(Image.new('F', (4, 4)), 'TIFF'), 'fractions'),
  'thirty-two bits': (
    encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), 'TIFF'),
    'more than 16 bits',
  ),
}


# What their heads give away.
EARLY = {'missing', 'empty', 'text', 'script', 'truncated header', 'zero wide'}
EARLY |= {'large', 'huge', 'a bomb'}


@pytest.mark.parametrize('name', BAD)
def test_bad_images_are_one_line_that_names_the_row(name):
  data, message = BAD[name]
  with pytest.raises(UserError, match=message) as caught:
    decode(data, WHERE)
  if name in EARLY:
    with warnings.catch_warnings(record=True) as said:
      warnings.simplefilter('always')
      with pytest.raises(UserError, match=message):
        size(data, WHERE)
    assert not said
  text = str(caught.value)
  assert text.startswith(f'{WHERE}: ')
  assert '\n' not in text
  assert MOST_PIXELS == 67_108_864


def test_bytes_that_flip_never_raise_anything_else():
  rng = np.random.default_rng(0)
  refused = 0
  for whole in (PNG, JPEG, encoded(tiny_vlm.image(50, 40), 'GIF')):
    for _ in range(60):
      data = bytearray(whole)
      for place in rng.integers(0, len(data), 4):
        data[place] = rng.integers(256)
      try:
        shown = size(bytes(data), WHERE)
        image = decode(bytes(data), WHERE)
        assert image.mode == 'RGB'
        assert image.size == shown
      except UserError:
        refused += 1
  assert refused > 20

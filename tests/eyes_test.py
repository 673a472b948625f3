"""data/eyes.py, and images in prompts: what stands for them, and what is never cut."""

import dataclasses
import struct
import zlib

import numpy as np
import pytest
import seeing
import tiny_vlm
from seeing import EYES, TASK
from tiny_vlm import IMAGE_TOKEN

from lora_jax.data import encode, images, tiles
from lora_jax.data.eyes import most_embeddings
from lora_jax.data.packing import plan
from lora_jax.data.task import Prompt
from lora_jax.errors import UserError

WHERE = 'shown row 3'


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return seeing.tokenizer(tmp_path_factory.mktemp('eyes') / 'tokenizer')


def test_a_picture_is_what_its_tiles_turn_out_to_be():
  for size, count in seeing.SIZES.items():
    data = seeing.encoded(*size)
    picture = EYES.picture(data, WHERE)
    pixels_IYXC = EYES.tiles(data, picture)
    assert len(pixels_IYXC) == picture.tiles == count
    assert picture.embeddings == count * tiny_vlm.TOKENS
    cut = tiles.cut(images.decode(data, WHERE), EYES.images)
    expected = tiles.normalise(cut.pixels_IYXC, EYES.images)
    np.testing.assert_array_equal(pixels_IYXC, expected)
    assert pixels_IYXC.dtype == np.float32


def test_equal_images_have_one_key_and_others_another():
  one, other = seeing.encoded(seed=0), seeing.encoded(seed=1)
  key = lambda data, eyes=EYES: eyes.picture(data, WHERE).key
  assert key(one) == key(bytes(one)) != key(other)
  # Blank, they are what their size is.
  blank = dataclasses.replace(EYES, blank=True)
  assert key(one, blank) == key(other, blank) != key(seeing.encoded(50, 20), blank)


def test_a_blank_image_is_grey_and_cut_as_the_image_is():
  blank = dataclasses.replace(EYES, blank=True)
  for size, count in seeing.SIZES.items():
    data = seeing.encoded(*size)
    picture = blank.picture(data, WHERE)
    pixels_IYXC = blank.tiles(data, picture)
    assert len(pixels_IYXC) == count
    assert len(np.unique(pixels_IYXC)) == 1
    assert abs(pixels_IYXC.max()) < 0.01
    assert picture.embeddings == EYES.picture(data, WHERE).embeddings


def late_orientation(data, orientation=6):
  """A PNG that says only after its pixels how it was held."""
  tag = struct.pack('>2sHIHHHIHHI', b'MM', 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
  body = b'eXIf' + tag
  chunk = struct.pack('>I', len(tag)) + body + struct.pack('>I', zlib.crc32(body))
  end = data.rindex(b'IEND') - 4
  return data[:end] + chunk + data[end:]


def test_an_image_that_is_not_what_its_head_says_is_an_error_with_its_row():
  data = late_orientation(seeing.encoded(50, 20))
  assert images.decode(data, WHERE).size == (20, 50)
  picture = EYES.picture(data, WHERE)
  with pytest.raises(UserError, match='shown row 3: its image is 20 x 50, and its head says'):
    EYES.tiles(data, picture)


def test_a_prompt_has_a_token_for_each_embedding(tokenizer):
  for example in seeing.rows():
    ids = np.asarray(encode.encode_prompt(TASK, example, tokenizer, 480, EYES))
    found = encode.pictures(TASK, example, EYES)
    assert len(found) == len(example['images'])
    total = sum(picture.embeddings for picture in found)
    assert (ids == IMAGE_TOKEN).sum() == total
    slots = EYES.slots(ids)
    assert slots[ids == IMAGE_TOKEN].tolist() == list(range(total))
    assert (slots[ids != IMAGE_TOKEN] == -1).all()
    text = tokenizer.decode(ids.tolist(), skip_special=False)
    assert example['text'] in text
    # Images come before the text, each with the whole of it last.
    assert text.count('<global-img>') == len(found)
    assert text.rfind('<image>') < text.index('Row')
    row = encode.encode_example(TASK, example, tokenizer, seeing.LIMITS, EYES)
    assert row.pictures == found
    assert row.embeddings == total
    np.testing.assert_array_equal(row.arrays['slots'], EYES.slots(row.arrays['tokens']))
    assert not row.arrays['weights'][row.arrays['slots'] >= 0].any()


def test_a_row_cannot_put_an_image_where_there_is_none(tokenizer):
  example = {**seeing.rows(2)[1], 'text': 'Look: <image><fake_token_around_image>'}
  ids = encode.encode_prompt(TASK, example, tokenizer, 480, EYES)
  assert ids.count(IMAGE_TOKEN) == encode.pictures(TASK, example, EYES)[0].embeddings
  assert 'Look: <image>' in tokenizer.decode(ids, skip_special=False)


def test_text_without_images_is_encoded_as_ever(tokenizer):
  example = seeing.rows(1)[0]
  assert not example['images']
  ids = encode.encode_prompt(TASK, example, tokenizer, 480, EYES)
  assert ids == encode.encode_prompt(TASK, example, tokenizer, 480)
  assert ids == tokenizer.encode_chat([{'role': 'user', 'content': example['text']}])


def test_a_document_is_cut_and_an_image_never(tokenizer):
  cut = dataclasses.replace(
    TASK, prompt=lambda e: Prompt(e['text'], document='long ' * 200, images=e['images'])
  )
  for example in seeing.rows():
    bare = encode.encode_prompt(TASK, example, tokenizer, 480, EYES)
    limit = len(bare) + 20
    ids = encode.encode_prompt(cut, example, tokenizer, limit, EYES)
    assert len(bare) < len(ids) <= limit
    assert ids.count(IMAGE_TOKEN) == bare.count(IMAGE_TOKEN)


def test_an_image_too_large_for_the_prompt_says_what_would_help(tokenizer):
  example = seeing.rows(2)[1]
  needed = len(encode.encode_prompt(TASK, example, tokenizer, 480, EYES))
  shown = encode.pictures(TASK, example, EYES)[0]
  with pytest.raises(encode.PromptTooLongError) as caught:
    encode.encode_prompt(TASK, example, tokenizer, needed - 1, EYES)
  text = str(caught.value)
  assert f'shown row row-1: its prompt takes {needed} tokens' in text
  assert f'{shown.embeddings} of them for the {shown.tiles} tiles of its image' in text
  assert 'lower --image_edge (now 56), raise --max_length or' in text
  smaller = seeing.smaller(longest_edge=28)
  assert len(encode.encode_prompt(TASK, example, tokenizer, needed - 1, smaller)) < needed
  without = {**example, 'images': ()}
  with pytest.raises(encode.PromptTooLongError) as caught:
    encode.encode_prompt(TASK, without, tokenizer, 10, EYES)
  assert 'image' not in str(caught.value)


def test_a_missing_image_names_its_row(tokenizer):
  example = {**seeing.rows(2)[1], 'images': (None,)}
  with pytest.raises(UserError, match='shown row row-1: has no image; give one'):
    encode.encode_prompt(TASK, example, tokenizer, 480, EYES)


@pytest.mark.parametrize('seed', range(4))
def test_there_is_room_for_the_embeddings_of_rows_however_they_are_packed(seed):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 90, 40)
  embeddings = [int(rng.integers(0, n + 1)) * int(rng.integers(0, 2)) for n in tokens]
  bound = most_embeddings([*zip(tokens.tolist(), embeddings, strict=True)], room=100)
  for epoch in range(20):
    for group in plan(tokens.tolist(), 100, seed, epoch):
      assert sum(embeddings[i] for i in group) <= bound <= 100
  assert most_embeddings([(3, 0), (90, 0)], room=100) == 0
  assert most_embeddings([(3, 0), (97, 97)], room=97) == 97
  # Two rows that just fit; 64 / 98 is rounded down, and twice it falls below.
  assert most_embeddings([(98, 64), (98, 64)], room=196) == 128

"""data/tiles.py: properties of the cut, and prompts that fit it."""

import numpy as np
import pytest
import tiny_vlm

from lora_jax.config import ImageConfig
from lora_jax.data import tiles
from lora_jax.errors import UserError
from lora_jax.hub import tokenizer_hf

CONFIG = ImageConfig(56, 28, resample=0)


def test_tiles_are_the_image_row_by_row_and_then_the_whole_of_it():
  # Of a size that nothing scales, a tile is its piece of the image.
  picture = tiny_vlm.image(56, 56)
  cut = tiles.cut(picture, CONFIG)
  assert (cut.rows, cut.columns, cut.pixels_IYXC.shape) == (2, 2, (5, 28, 28, 3))
  assert cut.pixels_IYXC.dtype == np.uint8
  whole = np.asarray(picture)
  for row in range(2):
    for column in range(2):
      piece = whole[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
      np.testing.assert_array_equal(cut.pixels_IYXC[2 * row + column], piece)
  np.testing.assert_array_equal(cut.pixels_IYXC[4], np.asarray(picture.resize((28, 28), 0)))
  values = tiles.normalise(np.asarray([[[0, 127, 255]]], np.uint8), CONFIG)
  np.testing.assert_allclose(values, [[[-1, -1 / 255, 1]]], atol=1e-6)


def test_an_image_of_one_tile_is_not_cut():
  cut = tiles.cut(tiny_vlm.image(20, 28), ImageConfig(28, 28))
  assert (cut.rows, cut.columns, len(cut.pixels_IYXC)) == (0, 0, 1)
  cut = tiles.cut(tiny_vlm.image(90, 28), ImageConfig(90, 28, split=False))
  assert (cut.rows, cut.columns, len(cut.pixels_IYXC)) == (0, 0, 1)


@pytest.mark.parametrize('size', [(10_000, 1), (1, 10_000), (3, 2), (511, 512)])
@pytest.mark.parametrize('config', [CONFIG, ImageConfig(100, 28), ImageConfig(27, 28)])
def test_a_grid_follows_from_the_size(size, config):
  picture = tiny_vlm.image(*size)
  cut = tiles.cut(picture, config)
  assert tiles.grid(size, config) == (cut.rows, cut.columns)
  assert len(cut.pixels_IYXC) == cut.rows * cut.columns + 1


def test_a_prompt_has_a_token_for_each_embedding(tmp_path):
  tiny_vlm.write_tokenizer(tmp_path)
  tokenizer = tokenizer_hf.from_directory(tmp_path, tiny_vlm.VOCAB)
  token = tiny_vlm.IMAGE_TOKEN
  picture, said = {'type': 'image'}, {'type': 'text', 'text': 'Which <image> of the two?'}
  chat = [{'role': 'user', 'content': [picture, said, picture]}]
  ids = tokenizer.encode_chat(chat)
  # What a row says is text, and no image.
  assert ids.count(token) == 2
  assert 'Which <image> of the two?' in tokenizer.decode(ids, skip_special=False)
  vision, images = tiny_vlm.VISION, tiny_vlm.IMAGES
  out = tiles.expand(ids, tokenizer, vision, images, [(1, 2), (0, 0)])
  assert out.count(token) == 4 * (3 + 1)
  text = tokenizer.decode(out, skip_special=False)
  assert text.count('<row_1_col_2>') == text.count('<row_1_col_1>') == 1
  assert text.count('<global-img>') == 2
  # Nothing else changed.
  left = [i for i in out if i not in {*tokenizer.encode(tiles.image_text(1, 2, 4))}]
  assert left == [i for i in ids if i not in {*tokenizer.encode(tiles.image_text(1, 2, 4))}]
  with pytest.raises(UserError, match='places for 2 images, and 1 are given'):
    tiles.expand(ids, tokenizer, vision, images, [(0, 0)])


def test_texts_and_parts_reach_templates_of_both_kinds(tmp_path):
  tiny_vlm.write_tokenizer(tmp_path)
  parts = tokenizer_hf.from_directory(tmp_path, tiny_vlm.VOCAB)
  texts = tokenizer_hf.from_directory(_with_texts(tmp_path / 'texts'), tiny_vlm.VOCAB)
  answer = {'role': 'assistant', 'content': 'Bile.'}
  asked = [{'role': 'user', 'content': 'What is it?'}, answer]
  assert parts.render(asked, False) == (
    '<|im_start|>User: What is it?<end_of_utterance>\nAssistant: Bile.<end_of_utterance>\n'
  )
  shown = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]}]
  assert '<image> What?' in parts.render(shown)
  assert 'user\n<image>What?<|im_end|>' in texts.render(shown)
  # What ends an answer is found in both.
  ends = [tokenizer.special_tokens for tokenizer in (parts, texts)]
  assert parts.eos_id == ends[0]['<end_of_utterance>']
  assert texts.eos_id == ends[1]['<|im_end|>']


def _with_texts(directory):
  from tiny_tokenizers import CHATML

  tiny_vlm.write_tokenizer(directory)
  (directory / 'chat_template.json').unlink()
  (directory / 'chat_template.jinja').write_text(CHATML)
  return directory

"""A base of text joined to a tower: nothing of it changes, and it is read back as it was."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lora_jax.config import ImageConfig, VisionConfig
from lora_jax.data import tiles
from lora_jax.errors import UserError
from lora_jax.hub import bases, seeing
from lora_jax.transformer import Transformer, init_params
from lora_jax.vision import Features

VISION = VisionConfig(
  image_size=24,
  patch_size=4,
  model_dim=16,
  num_layers=2,
  num_heads=2,
  mlp_dim=32,
  shuffle=2,
  image_token=0,
)
IMAGES = ImageConfig(longest_edge=48, tile=24)


def sight(base):
  config = dataclasses.replace(base.config, vision=VISION)
  params = init_params(config, jax.random.key(0))
  return jax.tree.map(np.asarray, {name: params[name] for name in ('vision', 'connector')})


@pytest.fixture(scope='module')
def joined():
  base = bases.load('tiny')
  return base, seeing.join(base, VISION, IMAGES, sight(base))


def test_text_is_what_it_was(joined):
  base, seen = joined
  table = seen.params['embed_tokens']['embedding']
  np.testing.assert_array_equal(
    table[: base.config.vocab_size], base.params['embed_tokens']['embedding']
  )
  for name in ('layers', 'norm'):
    assert seen.params[name] is base.params[name]
  chat = [{'role': 'user', 'content': 'a <image> and <|im_end|>'}]
  assert seen.tokenizer.encode_chat(chat) == base.tokenizer.encode_chat(chat)
  assert seen.tokenizer.eos_id == base.tokenizer.eos_id
  assert seen.tokenizer.pad_id == base.tokenizer.pad_id
  model, tokens = Transformer(seen.config), np.asarray([base.tokenizer.encode_chat(chat)])
  hidden, _ = model.apply({'params': seen.params}, tokens)
  before, _ = Transformer(base.config).apply({'params': base.params}, tokens)
  np.testing.assert_array_equal(hidden, before)


def test_an_image_becomes_tokens_of_its_own(joined):
  base, seen = joined
  content = [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]
  ids = seen.tokenizer.encode_chat([{'role': 'user', 'content': content}])
  vision = seen.config.vision
  assert vision.image_token == base.config.vocab_size == seeing.image_token(base)
  assert ids.count(vision.image_token) == 1
  whole = tiles.expand(ids, seen.tokenizer, vision, seen.images, [(2, 1)])
  assert whole.count(vision.image_token) == 3 * 9
  # Two tokens before each tile and three around the whole, and newlines.
  assert len(whole) == len(ids) - 1 + 3 * 9 + 2 * 2 + 3 + len(seen.tokenizer.encode('\n\n\n'))


def test_a_written_base_is_read_back(joined, tmp_path):
  _, seen = joined
  seeing.save(tmp_path / 'base', seen)
  again = bases.load(str(tmp_path / 'base'))
  assert again.config == seen.config
  assert again.images == seen.images == IMAGES
  assert again.record['sees'] == 'images'
  ours, theirs = flatten_dict(again.params, sep='/'), flatten_dict(seen.params, sep='/')
  assert ours.keys() == theirs.keys()
  for path, leaf in theirs.items():
    np.testing.assert_array_equal(ours[path], leaf, err_msg=path)
  chat = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'A?'}]}]
  ids = seen.tokenizer.encode_chat(chat)
  assert again.tokenizer.encode_chat(chat) == ids
  model = Transformer(seen.config)
  tokens = np.asarray([tiles.expand(ids, seen.tokenizer, seen.config.vision, IMAGES, [(0, 0)])])
  pixels = np.random.default_rng(0).standard_normal((1, 24, 24, 3), np.float32)

  @jax.jit
  def logits(params):
    values = model.apply({'params': params}, pixels, method='see')
    slots = np.cumsum(tokens == seen.config.vision.image_token, axis=1) - 1
    slots = np.where(tokens == seen.config.vision.image_token, slots, -1)
    features = Features(values.reshape(1, -1, values.shape[-1]), slots)
    hidden, _ = model.apply({'params': params}, tokens, features=features)
    return model.apply({'params': params}, hidden, method='head')

  np.testing.assert_array_equal(logits(again.params), logits(seen.params))
  # What other readers ask for.
  settings = json.loads((tmp_path / 'base' / 'processor_config.json').read_text())
  assert settings['image_seq_len'] == 9


def test_a_base_that_sees_is_not_joined_again(joined):
  _, seen = joined
  with pytest.raises(UserError, match='tiny sees already'):
    seeing.join(seen, VISION, IMAGES, {})


def test_eyes_are_opened_from_a_small_file(joined, tmp_path):
  base, seen = joined
  path = tmp_path / 'sight.safetensors'
  seeing.write_sight(path, VISION, IMAGES, sight(base))
  again = seeing.open_eyes(base, path, 'tiny-sight')
  assert (again.config, again.images) == (seen.config, IMAGES)
  for name, leaf in flatten_dict(again.params, sep='/').items():
    theirs = flatten_dict(seen.params, sep='/')[name]
    np.testing.assert_allclose(leaf, theirs, rtol=1e-3, atol=1e-7, err_msg=name)
  assert again.record['name'] == again.name == 'tiny-sight'
  assert again.record['sees'] == 'images'
  # Other weights are another base.
  other = jax.tree.map(lambda leaf: leaf + 1, sight(base))
  seeing.write_sight(path, VISION, IMAGES, other)
  hashes = {one.record['sha256'] for one in (base, again, seeing.open_eyes(base, path, 'a'))}
  assert len(hashes) == 3

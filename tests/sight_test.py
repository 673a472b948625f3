"""sight.py: a tower looks at each image once, and what is kept is what it saw."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seeing
import tiny_vlm
from seeing import EYES, TASK

from lora_jax import sight as sight_module
from lora_jax.data.eyes import Eyes
from lora_jax.errors import UserError
from lora_jax.sight import Sight, see
from lora_jax.transformer import Transformer

TOGETHER = 4


@pytest.fixture
def batches(monkeypatch):
  """How many tiles the tower was given each time."""
  given = []

  def counted(model, params, pixels_IYXC):
    given.append(len(pixels_IYXC))
    return see(model, params, pixels_IYXC)

  monkeypatch.setattr(sight_module, 'see', counted)
  return given


def all_features(sight, examples, eyes=EYES):
  return [sight.files.of([picture]) for picture in seeing.of_examples(examples, eyes)]


def direct(data, params=None, eyes=EYES, model=tiny_vlm.MODEL):
  """An image's features, of it alone, so many tiles at a time."""
  params = tiny_vlm.params() if params is None else params
  tiles = eyes.tiles(data, eyes.picture(data, 'alone'))
  sight = {name: params[name] for name in ('vision', 'connector')}
  made = []
  for at in range(0, len(tiles), TOGETHER):
    part = tiles[at : at + TOGETHER]
    filled = np.concatenate([part, np.zeros((TOGETHER - len(part), *part.shape[1:]), np.float32)])
    made.append(np.asarray(see(model, sight, filled))[: len(part)])
  return np.concatenate(made).reshape(-1, tiny_vlm.CONFIG.model_dim)


def test_what_is_kept_is_what_the_tower_sees(tmp_path):
  examples = seeing.rows(9)
  _, sight = seeing.looked(tmp_path, examples)
  images = [image for example in examples for image in example['images']]
  for kept, image in zip(all_features(sight, examples), images, strict=True):
    np.testing.assert_array_equal(kept, direct(image))
  tiles = EYES.tiles(images[0], EYES.picture(images[0], ''))
  whole = tiny_vlm.MODEL.apply({'params': tiny_vlm.params()}, tiles, method='see')
  np.testing.assert_allclose(direct(images[0]), whole.reshape(-1, whole.shape[-1]), atol=1e-5)


def test_each_image_is_looked_at_once_and_a_fixed_number_of_tiles_at_a_time(tmp_path, batches):
  examples = seeing.rows(9)
  # An image that two rows have in common is one image.
  examples.append({**examples[1], 'id': 'again', 'images': examples[1]['images'] * 2})
  encoded, sight = seeing.looked(tmp_path, examples)
  tiles = {picture.key: picture.tiles for row in encoded for picture in row.pictures}
  assert sight.looked_at == len(tiles) == 9
  assert batches == [TOGETHER] * -(-sum(tiles.values()) // TOGETHER)
  assert str(sight) == 'sight: 9 images, 9 of them new'
  sight.look(TASK, examples, seeing.of_examples(examples))
  later = seeing.sight(tmp_path / 'features')
  later.look(TASK, examples, seeing.of_examples(examples))
  assert later.looked_at == 0
  assert str(later) == 'sight: 9 images, 0 of them new'
  assert len(batches) == -(-sum(tiles.values()) // TOGETHER)


def test_whatever_features_depend_on_is_in_their_name(tmp_path):
  examples, params = seeing.rows(3), tiny_vlm.params()
  nudged = lambda path, leaf: leaf.at[(0,) * leaf.ndim].add(1e-3) if path else leaf
  changed = lambda top, pick: {
    **params,
    top: jax.tree_util.tree_map_with_path(
      lambda path, leaf: nudged(pick in jax.tree_util.keystr(path), leaf), params[top]
    ),
  }
  wide = Transformer(tiny_vlm.CONFIG, dtype=jnp.bfloat16)
  sights = {
    'as it is': seeing.sight(tmp_path),
    'tower': seeing.sight(tmp_path, changed('vision', 'fc1')),
    'connector': seeing.sight(tmp_path, changed('connector', 'proj')),
    'dtype': seeing.sight(tmp_path, model=wide),
    'stored': seeing.sight(tmp_path, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)),
    'blank': seeing.sight(tmp_path, eyes=dataclasses.replace(EYES, blank=True)),
    'mean': seeing.sight(tmp_path, eyes=seeing.smaller(mean=(0.4, 0.5, 0.5))),
    'edge': seeing.sight(tmp_path, eyes=seeing.smaller(longest_edge=84)),
    'filter': seeing.sight(tmp_path, eyes=seeing.smaller(resample=3)),
  }
  found = {}
  for name, sight in sights.items():
    found[name] = seeing.of_examples(examples, sight.eyes)
    sight.look(TASK, examples, found[name])
    assert sight.looked_at == len({picture.key for picture in found[name]}), name
  as_it_is = sights['as it is'].files.of(found['as it is']).astype(np.float32)
  for name in ('tower', 'connector', 'dtype', 'stored', 'blank', 'mean', 'filter'):
    other = sights[name].files.of(found[name]).astype(np.float32)
    assert other.shape == as_it_is.shape
    assert np.abs(other - as_it_is).max() > 0, name
  # What only the language model has is no part of it.
  embed = {'embedding': params['embed_tokens']['embedding'] + 1}
  same = seeing.sight(tmp_path, {**params, 'embed_tokens': embed})
  same.look(TASK, examples, found['as it is'])
  assert same.looked_at == 0


def test_features_are_kept_in_the_dtype_of_the_model(tmp_path):
  model = Transformer(tiny_vlm.CONFIG, dtype=jnp.bfloat16)
  _, sight = seeing.looked(tmp_path, seeing.rows(3), seeing.sight(tmp_path, model=model))
  (kept, *_) = all_features(sight, seeing.rows(3))
  assert kept.dtype == jnp.bfloat16
  expected = direct(seeing.rows(3)[1]['images'][0], model=model)
  np.testing.assert_array_equal(kept, expected.astype(jnp.bfloat16))


def test_a_damaged_file_is_made_again(tmp_path):
  examples = seeing.rows(6)
  _, sight = seeing.looked(tmp_path, examples)
  before = all_features(sight, examples)
  file = min((tmp_path / 'features').rglob('*.npz'))
  data = file.read_bytes()
  file.write_bytes(data[:-40])
  later = seeing.sight(tmp_path / 'features')
  later.look(TASK, examples, seeing.of_examples(examples))
  assert later.looked_at == 1
  for one, other in zip(all_features(later, examples), before, strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('bad', range(5))
def test_a_damaged_image_names_its_row_and_loses_none_before_it(tmp_path, bad):
  examples = [{**row, 'images': (seeing.encoded(seed=i),)} for i, row in enumerate(seeing.rows(5))]
  whole = examples[bad]['images'][0]
  examples[bad] = {**examples[bad], 'images': (whole[: len(whole) // 2],)}
  sight = seeing.sight(tmp_path)
  with pytest.raises(UserError, match=f'shown row row-{bad}: its image is damaged or cut short'):
    sight.look(TASK, examples, seeing.of_examples(examples))
  assert sight.looked_at == bad
  kept = [sight.files.read(picture) for picture in seeing.of_examples(examples)]
  assert [one is not None for one in kept[:bad]] == [True] * bad
  assert kept[bad] is None
  # Mended, only what is missing is looked at.
  examples[bad] = {**examples[bad], 'images': (whole,)}
  later = seeing.sight(tmp_path)
  later.look(TASK, examples, seeing.of_examples(examples))
  assert later.looked_at == len(examples) - bad


def test_images_of_rows_that_are_not_needed_are_not_looked_at(tmp_path):
  examples = [{**row, 'images': (seeing.encoded(seed=i),)} for i, row in enumerate(seeing.rows(5))]
  sight = seeing.sight(tmp_path)
  sight.look(TASK, examples, seeing.of_examples(examples[3:4]))
  assert sight.looked_at == 1
  sight.look(TASK, examples, [])
  assert sight.looked_at == 1


def test_a_tower_needs_no_more_than_its_own_weights(tmp_path):
  only = {name: tiny_vlm.params()[name] for name in ('vision', 'connector')}
  sight = Sight(tiny_vlm.MODEL, only, Eyes(tiny_vlm.VISION, tiny_vlm.IMAGES), tmp_path)
  examples = seeing.rows(2)
  sight.look(TASK, examples, seeing.of_examples(examples))
  assert sight.looked_at == 1

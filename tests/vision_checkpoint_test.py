"""Checkpoints of models that see: round trips, published shapes, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_vlm
from flax.traverse_util import flatten_dict
from tiny_vlm import PROCESSOR, SETTINGS, write

from lora_jax import lora, lora_family
from lora_jax.config import ImageConfig, LoraConfig
from lora_jax.errors import UserError
from lora_jax.hub import adapters, bases, huggingface, image_processor, peft
from lora_jax.hub.hf_names import name_of, path_of


def change(file, **changes):
  held = json.loads(file.read_text())
  for path, value in changes.items():
    *parents, key = path.split('__')
    inner = held
    for parent in parents:
      inner = inner[parent]
    inner[key] = value
  file.write_text(json.dumps(held))


def test_a_round_trip_changes_nothing(tmp_path):
  base = bases.load(str(write(tmp_path)))
  assert base.config == tiny_vlm.CONFIG
  assert base.images == tiny_vlm.IMAGES
  assert base.record['sees'] == 'images'
  ours = flatten_dict(base.params, sep='/')
  for path, leaf in flatten_dict(tiny_vlm.params(), sep='/').items():
    np.testing.assert_array_equal(ours[path], leaf, err_msg=path)
    if path.endswith('/kernel'):
      # The names of modules go there and back too.
      module = path.removesuffix('/kernel')
      layer = None if leaf.ndim == 2 else len(leaf) - 1
      assert path_of(name_of(module, layer)) == (module, layer)


# Model -> text, vision, the rest; and the numbers that its published file holds, in millions.
PUBLISHED = {
  '256M': ((576, 1536, 30, 9, 3, 49_280), (768, 3072, 12, 12, 512, 16), 4, 256),
  '500M': ((960, 2560, 32, 15, 5, 49_280), (768, 3072, 12, 12, 512, 16), 4, 507),
  '2.2B': ((2048, 8192, 24, 32, 32, 49_155), (1152, 4304, 27, 16, 384, 14), 3, 2246),
}


@pytest.mark.parametrize('size', PUBLISHED)
def test_published_shapes(tmp_path, size):
  text, vision, shuffle, millions = PUBLISHED[size]
  names = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
  text_config = dict(zip((*names, 'num_key_value_heads', 'vocab_size'), text, strict=True))
  settings = {
    'model_type': 'idefics3',
    'image_token_id': 49_153,
    'scale_factor': shuffle,
    'text_config': text_config,
    'vision_config': dict(zip((*names, 'image_size', 'patch_size'), vision, strict=True)),
  }
  (tmp_path / 'config.json').write_text(json.dumps(settings))
  config = huggingface.model_config(tmp_path)
  leaves = jax.tree.leaves(huggingface.abstract_params(config))
  assert sum(leaf.size for leaf in leaves) // 10**6 == millions
  assert config.vision.embeddings(vision[4]) == {512: 64, 384: 81}[vision[4]]


REFUSED = {
  'model_type': ('idefics2', r"model_type 'idefics2' is not supported, .*SmolVLMForCond"),
  'architectures': (['SmolVLMModel'], r'SmolVLMModel.* is not supported'),
  'text_config__model_type': ('qwen2', "a language model of the type 'qwen2'"),
  'text_config__qk_layer_norms': (True, 'qk_layer_norms in its text_config'),
  'text_config__hidden_act': ('gelu', "activation 'gelu'"),
  'text_config__rope_theta': (0.5, 'base 0.5'),
  'text_config': ({}, 'has no hidden_size'),
  'vision_config__hidden_act': ('gelu', "activation 'gelu' in its vision_config"),
  'vision_config__num_channels': (1, 'images of 1 channels'),
  'vision_config__num_attention_heads': (5, '5 heads in a vision tower of width 24'),
  'vision_config__image_size': ([28, 28], r'image_size is \[28, 28\]'),
  'vision_config__patch_size': (9, '3 patches a side, which a scale_factor of 2'),
  'vision_config': (7, 'in place of an object'),
  'scale_factor': (0, 'scale_factor is 0'),
  'image_token_id': (10**6, 'image_token_id of 1000000 in'),
}


@pytest.mark.parametrize('field', REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path, field):
  value, message = REFUSED[field]
  file = tmp_path / 'config.json'
  file.write_text(json.dumps(SETTINGS))
  change(file, **{field: value})
  with pytest.raises(UserError, match=message) as caught:
    huggingface.model_config(tmp_path)
  assert str(caught.value).startswith(str(file))


ODD = {
  'image_processor_type': ('CLIPImageProcessor', "image_processor_type 'CLIPImageProcessor'"),
  'do_resize': (False, 'do_resize False'),
  'do_normalize': (None, 'do_normalize None'),
  'rescale_factor': (1.0, 'rescale_factor 1.0'),
  'resample': (9, 'resample 9'),
  'do_image_splitting': ('no', "do_image_splitting 'no'"),
  'size': ({'height': 9, 'width': 9}, 'size {.*longest_edge'),
  'size__longest_edge': (5000, 'longest edge of 5000'),
  'max_image_size': (28, 'max_image_size 28'),
  'max_image_size__longest_edge': (21, '3 patches a side its model does not join by 2'),
  'image_mean': ([0.5], 'image_mean'),
  'image_std': ([0.5, 0.5, 0], 'image_std'),
}


@pytest.mark.parametrize('field', ODD)
def test_a_processor_that_does_something_else_is_refused_by_name(tmp_path, field):
  value, message = ODD[field]
  file = tmp_path / 'preprocessor_config.json'
  file.write_text(json.dumps(PROCESSOR))
  change(file, **{field: value})
  with pytest.raises(UserError, match=message):
    image_processor.image_config(tmp_path, tiny_vlm.VISION)


def test_where_the_processor_stands(tmp_path):
  with pytest.raises(UserError, match=r'no .*preprocessor_config.json; copy the whole'):
    image_processor.image_config(tmp_path, tiny_vlm.VISION)
  shared = tmp_path / 'processor_config.json'
  shared.write_text(json.dumps({'image_processor': PROCESSOR, 'image_seq_len': 4}))
  assert image_processor.image_config(tmp_path, tiny_vlm.VISION) == tiny_vlm.IMAGES
  change(shared, image_seq_len=169)
  with pytest.raises(UserError, match='image_seq_len is 169, and a tile of 28 pixels becomes 4'):
    image_processor.image_config(tmp_path, tiny_vlm.VISION)
  shared.unlink()
  # What is left out is as in the reference's class.
  (tmp_path / 'preprocessor_config.json').write_text('{}')
  found = image_processor.image_config(tmp_path, tiny_vlm.VISION)
  assert found == ImageConfig(longest_edge=1456, tile=364)
  for text in ('[]', '{'):
    (tmp_path / 'preprocessor_config.json').write_text(text)
    with pytest.raises(UserError, match='JSON'):
      image_processor.image_config(tmp_path, tiny_vlm.VISION)


def test_an_adapter_of_a_blind_base_is_refused_and_the_reverse(tmp_path):
  base = bases.load(str(write(tmp_path)))
  config = LoraConfig(rank=2)
  paths = lora.resolve('o_proj,vision/layers/attn/out_proj,connector/.*', base.params)
  tree = lora_family.init(jax.random.key(0), base.params, paths, config)
  tree = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.bfloat16), tree)
  adapter = peft.of(tree, config, sees=True)
  peft.save(tmp_path / 'adapter', adapter, bake_scale=True)
  again = adapters.load(tmp_path / 'adapter', base)
  assert again.ranks == adapter.ranks
  text = {k: v for k, v in base.params.items() if k not in ('vision', 'connector')}
  with pytest.raises(UserError, match='none of this base'):
    peft.load(tmp_path / 'adapter', text)
  # One of text alone has no tensors of modules that its bare names mean in a base that sees.
  tree = lora_family.init(jax.random.key(0), text, lora.resolve('q_proj', text), config)
  shutil.rmtree(tmp_path / 'adapter')
  peft.save(tmp_path / 'adapter', peft.of(tree, config))
  with pytest.raises(UserError, match=r'has no tensors of model.vision_model.encoder'):
    adapters.load(tmp_path / 'adapter', base)

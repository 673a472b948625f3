"""vision.py, and the model and the adapters of a base that sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import tiny_vlm
from flax.traverse_util import flatten_dict

from lora_jax import lora, lora_family, quantize, targets
from lora_jax.config import LoraConfig
from lora_jax.errors import UserError
from lora_jax.hub import huggingface
from lora_jax.quantized import QuantizedKernel
from lora_jax.transformer import Transformer
from lora_jax.vision import Features, image_slots, position_ids, shuffle_pixels

MODEL, CONFIG = tiny_vlm.MODEL, tiny_vlm.CONFIG
TOKEN = tiny_vlm.IMAGE_TOKEN


def pixels(images, side=28, seed=0):
  shape = (images, side, side, 3)
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens():
  """Two rows: with two images, and with one among more text."""
  rows = np.random.default_rng(0).integers(0, TOKEN, (2, 14))
  rows[0, 2:6] = rows[0, 8:12] = rows[1, 5:9] = TOKEN
  return jnp.asarray(rows, jnp.int32)


def features(params, model=MODEL):
  """Of three images, two of them the first row's; the second row is padded with NaN."""
  of_IED = model.apply({'params': params}, pixels(3), method='see')
  values_BED = jnp.full((2, 8, CONFIG.model_dim), jnp.nan)
  values_BED = values_BED.at[0].set(of_IED[:2].reshape(8, -1)).at[1, :4].set(of_IED[2])
  return Features(values_BED, image_slots(tokens(), TOKEN))


def loss(params, model=MODEL):
  hidden_BTD, _ = model.apply({'params': params}, tokens(), features=features(params, model))
  return jnp.sin(model.apply({'params': params}, hidden_BTD, method='head')).mean()


def test_the_parameter_tree():
  tree = flatten_dict(tiny_vlm.params(), sep='/')
  dense = lambda fan_in, fan_out: {'kernel': (2, fan_in, fan_out), 'bias': (2, fan_out)}
  norm = {'scale': (2, 24), 'bias': (2, 24)}
  expected = {
    'patch_embedding': {'kernel': (3 * 7 * 7, 24), 'bias': (24,)},
    'position_embedding': {'embedding': (16, 24)},
    'post_layernorm': {'scale': (24,), 'bias': (24,)},
    **{f'layers/attn/{name}': dense(24, 24) for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj')},
    **{f'layers/layer_norm{i}': norm for i in (1, 2)},
    'layers/mlp/fc1': dense(24, 36),
    'layers/mlp/fc2': dense(36, 24),
  }
  shapes = {f'vision/{path}/{k}': v for path, held in expected.items() for k, v in held.items()}
  shapes['connector/modality_projection/proj/kernel'] = (1, 4 * 24, CONFIG.model_dim)
  text = dataclasses.replace(CONFIG, vision=None)
  blind = flatten_dict(huggingface.abstract_params(text), sep='/')
  shapes |= {path: leaf.shape for path, leaf in blind.items()}
  assert {path: leaf.shape for path, leaf in tree.items()} == shapes


def test_positions_are_shares_of_the_table():
  whole = np.ones((1, 4, 4), bool)
  np.testing.assert_array_equal(position_ids(whole, 4)[0], np.arange(16).reshape(4, 4))
  # Half as many patches skip positions; twice as many share them.
  np.testing.assert_array_equal(position_ids(whole[:, :2, :2], 4)[0], [[0, 2], [8, 10]])
  np.testing.assert_array_equal(position_ids(whole, 2)[0, :, 0], [0, 0, 2, 2])
  # Padding has no share in it.
  seen = whole.copy()
  seen[0, 3:] = seen[0, :, 2:] = False
  ids = np.asarray(position_ids(seen, 4)[0])
  np.testing.assert_array_equal(ids[:3, :2], [[0, 2], [4, 6], [8, 10]])
  assert not ids[3:].any()
  assert not ids[:, 2:].any()
  assert not np.asarray(position_ids(np.zeros((1, 4, 4), bool), 4)).any()


def test_a_shuffle_joins_neighbours_and_loses_none():
  x = np.arange(4 * 6).reshape(1, 4, 6, 1)
  out = np.asarray(shuffle_pixels(jnp.asarray(x), 2))
  assert out.shape == (1, 6, 4)
  np.testing.assert_array_equal(out[0, 0], [0, 1, 6, 7])
  np.testing.assert_array_equal(out[0, 4], [14, 15, 20, 21])


def test_an_image_is_seen_alone_and_without_its_padding():
  params = tiny_vlm.params()
  see = jax.jit(lambda x, seen: MODEL.apply({'params': params}, x, seen, method='see'))
  seen = np.ones((3, 4, 4), bool)
  seen[1, :, 2:] = False
  together = see(pixels(3), seen)
  np.testing.assert_allclose(see(pixels(3)[1:2], seen[1:2])[0], together[1], atol=1e-5)
  other = pixels(3).at[0].add(1.0).at[1, :, 14:].add(1.0)
  moved = see(other, seen)
  # Of the padded image, embeddings of its own half are as they were.
  np.testing.assert_allclose(moved[1, [0, 2]], together[1, [0, 2]], atol=1e-5)
  np.testing.assert_array_equal(moved[2], together[2])
  assert np.abs(moved[0] - together[0]).max() > 1e-2


def test_features_take_the_place_of_their_tokens_alone():
  params = tiny_vlm.params()
  of = features(params)
  x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(2, 14, CONFIG.model_dim)), jnp.float32)
  put = np.asarray(of.put(x_BTD))
  is_image = np.asarray(tokens()) == TOKEN
  np.testing.assert_array_equal(put[~is_image], np.asarray(x_BTD)[~is_image])
  np.testing.assert_array_equal(put[0, is_image[0]], of.values_BED[0])
  np.testing.assert_array_equal(put[1, is_image[1]], of.values_BED[1, :4])
  # An embedding that is not there is no silent zero.
  short = Features(of.values_BED[:, :3], of.slots_BT)
  assert np.isnan(short.put(x_BTD)[0, 11]).all()
  assert np.isfinite(loss(params))


def test_packed_rows_see_their_own_images():
  params = tiny_vlm.params()
  run = jax.jit(
    lambda t, positions, segments, f: MODEL.apply(
      {'params': params}, t, positions, segments, features=f
    )[0]
  )
  apart = np.asarray(run(tokens(), None, None, features(params)))
  of = features(params)
  packed = tokens().reshape(1, -1)
  positions = jnp.tile(jnp.arange(14), 2)[None]
  segments = jnp.repeat(jnp.arange(2), 14)[None]
  values_BED = jnp.concatenate([of.values_BED[0], of.values_BED[1, :4]])[None]
  together = run(packed, positions, segments, Features(values_BED, image_slots(packed, TOKEN)))
  np.testing.assert_allclose(together.reshape(apart.shape), apart, atol=1e-4)


def test_tokens_after_images_decode_as_in_one_pass():
  variables = {'params': tiny_vlm.params()}
  whole, of = tokens(), features(variables['params'])
  run = jax.jit(lambda t, p, past, f: MODEL.apply(variables, t, p, past=past, features=f))
  expected, _ = run(whole, None, (), of)
  cut = 12
  of_prompt = Features(of.values_BED, of.slots_BT[:, :cut])
  positions_BT = jnp.tile(jnp.arange(14)[None], (2, 1))
  start, held = run(whole[:, :cut], None, (), of_prompt)
  # A prompt is run with its images; what follows needs them no more.
  rest, _ = run(whole[:, cut:], positions_BT[:, cut:], ((held, positions_BT[:, :cut]),), None)
  np.testing.assert_allclose(start, expected[:, :cut], atol=1e-4)
  np.testing.assert_allclose(rest, expected[:, cut:], atol=1e-4)


def test_remat_changes_nothing():
  params = tiny_vlm.params()
  plain = jax.jit(jax.grad(loss))(params)
  again = jax.jit(jax.grad(lambda p: loss(p, Transformer(CONFIG, remat=True))))(params)
  tiny_model.assert_trees_close(again, plain, atol=1e-6)
  assert np.abs(plain['vision']['patch_embedding']['kernel']).max() > 0
  halves = Transformer(CONFIG, dtype=jnp.bfloat16)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  assert halves.apply({'params': low}, pixels(1), method='see').dtype == jnp.bfloat16


SIGHT = ('vision/layers/attn/q_proj', 'vision/layers/mlp/fc2', 'connector/modality_projection/proj')


def test_names_mean_the_language_model_and_paths_what_they_say():
  params = tiny_vlm.params()
  blind = huggingface.abstract_params(dataclasses.replace(CONFIG, vision=None))
  for name in ('qkv', 'o_proj', 'fc1', 'fc2', 'all', 'q_proj', 'qkv_proj', 'layers/attn/.*'):
    assert lora.resolve(name, params) == lora.resolve(name, blind)
  for path in SIGHT:
    assert lora.resolve(path, params) == (path,)
  assert len(lora.resolve('vision/.*', params)) == 6
  assert lora.resolve('connector/.*', params) == SIGHT[2:]
  assert lora.resolve('.*/q_proj', params) == ('layers/attn/q_proj', SIGHT[0])
  assert len(lora.resolve('.*', params)) == 7 + 6 + 1
  for name in ('out_proj', 'proj', 'vision/patch_embedding', 'vision/layers/attn/qkv_proj'):
    with pytest.raises(UserError, match=r'matches no module.*vision/layers/attn/out_proj'):
      lora.resolve(name, params)
  assert targets.label(SIGHT[0]) == SIGHT[0]
  norms = lora_family.also_trained(LoraConfig(train_also=('norm', 'scale')), params)
  assert not any(path.startswith('vision') for path in norms)
  found = lora_family.also_trained(LoraConfig(train_also=('vision/layers/.*/bias',)), params)
  assert len(found) == 8


def test_targets_are_checked_before_anything_is_loaded():
  from experiments import _flags

  _flags.check_targets(['all', 'o_proj,vision/layers/attn/.*', 'connector/.*'])
  with pytest.raises(UserError, match=r"'o_porj' matches no module") as caught:
    _flags.check_targets(['o_porj'])
  # Those who have a base without eyes need not read of them.
  assert 'vision' not in str(caught.value)


@pytest.mark.parametrize('changes', [{}, {'dora': True}, {'init': 'pissa'}, {'layers': '1'}])
def test_adapters_of_what_sees_change_nothing_and_then_train(changes):
  params = tiny_vlm.params()
  config = dataclasses.replace(LoraConfig(rank=2, rank_pattern=(('connector/.*', 3),)), **changes)
  chosen = f'o_proj,{",".join(SIGHT)}'
  lora_family.check(config, [chosen], params)
  fresh = lora_family.init(jax.random.key(0), params, lora.resolve(chosen, params), config)
  plan = lora_family.plan(config, fresh)
  # Layers are selected in the language model; what sees is adapted whole.
  o_proj = (0, 2, 0) if config.layers else (2, 2, 2)
  assert plan.ranks == {'layers/attn/o_proj': o_proj} | dict.fromkeys(SIGHT[:2], (2, 2)) | {
    SIGHT[2]: (3,)
  }

  @jax.jit
  @jax.value_and_grad
  def run(adapters):
    return loss(lora.attach(params, adapters, plan.scales()))

  value, grads = run(fresh)
  atol = 1e-5 if changes in ({'init': 'pissa'}, {'dora': True}) else 1e-7
  np.testing.assert_allclose(value, jax.jit(loss)(params), atol=atol)
  flat = flatten_dict(grads, sep='/')
  assert all(np.abs(flat[f'{path}/b']).max() > 0 for path in plan.ranks)
  moved = jax.tree.map(lambda x, g: x + 0.1 * jnp.sign(g), fresh, grads)
  merged = lora.merge(params, moved, plan.scales())
  np.testing.assert_allclose(jax.jit(loss)(merged), run(moved)[0], atol=1e-4)
  assert {*lora.summarise(moved, plan.ranks).modules} == {*plan.ranks}


def test_quantised_is_the_language_model():
  kernels = flatten_dict(quantize.quantize(tiny_vlm.params(), 'int8'), sep='/')
  quantised = {path for path, leaf in kernels.items() if isinstance(leaf, QuantizedKernel)}
  assert quantised == {f'{path}/kernel' for path in lora.resolve('all', tiny_vlm.params())}


def test_what_sees_images_drops_out_without_regard_to_rows():
  params = tiny_vlm.params()
  paths = lora.resolve(f'o_proj,{",".join(SIGHT)}', params)
  adapters = lora.init(jax.random.key(0), params, paths, 2)
  keys = jax.random.split(jax.random.key(1), 3)
  attached = dict(flatten_dict(lora.attach(params, adapters, 1.0, keys, 0.5), sep='/'))
  shapes = {path: attached[f'{path}/kernel'].dropout_key.shape for path in paths}
  assert shapes.pop('layers/attn/o_proj')[1:] == (3,)
  assert {len(shape) for shape in shapes.values()} == {1}

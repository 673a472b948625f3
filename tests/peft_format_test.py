"""Adapters in PEFT's format come back as they went; what cannot be read is named.

`peft_family_test` compares with PEFT itself.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import tiny_model
from flax.traverse_util import flatten_dict

from lora_jax import lora
from lora_jax.errors import UserError
from lora_jax.hub import peft as ours

LAYERS = tiny_model.CONFIG.num_layers


def mixed(rank_stabilised=False):
  """An adapter whose layers and modules differ in rank and alpha, one layer without any."""
  params = tiny_model.params()
  ranks = {'layers/attn/o_proj': (4, 4, 4), 'layers/mlp/down_proj': (2, 0, 5)}
  ranks['layers/attn/q_proj'] = (0, 3, 0)
  alphas = {path: tuple(2.0 * i + len(path) for i in range(LAYERS)) for path in ranks}
  fresh = lora.init(jax.random.key(0), params, ranks, ranks)
  rng = np.random.default_rng(0)
  noise = lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32)
  for path, module in lora.modules(fresh).items():
    b = noise(module.leaves['b'])
    for layer, rank in enumerate(ranks[path]):
      b = b.at[layer, rank:].set(0)
    block, module = path.split('/')[1:]
    fresh['layers'][block][module]['b'] = b
  return ours.Adapter(fresh, ranks, alphas, rank_stabilised, base='someone/base')


def our_logits(adapter, tokens_BT):
  attached = lora.attach(tiny_model.params(), adapter.params, adapter.scales())
  return tiny_model.logits(tiny_model.MODEL, attached, tokens_BT)


def test_zero_beyond_a_layers_rank_stays_zero():
  params, adapter = tiny_model.params(), mixed()
  tokens_BT = tiny_model.tokens(2, 9)

  @jax.jit
  @jax.grad
  def gradient(adapters):
    attached = lora.attach(params, adapters, adapter.scales())
    return jnp.sum(jnp.sin(tiny_model.logits(tiny_model.MODEL, attached, tokens_BT)))

  for path, module in lora.modules(gradient(adapter.params)).items():
    leaves = module.leaves
    for layer, rank in enumerate(adapter.ranks[path]):
      assert not leaves['a'][layer, :, rank:].any()
      assert not leaves['b'][layer, rank:].any()
      assert rank == 0 or leaves['b'][layer, :rank].any()


def test_attach_equals_merge_with_a_scale_for_each_layer():
  adapter, tokens_BT = mixed(), tiny_model.tokens(2, 9)
  merged = lora.merge(tiny_model.params(), adapter.params, adapter.scales())
  np.testing.assert_allclose(
    our_logits(adapter, tokens_BT),
    tiny_model.logits(tiny_model.MODEL, merged, tokens_BT),
    atol=1e-4,
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_round_trip_is_bit_exact(tmp_path, dtype):
  adapter = mixed(rank_stabilised=True)
  ours.save(tmp_path / 'one', adapter)
  tensors = safetensors.flax.load_file(str(tmp_path / 'one' / ours.WEIGHTS))
  cast = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
  content = safetensors.flax.save(cast, metadata={'format': 'pt'})
  (tmp_path / 'one' / ours.WEIGHTS).write_bytes(content)
  back = ours.load(tmp_path / 'one', tiny_model.params())
  assert back.ranks == adapter.ranks
  assert back.rank_stabilised
  assert back.base == 'someone/base'
  for path, ranks in adapter.ranks.items():
    held = [alpha for alpha, rank in zip(back.alphas[path], ranks, strict=True) if rank]
    assert held == [a for a, rank in zip(adapter.alphas[path], ranks, strict=True) if rank]
  ours.save(tmp_path / 'two', back)
  for file in (ours.WEIGHTS, ours.CONFIG):
    assert (tmp_path / 'one' / file).read_bytes() == (tmp_path / 'two' / file).read_bytes()


def test_a_baked_adapter_has_one_rank_no_patterns_and_the_same_logits(tmp_path):
  adapter, tokens_BT = mixed(rank_stabilised=True), tiny_model.tokens(2, 9)
  ours.save(tmp_path, adapter, bake_scale=True)
  written = json.loads((tmp_path / ours.CONFIG).read_text())
  assert written['r'] == written['lora_alpha'] == 5
  assert (written['rank_pattern'], written['alpha_pattern']) == ({}, {})
  assert not written['use_rslora']
  back = ours.load(tmp_path, tiny_model.params())
  np.testing.assert_allclose(our_logits(back, tokens_BT), our_logits(adapter, tokens_BT), atol=1e-4)


# Mistakes.


@pytest.fixture
def saved(tmp_path):
  ours.save(tmp_path, mixed())
  return tmp_path


def edit(directory, **changes):
  file = directory / ours.CONFIG
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'peft_type': 'IA3'}, "peft_type is 'IA3'"),
    ({'lora_alpha': float('nan')}, 'the alpha of lora_alpha is nan'),
    ({'lora_alpha': True}, 'the alpha of lora_alpha is True'),
    ({'alpha_pattern': [1]}, 'not the configuration of an adapter'),
    ({'alpha_pattern': {'(': 3}}, 'is no pattern'),
    ({'rank_pattern': [1]}, r'rank_pattern is \[1\], not an object of patterns'),
    ({'rank_pattern': {'(': 3}}, 'is no pattern'),
    ({'alpha_pattern': {'o_proj': None}}, 'the alpha of o_proj is None'),
    ({'use_rslora': 'no'}, "use_rslora is 'no'"),
    ({'init_lora_weights': 'pissa_niter_4'}, 'pissa_niter_4.*, which changed the base'),
    ({'init_lora_weights': 'OLoRA'}, 'olora.*, which changed the base'),
    ({'layer_replication': [[0, 2]]}, 'layer_replication'),
    ({'use_dora': 'yes'}, "use_dora is 'yes'"),
    ({'bias': 'some'}, "bias is 'some'"),
    ({'modules_to_save': ['lm_head']}, "modules_to_save has 'lm_head', and only norms are read"),
    ({'modules_to_save': ['embed_tokens']}, "'embed_tokens', and only norms"),
    ({'target_modules': None}, 'target_modules names nothing'),
    ({'target_modules': [3]}, r'target_modules is \[3\], not a list of names'),
    ({'target_modules': '('}, r"target_modules '\(' is no pattern"),
    ({'exclude_modules': '('}, r"exclude_modules '\(' is no pattern"),
    ({'fan_in_fan_out': True}, 'fan_in_fan_out is True'),
    ({'trainable_token_indices': [3]}, 'trainable_token_indices'),
    ({'use_qalora': True}, 'use_qalora'),
    ({'kasa_config': {'rho': 1}}, 'kasa_config'),
    ({'a_key_of_tomorrow': 2}, 'a_key_of_tomorrow is 2, which is not supported'),
  ],
)
def test_a_configuration_that_is_not_read_is_named(saved, changes, says):
  edit(saved, **changes)
  with pytest.raises(UserError, match=f'{ours.CONFIG}: .*{says}'):
    ours.load(saved, tiny_model.params())


def test_files_that_are_missing_damaged_or_pickles_are_named(saved):
  whole = (saved / ours.WEIGHTS).read_bytes()
  for content in (b'', whole[:7], whole[:200], whole[:-5], b'PK\x03\x04' + whole):
    (saved / ours.WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match=r'adapter_model\.safetensors: damaged or cut short'):
      ours.load(saved, tiny_model.params())
  (saved / ours.WEIGHTS).unlink()
  (saved / 'adapter_model.bin').write_bytes(b'\x80\x04.')
  with pytest.raises(UserError, match=r'no .*safetensors; adapter_model\.bin is a pickle'):
    ours.load(saved, tiny_model.params())
  (saved / ours.CONFIG).write_text('{')
  with pytest.raises(UserError, match='not the configuration of an adapter'):
    ours.load(saved, tiny_model.params())
  with pytest.raises(UserError, match=r'no .*adapter_config\.json'):
    ours.load(saved / 'nowhere', tiny_model.params())


def test_an_adapter_for_another_base_is_named(saved):
  def narrower(path, leaf):
    return leaf[..., :-1] if 'down_proj' in str(path) else leaf

  other = jax.tree_util.tree_map_with_path(narrower, tiny_model.params())
  with pytest.raises(UserError, match=r'down_proj has A .* for another base'):
    ours.load(saved, other)
  fewer = jax.tree.map(lambda leaf: leaf[:2], tiny_model.params()['layers'])
  with pytest.raises(UserError, match=r'layer 2, and the base has 2'):
    ours.load(saved, tiny_model.params() | {'layers': fewer})


@pytest.mark.parametrize(
  'name',
  [
    'base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight',
    'base_model.model.model.embed_tokens.lora_embedding_A',
    'base_model.model.model.layers.0.self_attn.q_proj.weight',
    'base_model.model.model.layers.0.self_attn.q_proj.bias',
    'base_model.model.model.embed_tokens.weight',
    'base_model.model.lm_head.lora_A.weight',
    'base_model.model.model.layers.0.lora_A.weight',
    'base_model.model.model.norm.lora_A.weight',
    'q_proj',
  ],
)
def test_a_tensor_that_has_no_place_is_named(saved, name):
  tensors = safetensors.flax.load_file(str(saved / ours.WEIGHTS))
  tensors[name] = jnp.zeros((4, 4))
  safetensors.flax.save_file(tensors, str(saved / ours.WEIGHTS))
  with pytest.raises(UserError, match=f'tensor {name} is none of this base'):
    ours.load(saved, tiny_model.params())


@pytest.mark.parametrize('dtype', ['int8', 'float8_e4m3fn'])
def test_a_tensor_of_a_dtype_that_is_not_read_is_named(saved, dtype):
  tensors = safetensors.flax.load_file(str(saved / ours.WEIGHTS))
  cast = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
  safetensors.flax.save_file(cast, str(saved / ours.WEIGHTS))
  with pytest.raises(UserError, match='give one of F32, F16, BF16'):
    ours.load(saved, tiny_model.params())


def test_layers_of_different_dtypes_are_not_rounded(saved):
  tensors = safetensors.flax.load_file(str(saved / ours.WEIGHTS))
  first = next(name for name in tensors if 'layers.0.self_attn.o_proj.lora_A' in name)
  mixed_up = tensors | {first: tensors[first].astype(jnp.bfloat16)}
  safetensors.flax.save_file(mixed_up, str(saved / ours.WEIGHTS))
  a = ours.load(saved, tiny_model.params()).params['layers']['attn']['o_proj']['a']
  assert a.dtype == jnp.float32
  np.testing.assert_array_equal(a[1].T, tensors[first.replace('layers.0', 'layers.1')])


O_PROJ = 'base_model.model.model.layers.0.self_attn.o_proj'


@pytest.mark.parametrize(
  ('settings', 'extra', 'says'),
  [
    # Asked for and not there; there and not asked for.
    ({'target_modules': ['o_proj', 'k_proj']}, {}, r'has no tensors of model\..*makes it a target'),
    ({'target_modules': ['down_proj']}, {}, r'has tensors of model.*o_proj, and .* does not'),
    ({'target_modules': 'all-linear'}, {}, 'has no tensors of'),
    (
      {'exclude_modules': ['model.layers.0.self_attn.o_proj']},
      {},
      r'has tensors of model\.layers\.0',
    ),
    ({'r': 99, 'rank_pattern': {}}, {}, r'model\.layers\.\d\..* has rank \d, and .* gives it 99'),
    ({'use_dora': True}, {}, r'has no magnitudes of model\.layers\.0\..*, and .* sets use_dora'),
    ({}, {f'{O_PROJ}.lora_magnitude_vector': (24,)}, 'does not set use_dora'),
    ({}, {f'{O_PROJ}.lora_magnitude_vector': (23,)}, r'has \(23,\), and this base wants \(24,\)'),
    ({}, {'base_model.model.model.norm.weight': (24,)}, 'does not have it in modules_to_save'),
    (
      {'modules_to_save': ['input_layernorm']},
      {},
      r'no weight of model\.layers\.0\.input_layernorm',
    ),
    ({}, {f'{O_PROJ}.lora_A.default.weight': (4, 48)}, 'is there twice'),
  ],
)
def test_settings_and_tensors_that_disagree_are_named(saved, settings, extra, says):
  tensors = safetensors.flax.load_file(str(saved / ours.WEIGHTS))
  tensors |= {name: jnp.zeros(shape) for name, shape in extra.items()}
  safetensors.flax.save_file(tensors, str(saved / ours.WEIGHTS))
  edit(saved, **settings)
  with pytest.raises(UserError, match=says) as error:
    ours.load(saved, tiny_model.params())
  assert '\n' not in str(error.value)


def test_settings_that_compute_nothing_are_accepted(saved):
  before = ours.load(saved, tiny_model.params())
  edit(saved, peft_version='0.9', lora_dropout=0.3, revision='main', a_key_of_tomorrow=None)
  after = ours.load(saved, tiny_model.params())
  jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    ('base_model.model.', ''),
    ('base_model.model.model.', 'base_model.model.'),
    ('base_model.model.model.', 'base_model.model.model.language_model.'),
    ('base_model.model.', 'base_model.model._orig_mod.'),
    ('.weight', '.default.weight'),
  ],
)
def test_names_of_wrappers_are_read(saved, old, new):
  tensors = safetensors.flax.load_file(str(saved / ours.WEIGHTS))
  before = ours.load(saved, tiny_model.params())
  renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
  safetensors.flax.save_file(renamed, str(saved / ours.WEIGHTS))
  after = ours.load(saved, tiny_model.params())
  jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_another_base_of_the_same_shape_is_said(tmp_path, capsys):
  adapter = dataclasses.replace(mixed(), base_sha256='a' * 64, targets='o_proj,fc2')
  ours.save(tmp_path, adapter)
  back = ours.load(tmp_path, tiny_model.params(), base_sha256='a' * 64)
  assert (back.base_sha256, back.targets) == ('a' * 64, 'o_proj,fc2')
  ours.load(tmp_path, tiny_model.params())
  assert capsys.readouterr().err == ''
  ours.load(tmp_path, tiny_model.params(), base_sha256='b' * 64)
  said = capsys.readouterr().err
  assert len(said.splitlines()) == 1
  assert 'aaaaaaaaaaaa' in said
  assert 'bbbbbbbbbbbb' in said


def test_an_adapter_on_no_layer_is_not_written(tmp_path):
  adapter = mixed()
  nowhere = dict.fromkeys(adapter.ranks, (0,) * LAYERS)
  with pytest.raises(UserError, match='nothing to write'):
    ours.save(tmp_path / 'out', ours.Adapter(adapter.params, nowhere, adapter.alphas))
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_value_that_is_not_finite_is_named(saved, dtype):
  tensors = safetensors.flax.load_file(str(saved / ours.WEIGHTS))
  name = next(name for name in tensors if 'lora_B' in name)
  tensors[name] = tensors[name].at[0, 0].set(jnp.nan).astype(dtype)
  safetensors.flax.save_file(tensors, str(saved / ours.WEIGHTS))
  with pytest.raises(UserError, match=f'{name} holds values that are not finite'):
    ours.load(saved, tiny_model.params())


def test_half_a_pair_is_named(saved):
  tensors = safetensors.flax.load_file(str(saved / ours.WEIGHTS))
  del tensors[next(name for name in tensors if 'lora_B' in name)]
  safetensors.flax.save_file(tensors, str(saved / ours.WEIGHTS))
  with pytest.raises(UserError, match='has lora_A alone'):
    ours.load(saved, tiny_model.params())


def test_one_rank_and_alpha_need_no_patterns(tmp_path):
  trained = tiny_model.trained_adapters('o_proj,fc2')
  ours.save(tmp_path, ours.uniform(trained, tiny_model.RANK, 8.0))
  written = json.loads((tmp_path / ours.CONFIG).read_text())
  assert written['target_modules'] == ['down_proj', 'o_proj']
  assert (written['r'], written['lora_alpha']) == (tiny_model.RANK, 8.0)
  assert (written['rank_pattern'], written['alpha_pattern']) == ({}, {})
  back = ours.load(tmp_path, tiny_model.params())
  for path, leaf in flatten_dict(back.params).items():
    np.testing.assert_array_equal(leaf, flatten_dict(trained)[path])

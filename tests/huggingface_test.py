"""hub/huggingface.py without its reference: round trips, memory, and what is refused."""

import dataclasses
import json
import pickle
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_model
from flax.traverse_util import flatten_dict

from lora_jax.config import RopeScaling
from lora_jax.errors import UserError
from lora_jax.hub import huggingface, safetensors_file

CONFIG = dataclasses.replace(tiny_model.CONFIG, tie_embeddings=False)
CONFIG_FILE, WEIGHTS, INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'
Q = 'model.layers.1.self_attn.q_proj.weight'


def write(directory, config=CONFIG, **options):
  huggingface.save(directory, config, tiny_model.params(config), **options)
  return directory


def load(directory, dtype=None):
  return huggingface.load_params(directory, huggingface.model_config(directory), dtype)


def peak_memory(call):
  """Bytes that it takes, the least of three: other threads only add; and what it returns last."""
  peaks = []
  for _ in range(3):
    tracemalloc.start()
    returned = call()
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  return min(peaks), returned


def change_config(directory, **changes):
  file = directory / CONFIG_FILE
  settings = {**json.loads(file.read_text()), **changes}
  file.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))


def change_weights(directory, change):
  tensors = safetensors.numpy.load_file(directory / WEIGHTS)
  change(tensors)
  safetensors.numpy.save_file(tensors, directory / WEIGHTS)


def assert_same(ours, theirs):
  ours, theirs = flatten_dict(ours, sep='/'), flatten_dict(theirs, sep='/')
  assert ours.keys() == theirs.keys()
  for path, leaf in ours.items():
    assert leaf.dtype == theirs[path].dtype
    assert leaf.tobytes() == np.asarray(theirs[path]).tobytes(), path


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'tie_embeddings': True},
    {'qkv_bias': True, 'output_bias': True, 'mlp_bias': True},
    {'rope_scaling': RopeScaling('linear', 2.0)},
    {'rope_scaling': RopeScaling('llama3', 8.0, 32, 1.0, 4.0)},
    {'rope_scaling': RopeScaling('yarn', 4.0, 32, 1.0, 32.0, 1.2)},
  ],
)
@pytest.mark.parametrize('shard', [10_000, huggingface.SHARD])
def test_a_round_trip_changes_nothing(tmp_path, changes, shard):
  config = dataclasses.replace(CONFIG, **changes)
  write(tmp_path, config, shard=shard)
  assert (tmp_path / INDEX).exists() is (shard == 10_000)
  assert huggingface.model_config(tmp_path) == config
  assert_same(load(tmp_path), tiny_model.params(config))
  # What safetensors itself reads is the same.
  held = {}
  for file in tmp_path.glob('*.safetensors'):
    assert shard > 10_000 or file.stat().st_size < 20_000
    held |= safetensors.numpy.load_file(file)
  kernel = tiny_model.params(config)['layers']['attn']['q_proj']['kernel'][1]
  np.testing.assert_array_equal(held[Q], kernel.T)
  assert ('lm_head.weight' in held) is not config.tie_embeddings


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_dtypes(tmp_path, dtype):
  write(tmp_path, dtype=dtype)
  stored = load(tmp_path)
  rounded = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny_model.params(CONFIG))
  assert_same(stored, rounded)
  cast = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), rounded)
  assert_same(load(tmp_path, 'float32'), cast)
  assert_same(load(tmp_path, jnp.bfloat16), jax.tree.map(lambda x: x.astype(jnp.bfloat16), cast))
  kinds = {'bfloat16': 'BF16', 'float16': 'F16', 'float32': 'F32'}
  assert huggingface.weights_kind(tmp_path) == kinds[dtype]
  with pytest.raises(UserError, match='int8 cannot be written'):
    write(tmp_path, dtype='int8')


def test_layers_of_different_dtypes_are_float32(tmp_path):
  write(tmp_path)
  change_weights(tmp_path, lambda t: t.update({Q: t[Q].astype(np.float16)}))
  loaded = load(tmp_path)['layers']['attn']
  assert loaded['q_proj']['kernel'].dtype == np.float32
  expected = tiny_model.params(CONFIG)['layers']['attn']['q_proj']['kernel']
  np.testing.assert_array_equal(loaded['q_proj']['kernel'][1], expected[1].astype(np.float16))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_memory_is_one_copy_of_the_model_and_one_tensor(tmp_path, dtype):
  config = dataclasses.replace(CONFIG, num_layers=12, model_dim=256, mlp_dim=512, vocab_size=1000)
  shapes = flatten_dict(huggingface.abstract_params(config), sep='/')
  leaves = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
  huggingface.save(tmp_path, config, huggingface.unflatten_dict(leaves, sep='/'), shard=2_000_000)
  numbers = sum(leaf.size for leaf in leaves.values())
  largest = 4 * max(leaf.size // (12 if leaf.ndim == 3 else 1) for leaf in leaves.values())
  load(tmp_path, dtype)
  peak, kept = peak_memory(lambda: load(tmp_path, dtype))
  model = numbers * np.dtype(jnp.dtype(dtype)).itemsize
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) == model
  assert model < peak < model + largest + 500_000
  # A second copy would not have fitted.
  assert largest + 500_000 < 0.5 * model


def test_writing_takes_the_memory_of_one_tensor(tmp_path):
  config = dataclasses.replace(CONFIG, num_layers=12, model_dim=256, mlp_dim=512, vocab_size=1000)
  shapes = huggingface.abstract_params(config)
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  peak, _ = peak_memory(lambda: huggingface.save(tmp_path, config, params, dtype='bfloat16'))
  assert peak < 0.25 * (tmp_path / WEIGHTS).stat().st_size


def test_the_fingerprint_is_of_configuration_and_weights(tmp_path):
  write(tmp_path / 'one')
  shutil.copytree(tmp_path / 'one', tmp_path / 'two')
  (tmp_path / 'two' / 'tokenizer.json').write_text('{}')
  first = huggingface.fingerprint(tmp_path / 'one')
  assert len(first) == 64
  assert huggingface.fingerprint(tmp_path / 'two') == first
  change_weights(tmp_path / 'two', lambda t: t.update({Q: t[Q] + 1}))
  assert huggingface.fingerprint(tmp_path / 'two') != first
  change_config(tmp_path / 'one', rope_theta=501.0)
  assert huggingface.fingerprint(tmp_path / 'one') != first


def test_a_head_that_is_stored_although_tied(tmp_path):
  config = dataclasses.replace(CONFIG, tie_embeddings=True)
  write(tmp_path, config)
  table = 'model.embed_tokens.weight'
  change_weights(tmp_path, lambda t: t.update({'lm_head.weight': t[table].copy()}))
  assert_same(load(tmp_path), tiny_model.params(config))
  change_weights(tmp_path, lambda t: t.update({'lm_head.weight': t[table] + 1}))
  with pytest.raises(UserError, match=r'lm_head\.weight is not .*tie_word_embeddings to false'):
    load(tmp_path)


def test_frequencies_in_old_checkpoints_are_passed_over(tmp_path):
  write(tmp_path)
  name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  change_weights(tmp_path, lambda t: t.update({name: np.ones(4, np.float32)}))
  assert_same(load(tmp_path), tiny_model.params(CONFIG))


# Saving.


def test_what_stands_beside_a_base_goes_with_it(tmp_path):
  base = write(tmp_path / 'base')
  (base / 'tokenizer.json').write_text('{"a": 1}')
  change_config(base, torch_dtype='float32', dtype=..., eos_token_id=7)
  out = write(tmp_path / 'out', like=base, dtype='bfloat16')
  assert (out / 'tokenizer.json').read_text() == '{"a": 1}'
  settings = json.loads((out / CONFIG_FILE).read_text())
  assert settings['torch_dtype'] == 'bfloat16'
  assert settings['eos_token_id'] == 7
  assert 'dtype' not in settings


def test_an_older_checkpoint_is_replaced_whole(tmp_path):
  write(tmp_path, shard=10_000)
  write(tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS]
  write(tmp_path, shard=30_000)
  assert not (tmp_path / WEIGHTS).exists()
  assert_same(load(tmp_path), tiny_model.params(CONFIG))


def test_a_directory_that_was_not_finished_is_none(tmp_path, monkeypatch):
  write(tmp_path)
  whole = safetensors_file.write

  def full(path, tensors, array):
    if '00003' in path.name:
      raise UserError('no room')
    whole(path, tensors, array)

  monkeypatch.setattr(safetensors_file, 'write', full)
  with pytest.raises(UserError, match='no room'):
    write(tmp_path, shard=10_000)
  with pytest.raises(UserError, match=rf'no .*{CONFIG_FILE}'):
    huggingface.model_config(tmp_path)


def test_what_cannot_be_saved_is_refused(tmp_path):
  base = write(tmp_path / 'base')
  with pytest.raises(UserError, match='where the base is'):
    write(base, like=base)
  with pytest.raises(UserError, match='of another model'):
    write(tmp_path / 'out', dataclasses.replace(CONFIG, norm_eps=1e-2), like=base)
  odd = dataclasses.replace(CONFIG, windows=(4, 0, 4), activation='gelu_tanh')
  with pytest.raises(UserError, match='this model has windows, activation;'):
    write(tmp_path / 'out', odd)
  with pytest.raises(ValueError, match='not those of the configuration'):
    huggingface.save(tmp_path / 'out', CONFIG, {'norm': {'scale': np.ones(24)}})
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write to .*file'):
    write(tmp_path / 'file')
  assert not (tmp_path / 'out').exists()
  assert_same(load(base), tiny_model.params(CONFIG))


# Bad weights: one line that names file and tensor.


def one_line(match, directory):
  with pytest.raises(UserError, match=match) as caught:
    load(directory)
  assert '\n' not in str(caught.value)
  assert str(directory) in str(caught.value)


def test_missing_extra_and_misshaped_tensors(tmp_path):
  write(tmp_path)
  kept = (tmp_path / WEIGHTS).read_bytes()

  def after(change, match):
    (tmp_path / WEIGHTS).write_bytes(kept)
    change_weights(tmp_path, change)
    one_line(match, tmp_path)

  after(lambda t: t.pop(Q), rf'tensor {Q} is missing')
  after(lambda t: t.pop('lm_head.weight'), r'tensor lm_head\.weight is missing')
  extra = 'model.layers.3.mlp.up_proj.weight'
  after(lambda t: t.update({extra: t[Q]}), rf'{WEIGHTS}: tensor {extra} has no place')
  bias = 'model.layers.0.self_attn.q_proj.bias'
  after(lambda t: t.update({bias: np.zeros(48)}), rf'tensor {bias} has no place')
  turned = lambda t: t.update({Q: np.ascontiguousarray(t[Q].T)})
  after(turned, rf'{WEIGHTS}: tensor {Q} is \(24, 48\), but config\.json promises \(48, 24\)')
  after(lambda t: t.update({Q: t[Q].astype(np.int8)}), rf'tensor {Q} is I8; give weights in F32')


@pytest.mark.parametrize('keep', [0, 4, 8, 100, -1])
def test_files_that_were_cut_short(tmp_path, keep):
  write(tmp_path)
  file = tmp_path / WEIGHTS
  file.write_bytes(file.read_bytes()[:keep])
  last = r'model\.layers\.2\.\S+'
  one_line(rf'{WEIGHTS}: cut short( within or before tensor {last};|, or not)', tmp_path)


def test_headers_that_make_no_sense(tmp_path):
  write(tmp_path)
  for header in (
    b'{"a": 1}',
    b'[]',
    b'{"a"',
    b'\xff\xfe',
    json.dumps({'a': {'dtype': 'F32', 'shape': [2.5], 'data_offsets': [0, 8]}}).encode(),
    json.dumps({'a': {'dtype': 'F32', 'shape': [-1], 'data_offsets': [0, 8]}}).encode(),
    json.dumps({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]}}).encode(),
    json.dumps({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [-8, 0]}}).encode(),
  ):
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, 'little') + header + bytes(8))
    one_line('not the header|not of that size', tmp_path)
  (tmp_path / WEIGHTS).write_bytes(b'<html>' + bytes(100))
  one_line('not a safetensors file', tmp_path)


def test_shards_and_their_index(tmp_path):
  write(tmp_path, shard=10_000)
  index = tmp_path / INDEX
  kept = index.read_text()
  shard = json.loads(kept)['weight_map'][Q]
  (tmp_path / shard).rename(tmp_path / 'away')
  one_line(rf'{INDEX}: names {shard}, which is not there', tmp_path)
  (tmp_path / 'away').rename(tmp_path / shard)
  load(tmp_path)

  def after(change, match):
    content = json.loads(kept)
    change(content)
    index.write_text(json.dumps(content))
    one_line(match, tmp_path)

  other = next(name for name in json.loads(kept)['weight_map'].values() if name != shard)
  after(lambda c: c['weight_map'].update({Q: other}), rf'{other}: has no tensor {Q}, which')
  after(lambda c: c['weight_map'].update({Q: '../' + shard}), 'not the index of a checkpoint')
  after(lambda c: c.pop('weight_map'), 'not the index of a checkpoint')
  after(lambda c: c['weight_map'].pop(Q), f'tensor {Q} is missing')
  index.write_text('{')
  one_line('not the index of a checkpoint', tmp_path)


class Trap:
  """Unpickling it would be noticed."""

  def __reduce__(self):
    return pytest.fail, ('a pickle was loaded',)


def test_a_pickle_is_never_loaded(tmp_path):
  write(tmp_path)
  (tmp_path / WEIGHTS).unlink()
  one_line(rf'no .*{WEIGHTS} and no {INDEX}; copy', tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(pickle.dumps(Trap()))
  one_line(r'pytorch_model\.bin is a pickle, which is never read', tmp_path)
  (tmp_path / INDEX).write_text(json.dumps({'weight_map': {Q: 'pytorch_model.bin'}}))
  one_line(r'names pytorch_model\.bin, which is no safetensors file', tmp_path)
  (tmp_path / INDEX).unlink()
  shutil.copyfile(tmp_path / 'pytorch_model.bin', tmp_path / WEIGHTS)
  one_line('not a safetensors file', tmp_path)


# Bad configurations.


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'model_type': 'gpt2'}, "model_type 'gpt2' is not supported, LlamaForCausalLM, Mistral"),
    ({'model_type': ...}, 'model_type None is not supported'),
    ({'model_type': 'mixtral'}, "model_type 'mixtral' is not supported"),
    ({'model_type': 'gemma3'}, 'only the language model, saved alone, is read'),
    ({'architectures': ['LlamaForSequenceClassification']}, 'LlamaForSequenceClassification'),
    ({'hidden_size': ...}, 'has no hidden_size'),
    ({'hidden_size': 'many'}, "hidden_size is 'many'; give a whole number from 1"),
    ({'num_hidden_layers': 0}, 'num_hidden_layers is 0'),
    ({'num_key_value_heads': 4}, '6 query heads over 4 key and value heads'),
    ({'head_dim': 7}, 'heads of width 7'),
    ({'hidden_act': 'relu2'}, "activation 'relu2', which is not supported; give silu"),
    ({'num_local_experts': 8}, 'mixture of experts'),
    ({'partial_rotary_factor': 0.5}, 'a part of each head'),
    ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'a part of each head'),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'quantised weights'),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "of the kind 'dynamic'"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'has no low_freq_factor'),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': -1}}, 'factor is -1; give a number'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0, 'truncate': False}}, 'truncate off'),
    ({'rope_scaling': [1]}, 'in place of an object'),
    ({'rope_theta': 0}, 'rope_theta is 0'),
    ({'tie_word_embeddings': 'no'}, "tie_word_embeddings is 'no'; give true or false"),
    ({'rms_norm_eps': float('nan')}, 'rms_norm_eps is nan'),
    ({'model_type': 'mistral', 'architectures': ..., 'layer_types': ['full_attention'] * 3,
      'sliding_window': 4}, 'layers of a Mistral without its window'),
    ({'model_type': 'gemma2', 'architectures': ..., 'layer_types': ['chunked_attention'] * 3},
     'layer_types'),
    ({'model_type': 'gemma3_text', 'architectures': ..., 'rope_parameters': {'rope_theta': 1e6}},
     'not by kind of layer'),
    ({'model_type': 'smollm3', 'architectures': ..., 'no_rope_layers': [1]}, 'no_rope_layers'),
  ],
)  # fmt: skip
def test_configurations_that_cannot_be_computed(tmp_path, changes, match):
  write(tmp_path)
  change_config(tmp_path, **changes)
  with pytest.raises(UserError, match=match) as caught:
    huggingface.model_config(tmp_path)
  assert str(caught.value).startswith(str(tmp_path / CONFIG_FILE))
  assert '\n' not in str(caught.value)


def test_the_language_model_of_a_gemma_with_eyes(tmp_path):
  text = {
    'model_type': 'gemma3_text',
    'vocab_size': 56,
    'hidden_size': 24,
    'intermediate_size': 40,
    'num_hidden_layers': 7,
    'num_attention_heads': 4,
  }
  (tmp_path / CONFIG_FILE).write_text(json.dumps(text))
  alone = huggingface.model_config(tmp_path)
  assert alone.windows == (4096,) * 5 + (0, 4096)
  assert alone.rope_thetas == (1e4,) * 5 + (1e6, 1e4)
  both = {'model_type': 'gemma3', 'text_config': text, 'vision_config': {}}
  (tmp_path / CONFIG_FILE).write_text(json.dumps({**both, 'architectures': ['Gemma3ForCausalLM']}))
  assert huggingface.model_config(tmp_path) == alone


def test_files_that_are_no_configuration(tmp_path):
  for content in ('', '[1]', '{"model_type"'):
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(UserError, match=r'config\.json: not'):
      huggingface.model_config(tmp_path)
  with pytest.raises(UserError, match=r'no .*config\.json; give the directory'):
    huggingface.model_config(tmp_path / 'nowhere')

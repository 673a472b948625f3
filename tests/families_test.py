"""Random models of each family, saved by transformers and loaded here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from lora_jax.generate import generate
from lora_jax.hub import huggingface
from lora_jax.transformer import Transformer

torch = pytest.importorskip('torch', reason='the reference installs on Python 3.11')
transformers = pytest.importorskip('transformers')

VOCAB = 97
TIME = 48

# Two shapes with odd numbers of heads, which share keys.
SMALL = {
  'vocab_size': VOCAB,
  'hidden_size': 30,
  'intermediate_size': 44,
  'num_hidden_layers': 3,
  'num_attention_heads': 3,
  'num_key_value_heads': 1,
  'max_position_embeddings': 64,
}
LARGE = {
  'vocab_size': VOCAB,
  'hidden_size': 54,
  'intermediate_size': 52,
  'num_hidden_layers': 7,
  'num_attention_heads': 9,
  'num_key_value_heads': 3,
  'max_position_embeddings': 64,
}
HEAD = {'head_dim': 12}
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 10_000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 10_000.0,
  'factor': 4.0,
  'original_max_position_embeddings': 16,
}
LINEAR = {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 3.0}
SLIDES = {'use_sliding_window': True, 'sliding_window': 7}
GEMMA3_ROPE = {
  'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
  'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
}
TIED, UNTIED = {'tie_word_embeddings': True}, {'tie_word_embeddings': False}

# Name -> configuration class and settings. Sequences are longer than windows and than
# the contexts that rotary positions are stretched from.
FAMILIES = {
  'llama': ('LlamaConfig', SMALL | UNTIED),
  'llama-large-tied': ('LlamaConfig', LARGE | TIED | {'rope_theta': 5e5}),
  'llama-biases': ('LlamaConfig', SMALL | TIED | {'attention_bias': True, 'mlp_bias': True}),
  'llama-llama3': ('LlamaConfig', LARGE | TIED | HEAD | {'rope_parameters': LLAMA3}),
  'llama-linear': ('LlamaConfig', SMALL | UNTIED | {'rope_parameters': LINEAR}),
  'llama-yarn': ('LlamaConfig', LARGE | UNTIED | {'rope_parameters': YARN}),
  'smollm3': ('SmolLM3Config', LARGE | TIED | {'pad_token_id': None}),
  'smollm3-small': (
    'SmolLM3Config',
    SMALL | UNTIED | SLIDES | {'no_rope_layers': [1, 0, 1], 'pad_token_id': None},
  ),
  'smollm3-yarn': (
    'SmolLM3Config',
    SMALL | TIED | {'no_rope_layers': [0, 1, 1], 'rope_parameters': YARN, 'pad_token_id': None},
  ),
  'mistral': ('MistralConfig', SMALL | UNTIED | HEAD | {'sliding_window': 7}),
  'mistral-large': ('MistralConfig', LARGE | TIED | {'sliding_window': None}),
  'qwen2': ('Qwen2Config', SMALL | TIED),
  'qwen2-large': ('Qwen2Config', LARGE | UNTIED | SLIDES | {'max_window_layers': 3}),
  'qwen2-yarn': ('Qwen2Config', SMALL | UNTIED | {'rope_parameters': YARN}),
  'qwen3': ('Qwen3Config', SMALL | TIED | HEAD),
  'qwen3-large': (
    'Qwen3Config',
    LARGE | UNTIED | HEAD | SLIDES | {'max_window_layers': 2, 'attention_bias': True},
  ),
  'gemma2': ('Gemma2Config', SMALL | HEAD | {'sliding_window': 7, 'query_pre_attn_scalar': 20}),
  'gemma2-large': (
    'Gemma2Config',
    LARGE
    | UNTIED
    | HEAD
    | {'sliding_window': 9, 'attn_logit_softcapping': 0.5, 'final_logit_softcapping': 2.0},
  ),
  'gemma3': ('Gemma3TextConfig', SMALL | HEAD | {'sliding_window': 7, 'query_pre_attn_scalar': 20}),
  'gemma3-large': (
    'Gemma3TextConfig',
    LARGE
    | HEAD
    | {'sliding_window': 9, 'rope_parameters': GEMMA3_ROPE, 'final_logit_softcapping': 2.0},
  ),
}


def saved(name, directory, **more):
  """Saves a random model with norms and biases that matter; the peer, in evaluation mode."""
  kind, settings = FAMILIES[name]
  torch.manual_seed(0)
  config = getattr(transformers, kind)(**settings, **more)
  peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager')
  with torch.no_grad():
    for weight in peer.parameters():
      # Large enough for attention to be sharp and for caps to bend.
      weight.add_(torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.15))
  peer.save_pretrained(directory)
  return peer.eval()


def loaded(directory):
  config = huggingface.model_config(directory)
  return Transformer(config), jax.tree.map(jnp.asarray, huggingface.load_params(directory, config))


def tokens(*shape):
  return np.random.default_rng(0).integers(0, VOCAB, shape)


def peer_logits(peer, tokens_BT):
  with torch.no_grad():
    return peer(torch.from_numpy(np.asarray(tokens_BT, np.int64))).logits.numpy()


# What a field of ours does to these models: each must be seen to matter.
MATTERS = {
  'llama-llama3': {'rope_scaling': None},
  'llama-yarn': {'rope_scaling': None},
  'smollm3': {'rope_thetas': ()},
  'mistral': {'windows': ()},
  'qwen2-large': {'windows': ()},
  'gemma2': {'query_scale': None},
  'gemma2-large': {'attention_cap': 0.0},
  'gemma3-large': {'rope_thetas': (), 'windows': (9,) * 7},
}


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(tmp_path, name):
  peer = saved(name, tmp_path)
  model, params = loaded(tmp_path)
  tokens_BT = tokens(2, TIME)
  expected_BTV = peer_logits(peer, tokens_BT)
  ours_BTV = tiny_model.logits(model, params, tokens_BT)
  # The logits say something, or little would have been compared.
  assert expected_BTV.std() > 0.3
  np.testing.assert_allclose(ours_BTV, expected_BTV, atol=1e-4)
  if name in MATTERS:
    without = Transformer(dataclasses.replace(model.config, **MATTERS[name]))
    assert np.abs(tiny_model.logits(without, params, tokens_BT) - expected_BTV).max() > 1e-2

  # A ragged batch with a cache says what the whole forward pass says after each token.
  new, lengths = 10, [TIME - 10, 13]
  prompts_BT = np.where(np.arange(lengths[0]) < np.asarray(lengths)[:, None], tokens_BT[:, :-10], 0)
  greedy_BT = np.asarray(generate(model, params, prompts_BT, jnp.asarray(lengths), new, -1))
  for row, length in enumerate(lengths):
    ids = torch.from_numpy(tokens_BT[row : row + 1, :length])
    with torch.no_grad():
      theirs = peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
      )
    assert greedy_BT[row].tolist() == theirs[0, length:].tolist()


@pytest.mark.parametrize('name', ['gemma2-large', 'qwen2-large', 'gemma3-large'])
def test_gradients_equal_transformers(tmp_path, name):
  peer = saved(name, tmp_path)
  model, params = loaded(tmp_path)
  tokens_BT = tokens(2, 20)

  @jax.jit
  @jax.grad
  def gradient(kernels):
    layers = {**params['layers'], 'attn': {**params['layers']['attn'], **kernels}}
    return jnp.sin(tiny_model.logits(model, {**params, 'layers': layers}, tokens_BT)).mean()

  names = ('q_proj', 'k_proj', 'v_proj')
  ours = gradient({name: params['layers']['attn'][name] for name in names})
  torch.sin(peer(torch.from_numpy(tokens_BT)).logits).mean().backward()
  for layer, block in enumerate(peer.model.layers):
    for name in names:
      expected = getattr(block.self_attn, name).weight.grad.numpy().T
      scale = np.abs(expected).max()
      np.testing.assert_allclose(ours[name]['kernel'][layer], expected, atol=1e-4 * scale + 1e-9)


def test_configurations_of_older_releases_read_the_same(tmp_path):
  older = {
    'llama-llama3': lambda s: {
      'rope_theta': s.pop('rope_parameters')['rope_theta'],
      'rope_scaling': {k: v for k, v in LLAMA3.items() if k != 'rope_theta'},
    },
    'qwen2-yarn': lambda s: {
      'rope_theta': s.pop('rope_parameters')['rope_theta'],
      'rope_scaling': {
        'type': 'yarn',
        'factor': YARN['factor'],
        'original_max_position_embeddings': YARN['original_max_position_embeddings'],
      },
    },
    'qwen2-large': lambda s: {'layer_types': s.pop('layer_types') and None},
    'gemma2': lambda s: {'rope_theta': s.pop('rope_parameters')['rope_theta']},
    'gemma3-large': lambda s: {
      'rope_theta': s.pop('rope_parameters')['full_attention']['rope_theta'],
      'rope_local_base_freq': 1e4,
      'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
      'sliding_window_pattern': s.pop('layer_types') and 6,
    },
    'smollm3': lambda s: {
      'rope_theta': s.pop('rope_parameters')['rope_theta'],
      'layer_types': s.pop('layer_types') and None,
    },
  }
  for name, change in older.items():
    kind, settings = FAMILIES[name]
    getattr(transformers, kind)(**settings).save_pretrained(tmp_path)
    expected = huggingface.model_config(tmp_path)
    file = tmp_path / 'config.json'
    content = json.loads(file.read_text())
    content |= change(content)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    assert huggingface.model_config(tmp_path) == expected
    # And transformers agrees that it is the same.
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    again.architectures = None
    again.save_pretrained(tmp_path)
    assert huggingface.model_config(tmp_path) == expected


@pytest.mark.parametrize('kind', sorted({kind for kind, _ in FAMILIES.values()}))
def test_what_a_configuration_leaves_out_is_what_transformers_takes(tmp_path, kind):
  sizes = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers')
  bare = {key: SMALL[key] for key in sizes} | {'num_attention_heads': 32, 'hidden_size': 64}
  config = getattr(transformers, kind)(**bare, pad_token_id=None)
  config.save_pretrained(tmp_path)
  expected = huggingface.model_config(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps({**bare, 'model_type': config.model_type}))
  assert huggingface.model_config(tmp_path) == expected


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('name', ['llama-biases', 'gemma3', 'qwen3-large'])
def test_transformers_loads_what_save_wrote(tmp_path, name, dtype):
  saved(name, tmp_path / 'base', dtype=dtype)
  config = huggingface.model_config(tmp_path / 'base')
  params = huggingface.load_params(tmp_path / 'base', config, 'float32')
  huggingface.save(tmp_path / 'out', config, params, tmp_path / 'base', dtype, shard=20_000)
  assert len([*(tmp_path / 'out').glob('model-*.safetensors')]) > 1
  load = transformers.AutoModelForCausalLM.from_pretrained
  assert str(load(tmp_path / 'out', dtype='auto').dtype) == f'torch.{dtype}'
  again = load(tmp_path / 'out', dtype='float32', attn_implementation='eager')
  rounded = jax.tree.map(lambda x: jnp.asarray(x, dtype).astype(jnp.float32), params)
  tokens_BT = tokens(2, 20)
  ours_BTV = tiny_model.logits(Transformer(config), rounded, tokens_BT)
  np.testing.assert_allclose(ours_BTV, peer_logits(again.eval(), tokens_BT), atol=1e-4)

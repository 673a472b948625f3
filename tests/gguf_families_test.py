"""Random models of transformers, converted to GGUF as llama.cpp does, give the same logits."""

import dataclasses
import math

import gguf as gguf_package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gguf
import tiny_model

from lora_jax.config import RopeScaling
from lora_jax.errors import UserError
from lora_jax.hub import gguf, gguf_config, gguf_weights
from lora_jax.transformer import Transformer, abstract_params

VOCAB, TIME = 61, 40
SHAPE = {
  'vocab_size': VOCAB,
  'hidden_size': 24,
  'intermediate_size': 40,
  'num_hidden_layers': 7,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'rms_norm_eps': 1e-5,
}
HEAD = {'head_dim': 16}
GEMMA = HEAD | {'query_pre_attn_scalar': 16, 'sliding_window': 9, 'tie_word_embeddings': True}
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 500.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 64,
}
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 500.0,
  'factor': 4.0,
  'original_max_position_embeddings': 16,
}
WINDOW = {'llama__attention__sliding_window': 9}
STRETCHED = {
  'llama__rope__scaling__type': 'yarn',
  'llama__rope__scaling__factor': 4.0,
  'llama__rope__scaling__original_context_length': 16,
}
# What a Gemma 3 of 4B and more has: only the layers without a window are stretched.
GEMMA3_ROPE = {
  'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
  'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
}
LINEAR = {'llama__rope__scaling__type': 'linear', 'llama__rope__scaling__factor': 8.0}
CAPS = {'llama__attn_logit_softcapping': 3.0, 'llama__final_logit_softcapping': 2.0}

# Name -> architecture, configuration class, its settings, metadata beside the common.
MODELS = {
  'llama': ('llama', 'LlamaConfig', {}, {}),
  'llama-tied-head': ('llama', 'LlamaConfig', HEAD | {'tie_word_embeddings': True}, {}),
  'llama-biases': ('llama', 'LlamaConfig', {'attention_bias': True, 'mlp_bias': True}, {}),
  'llama-llama3': (
    'llama',
    'LlamaConfig',
    {'rope_parameters': LLAMA3},
    {'llama__rope__scaling__original_context_length': 64},
  ),
  'mistral': ('llama', 'MistralConfig', HEAD | {'sliding_window': 9}, WINDOW),
  'qwen2': ('qwen2', 'Qwen2Config', {}, {}),
  'qwen3': ('qwen3', 'Qwen3Config', HEAD, {}),
  'qwen3-yarn': ('qwen3', 'Qwen3Config', HEAD | {'rope_parameters': YARN}, STRETCHED),
  'smollm3': ('smollm3', 'SmolLM3Config', {'pad_token_id': None}, {}),
  'gemma2': (
    'gemma2',
    'Gemma2Config',
    GEMMA | {'attn_logit_softcapping': 3.0, 'final_logit_softcapping': 2.0},
    WINDOW | CAPS,
  ),
  'gemma3': ('gemma3', 'Gemma3TextConfig', GEMMA, WINDOW),
  'gemma3-linear': (
    'gemma3',
    'Gemma3TextConfig',
    GEMMA | {'rope_parameters': GEMMA3_ROPE},
    WINDOW | LINEAR,
  ),
}


def random_model(transformers, torch, name, settings):
  """A model in which no weight is where initialisation leaves it."""
  config = getattr(transformers, name)(**SHAPE | settings, attn_implementation='eager')
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for weight in model.parameters():
      noise = torch.randn(weight.shape, generator=generator)
      weight.copy_(weight + (0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5) * noise)
  return model


def converted(model, architecture):
  """llama.cpp's names and conventions."""
  config = model.config
  arch = {text: arch for arch, text in gguf_package.MODEL_ARCH_NAMES.items()}[architecture]
  names = gguf_package.get_tensor_name_map(arch, config.num_hidden_layers)
  tied, out = config.tie_word_embeddings, {}
  for name, weight in model.state_dict().items():
    if tied and name == 'lm_head.weight':
      continue
    weight = weight.numpy()
    if architecture.startswith('gemma') and name.endswith('norm.weight'):
      weight = weight + 1
    if architecture in ('llama', 'smollm3') and ('q_proj' in name or 'k_proj' in name):
      heads = config.num_attention_heads if 'q_proj' in name else config.num_key_value_heads
      weight = tiny_gguf.interleave(weight, heads)
    out[names.get_name(name, try_suffixes=('.weight', '.bias'))] = weight
  rope = config.rope_parameters
  if rope.get('rope_type') == 'llama3':
    out['rope_freqs.weight'] = rope_factors(rope, config.hidden_size // config.num_attention_heads)
  return out


def rope_factors(rope, head_dim):
  """One by one, as Llama 3.1's reference code has it."""
  found = []
  length, factor = rope['original_max_position_embeddings'], rope['factor']
  low, high = rope['low_freq_factor'], rope['high_freq_factor']
  for i in range(head_dim // 2):
    wavelength = 2 * math.pi * rope['rope_theta'] ** (2 * i / head_dim)
    if wavelength < length / high:
      found.append(1.0)
    elif wavelength > length / low:
      found.append(factor)
    else:
      smooth = (length / wavelength - low) / (high - low)
      found.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(found, np.float32)


@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('name', MODELS)
def test_logits_as_in_transformers(tmp_path, name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  architecture, config_name, settings, metadata = MODELS[name]
  theirs = random_model(transformers, torch, config_name, settings)
  hf, rope = theirs.config, theirs.config.rope_parameters
  path = tiny_gguf.write(
    tmp_path / 'a.gguf',
    converted(theirs, architecture),
    architecture=architecture,
    llama__block_count=hf.num_hidden_layers,
    llama__embedding_length=hf.hidden_size,
    llama__feed_forward_length=hf.intermediate_size,
    llama__attention__head_count=hf.num_attention_heads,
    llama__attention__head_count_kv=hf.num_key_value_heads,
    llama__attention__key_length=settings.get('head_dim'),
    llama__attention__layer_norm_rms_epsilon=hf.rms_norm_eps,
    llama__rope__freq_base=float(rope.get('full_attention', rope)['rope_theta']),
    **metadata,
  )
  file = gguf.open_file(path)
  config = gguf_config.model_config(file)
  params = gguf_weights.load_params(file, config)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params(config))

  tokens = np.random.default_rng(1).integers(0, VOCAB, (2, TIME))
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens)).logits.numpy()
  params = jax.tree.map(jnp.asarray, params)
  found = tiny_model.logits(Transformer(config), params, jnp.asarray(tokens, jnp.int32))
  np.testing.assert_allclose(found, expected, atol=1e-3)
  assert np.abs(expected).max() > 0.5
  # Trained norms are exchanged with Hugging Face's models, which have none of the offset.
  np.testing.assert_allclose(
    params['norm']['scale'], theirs.state_dict()['model.norm.weight'].numpy(), atol=1e-6
  )


def shape(tmp_path, architecture, tensors=None, **changes):
  path = tiny_gguf.write(tmp_path / 'a.gguf', tensors, architecture=architecture, **changes)
  return gguf_config.model_config(gguf.open_file(path))


def test_large_gemmas_scale_scores_by_the_width_of_a_head(tmp_path):
  width = tiny_gguf.D // tiny_gguf.HEADS
  scale = lambda arch, layers: (
    shape(tmp_path, arch, llama__block_count=layers, llama__attention__key_length=16).query_scale
  )
  assert scale('gemma2', 46) == scale('gemma3', 62) == width**-0.5
  assert scale('gemma2', 42) is scale('gemma3', 48) is scale('llama', 62) is None


def test_gemmas_know_what_their_files_leave_out(tmp_path):
  gemma2 = shape(tmp_path, 'gemma2', llama__block_count=4)
  assert gemma2.windows == (4096, 0, 4096, 0)
  assert (gemma2.attention_cap, gemma2.logit_cap) == (50.0, 30.0)
  assert gemma2.rope_thetas == ()
  assert gemma2.embed_scale == math.sqrt(tiny_gguf.D)
  gemma3 = shape(tmp_path, 'gemma3', llama__block_count=7, llama__attention__sliding_window=8)
  assert gemma3.windows == (8, 8, 8, 8, 8, 0, 8)
  assert gemma3.rope_thetas == (1e4,) * 5 + (5e4, 1e4)
  assert (gemma3.attention_cap, gemma3.logit_cap, gemma3.norm_offset) == (0, 0, 1)
  full = shape(tmp_path, 'gemma3')
  assert full.windows == full.rope_thetas == ()


def test_a_pattern_of_windows_in_the_file_holds(tmp_path):
  window = {'llama__attention__sliding_window': 8}
  windows = lambda pattern: (
    shape(tmp_path, 'gemma3', llama__attention__sliding_window_pattern=pattern, **window).windows
  )
  assert windows([False, True, True]) == (0, 8, 8)
  assert windows(3) == (8, 8, 0)
  with pytest.raises(UserError, match='a window pattern for 2 of 3 layers'):
    windows([True, False])


def test_smollm3_has_layers_without_positions(tmp_path):
  config = shape(tmp_path, 'smollm3', llama__block_count=5)
  assert config.rope_thetas == (5e4, 5e4, 5e4, 0, 5e4)


def test_stretched_positions(tmp_path):
  scaling = lambda **changes: shape(tmp_path, 'llama', **changes).rope_scaling
  linear = {'llama__rope__scaling__type': 'linear', 'llama__rope__scaling__factor': 2.0}
  assert scaling(**linear) == RopeScaling('linear', 2.0)
  found = scaling(**STRETCHED | {'llama__rope__scaling__attn_factor': 0.5})
  assert (found.original_length, found.low, found.high) == (16, 1, 32)
  assert found.attention_factor == pytest.approx(0.5 * (0.1 * math.log(4) + 1))


def test_llama_3_s_factors_are_recognised_and_others_are_not(tmp_path):
  rope = {
    'rope_theta': 50_000.0,
    'factor': 32.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }
  weights = tiny_gguf.llama_cpp_weights(tiny_gguf.hugging_face_weights())
  write = lambda factors: shape(tmp_path, 'llama', weights | {'rope_freqs.weight': factors})
  factors = rope_factors(rope, tiny_gguf.HEAD_DIM)
  found = write(factors).rope_scaling
  assert dataclasses.astuple(found) == ('llama3', 32.0, 8192, 1.0, 4.0, 1.0)
  for other in (factors[:-1], factors * np.float32([1, 1.5, 1, 1])):
    with pytest.raises(UserError, match=r"other factors in rope_freqs\.weight than Llama 3's"):
      write(other)

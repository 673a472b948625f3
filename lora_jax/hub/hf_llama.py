"""config.json for a plain Llama that has no checkpoint of its own, such as one from GGUF."""

import dataclasses
from typing import Any

from lora_jax.config import ModelConfig, RopeScaling
from lora_jax.errors import UserError

# Fields of `ModelConfig` that transformers' LlamaConfig has a word for.
_FIELDS = {
  'vocab_size': 'vocab_size',
  'num_layers': 'num_hidden_layers',
  'model_dim': 'hidden_size',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'mlp_dim': 'intermediate_size',
  'max_length': 'max_position_embeddings',
  'rope_theta': 'rope_theta',
  'norm_eps': 'rms_norm_eps',
  'tie_embeddings': 'tie_word_embeddings',
  'qkv_bias': 'attention_bias',
  'mlp_bias': 'mlp_bias',
}


def llama_settings(config: ModelConfig) -> dict[str, Any]:
  """The content of config.json.

  Raises:
    UserError: the model is not one that LlamaConfig can describe.
  """
  plain = ModelConfig(
    **{field: getattr(config, field) for field in _FIELDS},
    rope_scaling=config.rope_scaling,
    output_bias=config.qkv_bias,
  )
  if config != plain:
    odd = [
      f.name for f in dataclasses.fields(config) if vars(config)[f.name] != vars(plain)[f.name]
    ]
    raise UserError(
      f'a config.json is written for plain Llamas alone, and this model has {", ".join(odd)}; load '
      'the base from the directory of a Hugging Face checkpoint, whose config.json is copied'
    )
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'hidden_act': 'silu',
    'rope_scaling': _scaling(config.rope_scaling),
    **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
  }


def _scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
  if scaling is None:
    return None
  settings: dict[str, Any] = {'rope_type': scaling.kind, 'factor': scaling.factor}
  if scaling.kind == 'linear':
    return settings
  settings['original_max_position_embeddings'] = scaling.original_length
  if scaling.kind == 'llama3':
    return settings | {'low_freq_factor': scaling.low, 'high_freq_factor': scaling.high}
  return settings | {
    'beta_slow': scaling.low,
    'beta_fast': scaling.high,
    'attention_factor': scaling.attention_factor,
  }

"""Our parameter tree as a Hugging Face Llama directory, for peers that read one.

write_llama_checkpoint(config, params, Path('base'))
transformers.AutoModelForCausalLM.from_pretrained('base')
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from lora_jax.config import ModelConfig

_BLOCK = {
  'input_layernorm': ('input_layernorm', 'scale'),
  'self_attn.q_proj': ('attn', 'q_proj', 'kernel'),
  'self_attn.k_proj': ('attn', 'k_proj', 'kernel'),
  'self_attn.v_proj': ('attn', 'v_proj', 'kernel'),
  'self_attn.o_proj': ('attn', 'o_proj', 'kernel'),
  'post_attention_layernorm': ('post_attention_layernorm', 'scale'),
  'mlp.gate_proj': ('mlp', 'gate_proj', 'kernel'),
  'mlp.up_proj': ('mlp', 'up_proj', 'kernel'),
  'mlp.down_proj': ('mlp', 'down_proj', 'kernel'),
}


def write_llama_checkpoint(config: ModelConfig, params: Mapping[str, Any], directory: Path) -> None:
  """Writes `config.json` and `model.safetensors` (float32) into `directory`.

  Args:
    config: the shape.
    params: a whole parameter tree, as `lora_jax.transformer` lays it out: stacked
      over layers, kernels (in, out).
    directory: made if it is not there.
  """
  # Hugging Face keeps kernels (out, in). safetensors writes the buffer as it lies in
  # memory, so a transposed view has to be copied.
  entry = lambda leaf: np.ascontiguousarray(np.asarray(leaf, np.float32).T)
  tensors = {
    'model.embed_tokens.weight': np.asarray(params['embed_tokens']['embedding'], np.float32),
    'model.norm.weight': entry(params['norm']['scale']),
  }
  for name, path in _BLOCK.items():
    stacked = params['layers']
    for key in path:
      stacked = stacked[key]
    for layer in range(config.num_layers):
      tensors[f'model.layers.{layer}.{name}.weight'] = entry(stacked[layer])
  if not config.tie_embeddings:
    tensors['lm_head.weight'] = entry(params['lm_head']['kernel'])
  directory.mkdir(parents=True, exist_ok=True)
  (directory / 'config.json').write_text(json.dumps(llama_config(config), indent=2))
  safetensors.numpy.save_file(tensors, directory / 'model.safetensors', metadata={'format': 'pt'})


def llama_config(config: ModelConfig) -> dict[str, Any]:
  """The content of `config.json`, in the field names of transformers' LlamaConfig."""
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': config.vocab_size,
    'num_hidden_layers': config.num_layers,
    'hidden_size': config.model_dim,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'intermediate_size': config.mlp_dim,
    'max_position_embeddings': config.max_length,
    'rope_theta': config.rope_theta,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tie_embeddings,
    'hidden_act': 'silu',
    'attention_bias': False,
    'mlp_bias': False,
    'dtype': 'float32',
  }

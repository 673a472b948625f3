"""A base of random weights and one token a byte: for tests, and to see the machinery run."""

import hashlib
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from lora_jax.config import ModelConfig
from lora_jax.hub import tokenizer_json
from lora_jax.hub.chat_template import ChatTemplate
from lora_jax.hub.tokenizer import ChatTokenizer

_SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
# 3 + 256 bytes + 5 = 264 rows, which 8 devices can share.
_RESERVED = tuple(f'<|reserved_{i}|>' for i in range(5))
_TEMPLATE = """\
{% if messages and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou answer in few words.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CONFIG = ModelConfig(
  vocab_size=len(_SPECIALS) + 256 + len(_RESERVED),
  num_layers=2,
  model_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=64,
  max_length=2048,
)


def chat_tokenizer() -> ChatTokenizer:
  """Bytes, the special tokens, and reserved ones."""
  tokens = [*_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *_RESERVED]
  special = (*_SPECIALS, *_RESERVED)
  data = tokenizer_json.byte_level(tokens, [], [tokens.index(token) for token in special])
  full, plain, _ = tokenizer_json.build(data, special)
  names = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>'}
  return ChatTokenizer(
    full,
    plain,
    ChatTemplate(_TEMPLATE, names),
    eos_id=tokens.index('<|im_end|>'),
    pad_id=tokens.index('<|endoftext|>'),
    bos_id=tokens.index('<|im_start|>'),
  )


def random_params(config: ModelConfig, seed: int) -> dict[str, Any]:
  """Kernels with standard deviation 1/sqrt(in), embeddings 0.02, norms 1."""
  generator = np.random.default_rng(seed)
  layers, D = config.num_layers, config.model_dim
  q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

  def kernel(in_dim: int, out_dim: int) -> dict[str, np.ndarray]:
    values = generator.standard_normal((layers, in_dim, out_dim), np.float32)
    return {'kernel': values / np.float32(np.sqrt(in_dim))}

  def norm(*shape: int) -> dict[str, np.ndarray]:
    return {'scale': np.ones(shape, np.float32)}

  embedding = generator.standard_normal((config.vocab_size, D), np.float32) * np.float32(0.02)
  return {
    'embed_tokens': {'embedding': embedding},
    'layers': {
      'input_layernorm': norm(layers, D),
      'attn': {
        'q_proj': kernel(D, q_dim),
        'k_proj': kernel(D, kv_dim),
        'v_proj': kernel(D, kv_dim),
        'o_proj': kernel(q_dim, D),
      },
      'post_attention_layernorm': norm(layers, D),
      'mlp': {
        'gate_proj': kernel(D, config.mlp_dim),
        'up_proj': kernel(D, config.mlp_dim),
        'down_proj': kernel(config.mlp_dim, D),
      },
    },
    'norm': norm(D),
  }


def params_sha256(tree: dict[str, Any]) -> str:
  """The hash of all names and values, as hexadecimal digits."""
  digest = hashlib.sha256()

  def add(path: str, value: Any) -> None:
    if isinstance(value, dict):
      for key in sorted(value):
        add(f'{path}/{key}', value[key])
    else:
      digest.update(path.encode())
      digest.update(value.tobytes())

  add('', tree)
  return digest.hexdigest()

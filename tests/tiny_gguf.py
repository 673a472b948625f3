"""Writes small Llama files as llama.cpp's converter would, for the tests of `lora_jax.hub`."""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, TokenType
from gguf.quants import quantize
from tokenizers import pre_tokenizers

LAYERS, D, HEADS, KV_HEADS, HEAD_DIM, F = 3, 32, 4, 2, 8, 64
SPECIALS = ['<|pad|>', '<|im_start|>', '<|im_end|>']
TOKENS = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), 'ab', 'Ġab', '[user]']
MERGES = ['a b', 'Ġ ab']
TYPES = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 258 + [TokenType.USER_DEFINED]
TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
METADATA = {
  'llama.block_count': LAYERS,
  'llama.context_length': 128,
  'llama.embedding_length': D,
  'llama.feed_forward_length': F,
  'llama.attention.head_count': HEADS,
  'llama.attention.head_count_kv': KV_HEADS,
  'llama.attention.layer_norm_rms_epsilon': 1e-5,
  'llama.rope.freq_base': 50_000.0,
  'tokenizer.ggml.model': 'gpt2',
  'tokenizer.ggml.pre': 'smollm',
  'tokenizer.ggml.tokens': TOKENS,
  'tokenizer.ggml.token_type': [int(kind) for kind in TYPES],
  'tokenizer.ggml.merges': MERGES,
  'tokenizer.ggml.bos_token_id': 1,
  'tokenizer.ggml.eos_token_id': 2,
  'tokenizer.ggml.padding_token_id': 0,
  'tokenizer.chat_template': TEMPLATE,
}


def hugging_face_weights(seed=0):
  """Random weights in Hugging Face's names and layout, (out, in)."""
  rng = np.random.default_rng(seed)
  shapes = {'model.embed_tokens.weight': (len(TOKENS), D), 'model.norm.weight': (D,)}
  for i in range(LAYERS):
    block = f'model.layers.{i}'
    shapes |= {
      f'{block}.input_layernorm.weight': (D,),
      f'{block}.post_attention_layernorm.weight': (D,),
      f'{block}.self_attn.q_proj.weight': (HEADS * HEAD_DIM, D),
      f'{block}.self_attn.k_proj.weight': (KV_HEADS * HEAD_DIM, D),
      f'{block}.self_attn.v_proj.weight': (KV_HEADS * HEAD_DIM, D),
      f'{block}.self_attn.o_proj.weight': (D, HEADS * HEAD_DIM),
      f'{block}.mlp.gate_proj.weight': (F, D),
      f'{block}.mlp.up_proj.weight': (F, D),
      f'{block}.mlp.down_proj.weight': (D, F),
    }
  return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def interleave(weight, heads):
  """Row 2i of a head is Hugging Face's row i, row 2i + 1 its row i + H/2."""
  out = np.empty_like(weight)
  size = len(weight) // heads
  for head in range(heads):
    for i in range(size // 2):
      out[head * size + 2 * i] = weight[head * size + i]
      out[head * size + 2 * i + 1] = weight[head * size + size // 2 + i]
  return out


def llama_cpp_weights(weights):
  """The same weights under llama.cpp's names, with q and k interleaved."""
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
  out = {}
  for name, weight in weights.items():
    if 'q_proj' in name or 'k_proj' in name:
      weight = interleave(weight, HEADS if 'q_proj' in name else KV_HEADS)
    out[names.get_name(name, try_suffixes=('.weight',))] = weight
  return out


def write(
  path: Path, tensors=None, kind=GGMLQuantizationType.F32, architecture='llama', **changes
) -> Path:
  """Writes `tensors` (by llama.cpp's names; default: random ones).

  Args:
    path: the file to write.
    tensors: name -> float32 array.
    kind: how matrices are stored; vectors are always F32.
    architecture: the value of general.architecture.
    **changes: replace metadata, dots written as `__`; None leaves a key out. Keys of
      the architecture begin with `llama` whatever it is.
  """
  if tensors is None:
    tensors = llama_cpp_weights(hugging_face_weights())
  writer = gguf.GGUFWriter(path, architecture)
  metadata = METADATA | {key.replace('__', '.'): value for key, value in changes.items()}
  for key, value in metadata.items():
    if key.startswith('llama.'):
      key = key.replace('llama', architecture, 1)
    if isinstance(value, str):
      writer.add_string(key, value)
    elif isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif value is not None:
      writer.add_array(key, value)
  for name, weight in tensors.items():
    if weight.ndim == 1:
      writer.add_tensor(name, weight)
    else:
      writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path

"""A Llama in a GGUF file: its shape and its weights as our parameter tree.

Two conventions of llama.cpp differ from ours and are undone here: matrices are
stored (out, in), and the rows of the query and key projections are interleaved for
its rotary embedding.

    file = gguf.open_file(path)
    config = gguf_llama.model_config(file)
    params = gguf_llama.load_params(file, config)
"""

import collections
from typing import Any, NoReturn

import numpy as np

from lora_jax.config import ModelConfig
from lora_jax.errors import UserError
from lora_jax.hub.gguf import GgufFile

# Our module -> the tensor of block i is `blk.<i>.<name>.weight`.
_BLOCK_NORMS = {'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm'}
_BLOCK_KERNELS = {
  'attn': {
    'q_proj': 'attn_q',
    'k_proj': 'attn_k',
    'v_proj': 'attn_v',
    'o_proj': 'attn_output',
  },
  'mlp': {'gate_proj': 'ffn_gate', 'up_proj': 'ffn_up', 'down_proj': 'ffn_down'},
}


def model_config(file: GgufFile) -> ModelConfig:
  """The shape of the model in `file`.

  Raises:
    UserError: the architecture is not a plain Llama (mixtures of experts, scaled
      or partial rotary embeddings and per-layer head counts are refused).
  """
  architecture = file.require('general.architecture', str)
  if architecture != 'llama':
    raise UserError(
      f'{file.path}: architecture {architecture!r} is not supported; give a GGUF file whose '
      "general.architecture is 'llama'"
    )
  counts = ('llama.attention.head_count', 'llama.attention.head_count_kv')
  if any(isinstance(file.metadata.get(count), list) for count in counts):
    _refuse(file, 'a head count for each layer')
  heads = file.require(counts[0], int)
  kv_heads = file.require(counts[1], int, heads)
  if heads < 1 or kv_heads < 1 or heads % kv_heads:
    _refuse(file, f'{heads} query heads over {kv_heads} key and value heads')
  model_dim = file.require('llama.embedding_length', int)
  head_dim = file.require('llama.attention.key_length', int, model_dim // heads)
  if file.metadata.get('llama.attention.value_length', head_dim) != head_dim:
    _refuse(file, 'values of another width than keys')
  if file.metadata.get('llama.rope.dimension_count', head_dim) != head_dim:
    _refuse(file, 'rotary embeddings on a part of each head')
  if file.metadata.get('llama.rope.scaling.type', 'none') != 'none':
    _refuse(file, 'scaled rotary embeddings')
  if file.metadata.get('llama.expert_count', 0):
    _refuse(file, 'a mixture of experts')
  return ModelConfig(
    vocab_size=int(file.require_tensor('token_embd.weight').shape[0]),
    num_layers=file.require('llama.block_count', int),
    model_dim=model_dim,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    mlp_dim=file.require('llama.feed_forward_length', int),
    max_length=file.require('llama.context_length', int),
    rope_theta=file.require('llama.rope.freq_base', float, 10_000.0),
    norm_eps=file.require('llama.attention.layer_norm_rms_epsilon', float),
    tie_embeddings='output.weight' not in file.tensors,
  )


def weights_kind(file: GgufFile) -> str:
  """How most of the block weights were stored, as 'dequantised Q4_1' or 'F32'."""
  elements: collections.Counter[str] = collections.Counter()
  for name, tensor in file.tensors.items():
    if name.startswith('blk.'):
      elements[tensor.kind.name] += int(np.prod(tensor.shape))
  kind = elements.most_common(1)[0][0] if elements else 'F32'
  return kind if kind in ('F32', 'F16', 'BF16') else f'dequantised {kind}'


def load_params(file: GgufFile, config: ModelConfig) -> dict[str, Any]:
  """Dequantises `file` into the Transformer's parameter tree.

  Args:
    file: the open file.
    config: what `model_config` says of it.

  Returns:
    A nested dict of float32 arrays. Blocks are stacked on a leading axis L and
    kernels are (in, out): `layers/attn/q_proj/kernel` is (L, D, N*H). There is
    `lm_head/kernel` (D, V) only when the embeddings are not tied.

  Raises:
    UserError: a tensor is missing, has another shape or an unknown type, or the
      file has weights for which a plain Llama has no place.
  """
  D, F, V = config.model_dim, config.mlp_dim, config.vocab_size
  q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  kernel_shapes = {
    'q_proj': (D, q_dim),
    'k_proj': (D, kv_dim),
    'v_proj': (D, kv_dim),
    'o_proj': (q_dim, D),
    'gate_proj': (D, F),
    'up_proj': (D, F),
    'down_proj': (F, D),
  }
  rotary_heads = {'q_proj': config.num_heads, 'k_proj': config.num_kv_heads}
  _check_names(file, config)

  def stacked_norm(name: str) -> np.ndarray:
    out_LD = np.empty((config.num_layers, D), np.float32)
    for layer, out_D in enumerate(out_LD):
      out_D[...] = _read(file, f'blk.{layer}.{name}.weight', (D,))
    return out_LD

  def stacked_kernel(module: str, name: str) -> np.ndarray:
    in_dim, out_dim = kernel_shapes[module]
    stack = np.empty((config.num_layers, in_dim, out_dim), np.float32)
    for layer, kernel in enumerate(stack):
      weight = _read(file, f'blk.{layer}.{name}.weight', (out_dim, in_dim))
      if module in rotary_heads:
        weight = unpermute(weight, rotary_heads[module])
      kernel[...] = weight.T
    return stack

  layers: dict[str, Any] = {
    module: {'scale': stacked_norm(name)} for module, name in _BLOCK_NORMS.items()
  }
  for block, modules in _BLOCK_KERNELS.items():
    layers[block] = {
      module: {'kernel': stacked_kernel(module, name)} for module, name in modules.items()
    }
  params: dict[str, Any] = {
    'embed_tokens': {'embedding': np.array(_read(file, 'token_embd.weight', (V, D)))},
    'layers': layers,
    'norm': {'scale': np.array(_read(file, 'output_norm.weight', (D,)))},
  }
  if not config.tie_embeddings:
    head = _read(file, 'output.weight', (V, D))
    params['lm_head'] = {'kernel': np.ascontiguousarray(head.T)}
  return params


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
  """Rows of a query or key projection, (heads * H, D), in Hugging Face's order.

  llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, Hugging Face rotates
  rows (i, i + H/2); its converter interleaves the two halves and this undoes it.
  """
  rows, width = weight.shape
  pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, width)
  return pairs.swapaxes(1, 2).reshape(rows, width)


def _check_names(file: GgufFile, config: ModelConfig) -> None:
  """Refuses tensors that the parameter tree has no place for, such as biases."""
  names = [*_BLOCK_NORMS.values()]
  for modules in _BLOCK_KERNELS.values():
    names.extend(modules.values())
  expected = {f'blk.{layer}.{name}.weight' for layer in range(config.num_layers) for name in names}
  expected |= {'token_embd.weight', 'output_norm.weight', 'output.weight'}
  extra = sorted(set(file.tensors) - expected)
  if extra:
    _refuse(file, f'the tensor {extra[0]}' + (f' and {len(extra) - 1} more' if extra[1:] else ''))


def _refuse(file: GgufFile, what: str) -> NoReturn:
  raise UserError(f'{file.path}: has {what}, which is not supported; give a plain Llama model')


def _read(file: GgufFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
  found = file.require_tensor(name).shape
  if found != shape:
    raise UserError(
      f'{file.path}: tensor {name} is {found}, but the metadata promises {shape}; '
      'convert the model again'
    )
  return file.read(name)

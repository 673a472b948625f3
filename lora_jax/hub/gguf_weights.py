"""The weights in a GGUF file as the Transformer's parameter tree.

Conventions of llama.cpp that differ from ours are undone here: matrices are stored
(out, in), where `Family.interleaved` says so the rows of query and key projections are
paired for its rotary embedding, and a Gemma's norms have their offset added. Norms are
then as in Hugging Face's files, so that trained ones may go there and come from there.

    config = gguf_config.model_config(file)
    params = load_params(file, config)
"""

import collections
from typing import Any

import numpy as np

from lora_jax.config import ModelConfig
from lora_jax.errors import UserError
from lora_jax.hub.gguf import GgufFile
from lora_jax.hub.gguf_config import ROPE_FACTORS, family, refuse

# Our module -> the tensors of block i are `blk.<i>.<name>.weight` and `.bias`.
_NORMS = {'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm'}
_GEMMA_NORMS = {
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'post_attention_norm',
  'pre_feedforward_layernorm': 'ffn_norm',
  'post_feedforward_layernorm': 'post_ffw_norm',
}
_HEAD_NORMS = {'q_norm': 'attn_q_norm', 'k_norm': 'attn_k_norm'}
_KERNELS = {
  'attn': {
    'q_proj': 'attn_q',
    'k_proj': 'attn_k',
    'v_proj': 'attn_v',
    'o_proj': 'attn_output',
  },
  'mlp': {'gate_proj': 'ffn_gate', 'up_proj': 'ffn_up', 'down_proj': 'ffn_down'},
}


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
    config: what `gguf_config.model_config` says of it.

  Returns:
    A nested dict of float32 arrays. Blocks are stacked on a leading axis L and
    kernels are (in, out): `layers/attn/q_proj/kernel` is (L, D, N*H). There is
    `lm_head/kernel` (D, V) only when the embeddings are not tied.

  Raises:
    UserError: a tensor is missing, has another shape or an unknown type, or the
      file has weights for which the tree has no place.
  """
  D, F, V = config.model_dim, config.mlp_dim, config.vocab_size
  q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  sizes = {
    'q_proj': (D, q_dim),
    'k_proj': (D, kv_dim),
    'v_proj': (D, kv_dim),
    'o_proj': (q_dim, D),
    'gate_proj': (D, F),
    'up_proj': (D, F),
    'down_proj': (F, D),
  }
  biased = _biased(config)
  paired = family(file).interleaved
  rotary_heads = {'q_proj': config.num_heads, 'k_proj': config.num_kv_heads} if paired else {}
  norms = _GEMMA_NORMS if config.post_norms else _NORMS
  head_norms = _HEAD_NORMS if config.qk_norm else {}
  _check_names(file, config, [*norms.values(), *head_norms.values()], biased)

  def stack(name: str, *shape: int, heads: int = 0) -> np.ndarray:
    """The tensors `name` of all blocks, transposed; with `heads`, their rows unpaired."""
    out = np.empty((config.num_layers, *reversed(shape)), np.float32)
    for layer, slot in enumerate(out):
      value = _read(file, f'blk.{layer}.{name}', shape)
      slot[...] = (unpermute(value, heads) if heads else value).T
    return out

  norm = lambda scale: {'scale': scale - np.float32(config.norm_offset)}
  layers: dict[str, Any] = {
    module: norm(stack(f'{name}.weight', D)) for module, name in norms.items()
  }
  for block, modules in _KERNELS.items():
    layers[block] = {}
    for module, name in modules.items():
      (in_dim, out_dim), heads = sizes[module], rotary_heads.get(module, 0)
      leaves = {'kernel': stack(f'{name}.weight', out_dim, in_dim, heads=heads)}
      if module in biased:
        leaves['bias'] = stack(f'{name}.bias', out_dim, heads=heads)
      layers[block][module] = leaves
  for module, name in head_norms.items():
    layers['attn'][module] = norm(stack(f'{name}.weight', config.head_dim))
  params: dict[str, Any] = {
    'embed_tokens': {'embedding': np.array(_read(file, 'token_embd.weight', (V, D)))},
    'layers': layers,
    'norm': norm(_read(file, 'output_norm.weight', (D,))),
  }
  if not config.tie_embeddings:
    head = _read(file, 'output.weight', (V, D))
    params['lm_head'] = {'kernel': np.ascontiguousarray(head.T)}
  return params


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
  """Rows of a query or key projection, (heads * H, ...), in Hugging Face's order.

  llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, Hugging Face rotates
  rows (i, i + H/2); its converter interleaves the two halves and this undoes it.
  """
  rows, *rest = weight.shape
  pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, *rest)
  return pairs.swapaxes(1, 2).reshape(weight.shape)


def _biased(config: ModelConfig) -> set[str]:
  biased = set()
  if config.qkv_bias:
    biased |= {'q_proj', 'k_proj', 'v_proj'}
  if config.output_bias:
    biased.add('o_proj')
  if config.mlp_bias:
    biased |= set(_KERNELS['mlp'])
  return biased


def _check_names(file: GgufFile, config: ModelConfig, norms: list[str], biased: set[str]) -> None:
  """Refuses tensors that the parameter tree has no place for."""
  suffixes = {f'{name}.weight' for name in norms}
  for modules in _KERNELS.values():
    suffixes |= {f'{name}.weight' for name in modules.values()}
    suffixes |= {f'{name}.bias' for module, name in modules.items() if module in biased}
  expected = {f'blk.{layer}.{name}' for layer in range(config.num_layers) for name in suffixes}
  expected |= {'token_embd.weight', 'output_norm.weight', 'output.weight', ROPE_FACTORS}
  extra = sorted(set(file.tensors) - expected)
  if extra:
    refuse(file, f'the tensor {extra[0]}' + (f' and {len(extra) - 1} more' if extra[1:] else ''))


def _read(file: GgufFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
  found = file.require_tensor(name).shape
  if found != shape:
    raise UserError(
      f'{file.path}: tensor {name} is {found}, but the metadata promises {shape}; '
      'convert the model again'
    )
  return file.read(name)

"""The shape of the model in a GGUF file, for each architecture of our families.

    config = model_config(gguf.open_file(path))

The keys are those of the `gguf` package (gguf.constants.Keys). What a file leaves to
its reader, as Gemma's pattern of windows, is as llama.cpp has it (src/models/*.cpp,
load_arch_hparams).
"""

import dataclasses
import math
from typing import Any, NoReturn

import numpy as np

from lora_jax.config import ModelConfig, RopeScaling
from lora_jax.errors import UserError
from lora_jax.hub.gguf import GgufFile
from lora_jax.rotary import frequencies


@dataclasses.dataclass(frozen=True)
class Family:
  """What an architecture's name says that its keys do not.

  Attributes:
    interleaved: whether rows of query and key projections are in pairs (2i, 2i+1),
      where Hugging Face has (i, i + H/2).
    qk_norm: whether queries and keys are normalised.
    gemma: whether it has Gemma's norms after sublayers, activation and scaled
      embeddings. Its norms are stored with the 1 added that Hugging Face's lack.
    position_period: one layer in so many has no positions, the last of them; 0: none.
    window_period: the same for layers without a window, where there is one.
    window: where a file has none.
    local_theta: base of the frequencies in layers with a window; 0: as elsewhere.
    attention_cap: where a file has none.
    logit_cap: where a file has none.
    deep: number of layers of the variant whose scores are scaled by D / N, not by H.
  """

  interleaved: bool = False
  qk_norm: bool = False
  gemma: bool = False
  position_period: int = 0
  window_period: int = 0
  window: int = 0
  local_theta: float = 0.0
  attention_cap: float = 0.0
  logit_cap: float = 0.0
  deep: int = 0


FAMILIES = {
  'llama': Family(interleaved=True),  # Llama, Mistral, SmolLM2
  'qwen2': Family(),
  'qwen3': Family(qk_norm=True),
  'smollm3': Family(interleaved=True, position_period=4),
  'gemma2': Family(
    gemma=True, window_period=2, window=4096, attention_cap=50.0, logit_cap=30.0, deep=46
  ),
  'gemma3': Family(gemma=True, qk_norm=True, window_period=6, local_theta=10_000.0, deep=62),
}

ROPE_FACTORS = 'rope_freqs.weight'
# Llama 3's stretching, which a file states as a factor for each frequency.
_LLAMA3_LENGTH, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0


def family(file: GgufFile) -> Family:
  """The entry of `FAMILIES` for `file`; `UserError` where there is none."""
  architecture = file.require('general.architecture', str)
  if architecture not in FAMILIES:
    raise UserError(
      f'{file.path}: architecture {architecture!r} is not supported; give a GGUF file whose '
      f'general.architecture is one of {", ".join(FAMILIES)}'
    )
  return FAMILIES[architecture]


def model_config(file: GgufFile) -> ModelConfig:
  """The shape of the model in `file`.

  Raises:
    UserError: the architecture is not in `FAMILIES`, or the model has something that
      the Transformer lacks (mixtures of experts, partial rotary embeddings, head counts
      for each layer, stretched positions of other kinds).
  """
  kind = family(file)
  keys = _Keys(file, file.require('general.architecture', str))
  counts = ('attention.head_count', 'attention.head_count_kv')
  if any(isinstance(keys.found(count), list) for count in counts):
    refuse(file, 'a head count for each layer')
  heads = keys.get(counts[0], int)
  kv_heads = keys.get(counts[1], int, heads)
  if heads < 1 or kv_heads < 1 or heads % kv_heads:
    refuse(file, f'{heads} query heads over {kv_heads} key and value heads')
  model_dim = keys.get('embedding_length', int)
  num_layers = keys.get('block_count', int)
  head_dim = keys.get('attention.key_length', int, model_dim // heads)
  if keys.found('attention.value_length', head_dim) != head_dim:
    refuse(file, 'values of another width than keys')
  if keys.found('rope.dimension_count', head_dim) != head_dim:
    refuse(file, 'rotary embeddings on a part of each head')
  if keys.found('expert_count', 0):
    refuse(file, 'a mixture of experts')
  max_length = keys.get('context_length', int)
  theta = keys.get('rope.freq_base', float, 10_000.0)
  windows = _windows(keys, kind, num_layers)
  config = ModelConfig(
    vocab_size=int(file.require_tensor('token_embd.weight').shape[0]),
    num_layers=num_layers,
    model_dim=model_dim,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    mlp_dim=keys.get('feed_forward_length', int),
    max_length=max_length,
    rope_theta=theta,
    norm_eps=keys.get('attention.layer_norm_rms_epsilon', float),
    tie_embeddings='output.weight' not in file.tensors,
    rope_scaling=_rope_scaling(keys, max_length),
    rope_thetas=_rope_thetas(keys, kind, theta, windows, num_layers),
    windows=windows,
    qkv_bias='blk.0.attn_q.bias' in file.tensors,
    output_bias='blk.0.attn_output.bias' in file.tensors,
    mlp_bias='blk.0.ffn_up.bias' in file.tensors,
    qk_norm=kind.qk_norm,
    post_norms=kind.gemma,
    norm_offset=1.0 if kind.gemma else 0.0,
    activation='gelu_tanh' if kind.gemma else 'silu',
    embed_scale=math.sqrt(model_dim) if kind.gemma else 1.0,
    query_scale=_query_scale(keys, kind, num_layers, model_dim // heads),
    attention_cap=keys.get('attn_logit_softcapping', float, kind.attention_cap),
    logit_cap=keys.get('final_logit_softcapping', float, kind.logit_cap),
  )
  if ROPE_FACTORS in file.tensors:
    _check_factors(file, config)
  return config


def refuse(file: GgufFile, what: str) -> NoReturn:
  """Says that the model has `what`."""
  raise UserError(
    f'{file.path}: has {what}, which is not supported; give a model without it, of the '
    f'architectures {", ".join(FAMILIES)}'
  )


@dataclasses.dataclass(frozen=True)
class _Keys:
  """The metadata of a file's own architecture."""

  file: GgufFile
  architecture: str

  def get(self, key: str, kind: type, default: Any = None) -> Any:
    return self.file.require(f'{self.architecture}.{key}', kind, default)

  def found(self, key: str, default: Any = None) -> Any:
    return self.file.metadata.get(f'{self.architecture}.{key}', default)


def _windows(keys: _Keys, kind: Family, num_layers: int) -> tuple[int, ...]:
  window = keys.get('attention.sliding_window', int, kind.window)
  if not window:
    return ()
  pattern = keys.found('attention.sliding_window_pattern')
  if isinstance(pattern, list):
    if len(pattern) != num_layers:
      refuse(keys.file, f'a window pattern for {len(pattern)} of {num_layers} layers')
    return tuple(window if local else 0 for local in pattern)
  period = kind.window_period if pattern is None else int(pattern)
  return tuple(0 if period and i % period == period - 1 else window for i in range(num_layers))


def _rope_thetas(
  keys: _Keys, kind: Family, theta: float, windows: tuple[int, ...], num_layers: int
) -> tuple[float, ...]:
  if kind.position_period:
    step = kind.position_period
    return tuple(0.0 if i % step == step - 1 else theta for i in range(num_layers))
  if kind.local_theta and windows:
    local = keys.get('rope.freq_base_swa', float, kind.local_theta)
    return tuple(local if window else theta for window in windows)
  return ()


def _query_scale(keys: _Keys, kind: Family, num_layers: int, width: int) -> float | None:
  if keys.found('attention.scale'):
    return keys.get('attention.scale', float)
  return width**-0.5 if kind.deep and num_layers == kind.deep else None


def _rope_scaling(keys: _Keys, max_length: int) -> RopeScaling | None:
  kind = keys.get('rope.scaling.type', str, 'none')
  if ROPE_FACTORS in keys.file.tensors:
    length = keys.get('rope.scaling.original_context_length', int, _LLAMA3_LENGTH)
    largest = float(keys.file.read(ROPE_FACTORS).max())
    return RopeScaling('llama3', largest, length, _LLAMA3_LOW, _LLAMA3_HIGH)
  if kind == 'none':
    return None
  factor = keys.get('rope.scaling.factor', float)
  if not factor > 0:
    refuse(keys.file, f'positions stretched {factor} times')
  if kind == 'linear':
    return RopeScaling('linear', factor)
  if kind == 'yarn':
    attention = keys.get('rope.scaling.attn_factor', float, 1.0)
    return RopeScaling(
      'yarn',
      factor,
      original_length=keys.get('rope.scaling.original_context_length', int, max_length),
      low=keys.get('rope.scaling.yarn_beta_slow', float, 1.0),
      high=keys.get('rope.scaling.yarn_beta_fast', float, 32.0),
      # Peng et al. 2023, section 3.4: the factor on queries and keys alike.
      attention_factor=attention * (0.1 * math.log(factor) + 1.0),
    )
  refuse(keys.file, f'positions stretched by {kind!r}')


def _check_factors(file: GgufFile, config: ModelConfig) -> None:
  """Refuses factors that are not those of the one scaling that is stated so."""
  plain_h, _ = frequencies(dataclasses.replace(config, rope_scaling=None), config.rope_theta)
  stretched_h, _ = frequencies(config, config.rope_theta)
  found_h = file.read(ROPE_FACTORS).reshape(-1)
  expected_h = plain_h / stretched_h
  if found_h.shape != expected_h.shape or not np.allclose(found_h, expected_h, rtol=1e-3):
    refuse(file, f"other factors in {ROPE_FACTORS} than Llama 3's")

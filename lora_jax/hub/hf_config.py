"""config.json of a Hugging Face checkpoint as a `ModelConfig`.

One Transformer serves all families; this file knows how each of them spells its fields
and what holds where a field is missing, as in transformers' configuration classes. What
the Transformer cannot compute is refused by name.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lora_jax.config import ModelConfig, RopeScaling
from lora_jax.errors import UserError

CONFIG = 'config.json'

_ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh'}
_SLIDING, _FULL = 'sliding_attention', 'full_attention'


@dataclasses.dataclass(frozen=True)
class Family:
  """What a model_type says by itself.

  Attributes:
    architecture: the class in transformers that its language models are saved from.
    defaults: of fields that config.json may leave out; None: it follows from others, or
      there is none.
    changes: fields of `ModelConfig` that set the family apart.
  """

  architecture: str
  defaults: Mapping[str, Any]
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_COMMON = {
  'num_key_value_heads': None,
  'head_dim': None,
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': False,
  'hidden_act': 'silu',
  'rope_theta': 10_000.0,
  'max_position_embeddings': 32_768,
  'attention_bias': False,
  'mlp_bias': False,
  'sliding_window': None,
  'use_sliding_window': False,
}
_QWEN = {
  **_COMMON,
  'num_key_value_heads': 32,
  'sliding_window': 4096,
  'max_window_layers': 28,
}
_GEMMA = {
  **_COMMON,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'tie_word_embeddings': True,
  'hidden_activation': 'gelu_pytorch_tanh',
  'sliding_window': 4096,
  'query_pre_attn_scalar': 256,
}
_GEMMA_CHANGES = {'post_norms': True, 'norm_offset': 1.0}

FAMILIES = {
  'llama': Family('LlamaForCausalLM', {**_COMMON, 'max_position_embeddings': 2048}),
  'mistral': Family(
    'MistralForCausalLM',
    {
      **_COMMON,
      'num_key_value_heads': 8,
      'max_position_embeddings': 131_072,
      'sliding_window': 4096,
    },
  ),
  'qwen2': Family('Qwen2ForCausalLM', _QWEN, {'qkv_bias': True}),
  'qwen3': Family('Qwen3ForCausalLM', {**_QWEN, 'head_dim': 128}, {'qk_norm': True}),
  'smollm3': Family(
    'SmolLM3ForCausalLM',
    {
      **_COMMON,
      'num_key_value_heads': 4,
      'tie_word_embeddings': True,
      'rope_theta': 2e6,
      'no_rope_layer_interval': 4,
    },
  ),
  'gemma2': Family(
    'Gemma2ForCausalLM',
    {
      **_GEMMA,
      'max_position_embeddings': 8192,
      'attn_logit_softcapping': 50.0,
      'final_logit_softcapping': 30.0,
    },
    _GEMMA_CHANGES,
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM',
    {
      **_GEMMA,
      'max_position_embeddings': 131_072,
      'rope_theta': 1e6,
      'rope_local_base_freq': 10_000.0,
      'sliding_window_pattern': 6,
    },
    {**_GEMMA_CHANGES, 'qk_norm': True},
  ),
}


# Models that see, whose config.json holds those of two; `hf_vision` reads them.
SEEING = {
  'idefics3': 'Idefics3ForConditionalGeneration',
  'smolvlm': 'SmolVLMForConditionalGeneration',
}


def read(directory: Path) -> dict[str, Any]:
  """The content of config.json.

  Raises:
    UserError: there is none, or it is not a JSON object.
  """
  file = directory / CONFIG
  if not file.is_file():
    raise UserError(f'no {file}; give the directory of a Hugging Face checkpoint')
  try:
    settings = json.loads(file.read_text(encoding='utf-8'))
  except ValueError as error:
    raise UserError(f'{file}: not JSON ({error})') from error
  if not isinstance(settings, dict):
    raise UserError(f'{file}: not a JSON object; give the directory of a Hugging Face checkpoint')
  return settings


class Reader:
  """config.json, or an object in it, with what holds where a field is missing under it."""

  def __init__(
    self, file: Path, settings: dict[str, Any], defaults: Mapping[str, Any] | None = None
  ):
    """Takes the settings of a language model, or with `defaults` those of anything else."""
    self.file = file
    self.kind = settings.get('model_type')
    if defaults is not None:
      self.settings = {**defaults, **settings}
      return
    named = settings.get('architectures') or []
    # A Gemma 3 that was saved without its eyes keeps the configuration of both.
    if self.kind == 'gemma3' and named == ['Gemma3ForCausalLM']:
      settings = self.object(settings.get('text_config'))
      self.kind = 'gemma3_text'
    family = FAMILIES.get(self.kind) if isinstance(self.kind, str) else None
    if family is None:
      self.refuse_architecture(f'model_type {self.kind!r}')
    if named and named != [family.architecture]:
      self.refuse_architecture(f'architecture {named}')
    self.family = family
    self.settings = {**family.defaults, **settings}
    self.gemma = self.kind in ('gemma2', 'gemma3_text')

  def config(self) -> ModelConfig:
    self.refuse_what_changes_the_function()
    dim, heads = self.integer('hidden_size'), self.integer('num_attention_heads')
    kv_heads = self.integer('num_key_value_heads', heads)
    if heads % kv_heads:
      self.refuse(f'{heads} query heads over {kv_heads} key and value heads')
    head_dim = self.integer('head_dim', dim // heads)
    if head_dim % 2:
      self.refuse(f'heads of width {head_dim}, which cannot be rotated in pairs')
    layers = self.integer('num_hidden_layers')
    activation = self.settings['hidden_activation' if self.gemma else 'hidden_act']
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
      self.refuse(f'activation {activation!r}', ', '.join(_ACTIVATIONS))
    bias = self.kind not in ('mistral', 'qwen2') and self.flag('attention_bias')
    config = ModelConfig(
      vocab_size=self.integer('vocab_size'),
      num_layers=layers,
      model_dim=dim,
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=head_dim,
      mlp_dim=self.integer('intermediate_size'),
      max_length=self.integer('max_position_embeddings'),
      norm_eps=self.number('rms_norm_eps'),
      tie_embeddings=self.flag('tie_word_embeddings'),
      windows=self.windows(layers),
      qkv_bias=bias,
      output_bias=bias,
      mlp_bias=self.kind in ('llama', 'smollm3') and self.flag('mlp_bias'),
      activation=_ACTIVATIONS[activation],
      **self.rotary(layers),
    )
    if self.gemma:
      config = dataclasses.replace(
        config,
        embed_scale=math.sqrt(dim),
        query_scale=self.number('query_pre_attn_scalar') ** -0.5,
        attention_cap=self.cap('attn_logit_softcapping'),
        logit_cap=self.cap('final_logit_softcapping'),
      )
    return dataclasses.replace(config, **self.family.changes)

  def windows(self, layers: int) -> tuple[int, ...]:
    """The window of each layer, or () where none has one."""
    if self.kind in ('qwen2', 'qwen3') and not self.flag('use_sliding_window'):
      return ()
    # A Gemma has one, whatever it takes to say so.
    if self.settings['sliding_window'] is None and not self.gemma:
      return ()
    width = self.integer('sliding_window')
    kinds = self.settings.get('layer_types')
    if kinds is None:
      kinds = [_SLIDING if slides else _FULL for slides in self.sliding_by_default(layers)]
    known = isinstance(kinds, list) and all(kind in (_SLIDING, _FULL) for kind in kinds)
    if not known or len(kinds) != layers:
      self.refuse(
        f'layer_types {str(kinds)[:60]}', f'{layers} of {_SLIDING!r} and {_FULL!r}, one for a layer'
      )
    # transformers gives every layer of a Mistral the window, whatever is said of layers.
    if self.kind == 'mistral' and _FULL in kinds:
      self.refuse('layers of a Mistral without its window')
    return tuple(width if kind == _SLIDING else 0 for kind in kinds) if _SLIDING in kinds else ()

  def sliding_by_default(self, layers: int) -> list[bool]:
    if self.kind == 'mistral':
      return [True] * layers
    if self.kind == 'gemma2':
      return [i % 2 == 0 for i in range(layers)]
    if self.kind == 'gemma3_text':
      every = self.integer('sliding_window_pattern')
      return [(i + 1) % every != 0 for i in range(layers)]
    if self.kind in ('qwen2', 'qwen3'):
      first = self.integer('max_window_layers', least=0)
      return [i >= first for i in range(layers)]
    if self.kind == 'smollm3' and self.flag('use_sliding_window'):
      return [not turned for turned in self.turned(layers)]
    return [False] * layers

  def turned(self, layers: int) -> list[bool]:
    """Which layers of a SmolLM3 have positions."""
    turned = self.settings.get('no_rope_layers')
    if turned is None:
      every = self.integer('no_rope_layer_interval')
      turned = [(i + 1) % every != 0 for i in range(layers)]
    if not isinstance(turned, list) or len(turned) < layers:
      self.refuse(f'no_rope_layers {str(turned)[:60]}', f'{layers} of 0 and 1, one for a layer')
    return [bool(value) for value in turned[:layers]]

  def rotary(self, layers: int) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rope_thetas`.

    config.json has them in `rope_theta` and `rope_scaling`, or since transformers 5 together
    in `rope_parameters`: for a Gemma 3 once for each kind of layer.
    """
    given = self.object(self.settings.get('rope_parameters'))
    scaling = self.object(self.settings.get('rope_scaling'))
    if self.kind != 'gemma3_text':
      given = given or scaling
      theta = self.theta(given, 'rope_theta')
      thetas = ()
      if self.kind == 'smollm3' and not all(turned := self.turned(layers)):
        thetas = tuple(theta if turns else 0.0 for turns in turned)
      return {'rope_theta': theta, 'rope_thetas': thetas, 'rope_scaling': self.scaling(given)}
    if not {*given} <= {_FULL, _SLIDING}:
      self.refuse('rope_parameters of a Gemma 3 that are not by kind of layer')
    full = {**self.object(given.get(_FULL)), **scaling}
    local = self.object(given.get(_SLIDING))
    theta = self.theta(full, 'rope_theta')
    local_theta = self.theta(local, 'rope_local_base_freq')
    windows, stretched = self.windows(layers), self.scaling(full)
    # `rope_scaling` goes by the base, so the two kinds of layer must have two.
    if self.scaling(local) or (stretched and theta == local_theta and any(windows)):
      self.refuse('scaled rotary positions in layers with a window')
    thetas = tuple(local_theta if window else theta for window in windows)
    return {'rope_theta': theta, 'rope_thetas': thetas, 'rope_scaling': stretched}

  def theta(self, given: Mapping[str, Any], key: str) -> float:
    """The base of the frequencies: of `given`, or under `key` at the top level."""
    if given.get('rope_theta') is not None:
      theta = self.number('rope_theta', among=given)
    else:
      theta = self.number(key)
    if theta <= 1:
      self.refuse(f'rotary positions with base {theta}')
    return float(theta)

  def scaling(self, given: Mapping[str, Any]) -> RopeScaling | None:
    """What `rope_scaling` or `rope_parameters` asks for, if for anything."""
    kind = given.get('rope_type', given.get('type')) or 'default'
    if given.get('partial_rotary_factor') not in (None, 1):
      self.refuse('rotary positions on a part of each head')
    if kind == 'default':
      return None
    if kind not in ('linear', 'llama3', 'yarn'):
      self.refuse(f'rotary positions of the kind {kind!r}', 'default, linear, llama3 or yarn')
    context = self.number('max_position_embeddings')
    original = self.number('original_max_position_embeddings', context)
    original = self.number('original_max_position_embeddings', original, given)
    factor = self.number('factor', context / original, given)
    if kind == 'linear':
      return RopeScaling(kind, factor)
    if kind == 'llama3':
      low = self.number('low_freq_factor', among=given)
      high = self.number('high_freq_factor', among=given)
      if high <= low:
        self.refuse(f'a high_freq_factor of {high}, not above a low_freq_factor of {low}')
      return RopeScaling(kind, factor, int(original), low, high)
    if not given.get('truncate', True):
      self.refuse('yarn with truncate off')
    low = self.number('beta_slow', 1.0, given)
    high = self.number('beta_fast', 32.0, given)
    # Peng et al. 2023, equation 22, unless the file says otherwise.
    growth = lambda weight: 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
    magnitude = growth(1.0)
    if given.get('mscale') and given.get('mscale_all_dim'):
      weights = [self.number(key, among=given) for key in ('mscale', 'mscale_all_dim')]
      magnitude = growth(weights[0]) / growth(weights[1])
    magnitude = self.number('attention_factor', magnitude, given)
    return RopeScaling(kind, factor, int(original), low, high, magnitude)

  def refuse_what_changes_the_function(self) -> None:
    for key in ('num_experts', 'num_local_experts', 'n_routed_experts'):
      if self.settings.get(key):
        self.refuse(f'a mixture of experts ({key} {self.settings[key]})')
    if self.settings.get('partial_rotary_factor') not in (None, 1, 1.0):
      self.refuse('rotary positions on a part of each head')
    if self.settings.get('quantization_config'):
      self.refuse('quantised weights', 'the checkpoint that they were made from, or a GGUF file')
    if self.settings.get('use_bidirectional_attention'):
      self.refuse('attention to later tokens')

  def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
    """A whole number; `default` where it is null or missing."""
    value = self.settings.get(key)
    value = default if value is None else value
    if value is None:
      raise UserError(f'{self.file}: has no {key}; give a whole config.json')
    if type(value) is not int or value < least:
      raise UserError(f'{self.file}: {key} is {value!r}; give a whole number from {least}')
    return value

  def number(
    self, key: str, default: float | None = None, among: Mapping[str, Any] | None = None
  ) -> float:
    """A number above 0, of `among` or the top level; `default` where it is null or missing."""
    value = (self.settings if among is None else among).get(key)
    value = default if value is None else value
    if value is None:
      raise UserError(f'{self.file}: has no {key}; give a whole config.json')
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
      raise UserError(f'{self.file}: {key} is {value!r}; give a number above 0')
    return value

  def cap(self, key: str) -> float:
    """A cap; null is none."""
    return self.number(key) if self.settings.get(key) else 0.0

  def flag(self, key: str) -> bool:
    value = self.settings[key]
    if value not in (True, False, None):
      raise UserError(f'{self.file}: {key} is {value!r}; give true or false')
    return bool(value)

  def object(self, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
      self.refuse(f'{str(value)[:60]!r} in place of an object')
    return value or {}

  def refuse_architecture(self, what: str) -> NoReturn:
    known = ', '.join([*(family.architecture for family in FAMILIES.values()), *SEEING.values()])
    seen = '; of a model with eyes only the language model, saved alone, is read'
    raise UserError(
      f'{self.file}: {what} is not supported, {known} are{seen if self.kind == "gemma3" else ""}'
    )

  def refuse(self, what: str, instead: str = '') -> NoReturn:
    raise UserError(
      f'{self.file}: has {what}, which is not supported' + (f'; give {instead}' if instead else '')
    )

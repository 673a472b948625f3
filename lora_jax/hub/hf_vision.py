"""config.json of a model that sees, as a `ModelConfig` with its `VisionConfig`.

Idefics3 and SmolVLM are one architecture under two names: a Llama under `text_config`, a
SigLIP tower under `vision_config`, and between them a pixel shuffle by `scale_factor`. A
directory of a model without eyes is read as `hf_config` has it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.config import ModelConfig, VisionConfig
from lora_jax.hub.hf_config import CONFIG, SEEING, Reader, read

# What transformers' configuration classes take where a field is missing.
_DEFAULTS = {
  'hidden_size': 1152,
  'intermediate_size': 3072,
  'num_hidden_layers': 12,
  'num_attention_heads': 16,
  'num_channels': 3,
  'image_size': 224,
  'patch_size': 32,
  'hidden_act': 'gelu_pytorch_tanh',
  'layer_norm_eps': 1e-6,
}
_TOP_DEFAULTS = {'image_token_id': 128_257, 'scale_factor': 2, 'tie_word_embeddings': False}

# Of the original training code, which transformers does not heed: on, they mean another model.
_NOT_HEEDED = ('qk_layer_norms', 'use_resampler', 'rope_interleaved')


def model_config(directory: Path) -> ModelConfig:
  """The shape of the model in a directory, from its config.json.

  Raises:
    UserError: there is no such file, it misses a size, or it describes a model that the
      Transformer cannot compute.
  """
  file, settings = directory / CONFIG, read(directory)
  kind = settings.get('model_type')
  if kind not in SEEING:
    return Reader(file, settings).config()
  named = settings.get('architectures')
  top = Reader(file, settings, _TOP_DEFAULTS)
  if named and named != [SEEING[kind]]:
    top.refuse_architecture(f'architecture {named}')
  text = top.object(settings.get('text_config'))
  if text.get('model_type', 'llama') != 'llama':
    top.refuse(f'a language model of the type {text["model_type"]!r}', 'one with a llama')
  for key in _NOT_HEEDED:
    if text.get(key):
      top.refuse(f'{key} in its text_config')
  # A published text_config may name a class of the code it was trained with.
  text = {**text, 'model_type': 'llama', 'architectures': None}
  tied = top.flag('tie_word_embeddings')
  config = Reader(file, {**text, 'tie_word_embeddings': tied}).config()
  vision = _vision(file, top, top.object(settings.get('vision_config')))
  if vision.image_token >= config.vocab_size:
    top.refuse(f'an image_token_id of {vision.image_token} in {config.vocab_size} tokens')
  return dataclasses.replace(config, vision=vision)


def _vision(file: Path, top: Reader, settings: Mapping[str, Any]) -> VisionConfig:
  eyes = Reader(file, dict(settings), _DEFAULTS)
  if eyes.integer('num_channels') != 3:
    eyes.refuse(f'images of {eyes.integer("num_channels")} channels', '3')
  if eyes.settings['hidden_act'] != _DEFAULTS['hidden_act']:
    eyes.refuse(f'activation {eyes.settings["hidden_act"]!r} in its vision_config')
  vision = VisionConfig(
    image_size=eyes.integer('image_size'),
    patch_size=eyes.integer('patch_size'),
    model_dim=eyes.integer('hidden_size'),
    num_layers=eyes.integer('num_hidden_layers'),
    num_heads=eyes.integer('num_attention_heads'),
    mlp_dim=eyes.integer('intermediate_size'),
    shuffle=top.integer('scale_factor'),
    image_token=top.integer('image_token_id', least=0),
    norm_eps=eyes.number('layer_norm_eps'),
  )
  if vision.model_dim % vision.num_heads:
    eyes.refuse(f'{vision.num_heads} heads in a vision tower of width {vision.model_dim}')
  side = vision.patches(vision.image_size)
  if not side or side % vision.shuffle:
    eyes.refuse(f'{side} patches a side, which a scale_factor of {vision.shuffle} does not divide')
  return vision

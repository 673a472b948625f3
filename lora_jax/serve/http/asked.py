"""What may be asked, in the words of OpenAI's interface; what is not done is refused by name."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.sampling import Sampling
from lora_jax.serve.answer import Request
from lora_jax.serve.http import data_url
from lora_jax.serve.http.refusal import RefusalError
from lora_jax.serve.likelihood import MOST
from lora_jax.serve.looking import Looker, Shown

# Token ids, and the images that they have tokens for.
_Prompt: TypeAlias = tuple[list[int], Sequence[Shown]]

# They are for the books of whoever answers, and change no answer.
_LABELS = frozenset(
  ('metadata', 'prompt_cache_key', 'safety_identifier', 'service_tier', 'store', 'user')
)
# What parameters that are not taken may be: as good as absent.
_ABSENT: Mapping[str, Any] = {
  'best_of': 1,
  'echo': False,
  'frequency_penalty': 0,
  'function_call': 'none',
  'functions': [],
  'ignore_eos': False,
  'logit_bias': {},
  'min_p': 0,
  'modalities': ['text'],
  'presence_penalty': 0,
  'repetition_penalty': 1,
  'response_format': {'type': 'text'},
  'skip_special_tokens': True,
  'suffix': '',
  'tool_choice': 'none',
  'tools': [],
  'top_logprobs': 0,
  # Of a message, as answers have them, or clients that say so of every one.
  'annotations': [],
  'tool_calls': [],
  'type': 'text',
}
# Stop strings are looked for in every piece of text. OpenAI takes 4, some tasks have more.
_STOPS, _STOP_LENGTH = 16, 256


class _Form(BaseModel):
  model_config = ConfigDict(strict=True, extra='allow', allow_inf_nan=False)


class StreamOptions(_Form):
  """How a stream ends."""

  include_usage: bool | None = None


def _stops(value: Any) -> tuple[str, ...]:
  stops = [] if value is None else [value] if isinstance(value, str) else value
  if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
    raise ValueError('give a text, or a list of texts')
  if len(stops) > _STOPS or any(not 0 < len(stop) <= _STOP_LENGTH for stop in stops):
    raise ValueError(f'give at most {_STOPS} texts of 1 to {_STOP_LENGTH} characters')
  return tuple(stops)


class Asked(_Form):
  """What chats and texts have in common. A parameter that is null is one that is absent."""

  model: str = Field(max_length=1024)
  max_tokens: int | None = Field(None, ge=1)
  temperature: float | None = Field(None, ge=0, le=2)
  top_p: float | None = Field(None, gt=0, le=1)
  top_k: int | None = Field(None, ge=-1, lt=2**31)
  seed: int | None = Field(None, ge=-(2**63), lt=2**63)
  n: int | None = Field(None, ge=1, le=16)
  stop: Annotated[tuple[str, ...], pydantic.PlainValidator(_stops)] = ()
  stream: bool | None = None
  stream_options: StreamOptions | None = None

  # What an answer has at most where the request says nothing; None: as much as there is room.
  longest: ClassVar[int | None] = None

  @property
  def prompt_count(self) -> int:
    """How many prompts there are."""
    raise NotImplementedError

  @property
  def likeliest(self) -> int | None:
    """How many of the likeliest tokens are told beside each; None: no log probabilities are."""
    raise NotImplementedError

  @property
  def echoes(self) -> bool:
    """Whether an answer begins with its prompt."""
    return False

  def echoed(self, number: int) -> str | None:
    """A prompt as it was asked; None: as token ids."""
    raise NotImplementedError

  @property
  def count(self) -> int:
    """How many answers are wanted."""
    return self.prompt_count * (self.n or 1)

  @property
  def with_usage(self) -> bool:
    """Whether a stream says how many tokens there were."""
    return bool(self.stream_options and self.stream_options.include_usage)

  @property
  def has_images(self) -> bool:
    """Whether there is something to look at."""
    return False

  def requests(
    self, tokenizer: ChatTokenizer, adapter: str, looker: Looker | None = None
  ) -> Iterator[Request]:
    """What the engine is asked: `n` of each prompt, one prompt after the other.

    Args:
      tokenizer: the base's.
      adapter: by name; '': none.
      looker: looks at images; None: the base does not see.

    Raises:
      UserError: the chat template refuses the messages; an image cannot be one.
      RefusalError: there are images, and the base does not see.
    """
    # Two who ask the same without a seed want two answers.
    seed = secrets.randbits(32) if self.seed is None else self.seed
    temperature = 1.0 if self.temperature is None else self.temperature
    top_k = max(self.top_k or 0, 0)
    for prompt, shown in self._prompts(tokenizer, looker):
      for _ in range(self.n or 1):
        sampling = Sampling(temperature, self.top_p or 1.0, top_k, seed)
        yield Request(
          prompt, adapter, self._limit, sampling, self.stop, self.likeliest, self.echoes, shown
        )
        seed += 1

  def _prompts(self, tokenizer: ChatTokenizer, looker: Looker | None) -> Iterator[_Prompt]:
    raise NotImplementedError

  @property
  def _limit(self) -> int | None:
    return self.longest if self.max_tokens is None else self.max_tokens


def _content(value: Any) -> list[dict[str, Any]]:
  """Parts as templates take them; of an image, 'data' is what a chat is rendered without."""
  parts = [{'type': 'text', 'text': value}] if isinstance(value, str) else value
  if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
    raise ValueError('give a text, or a list of parts {"type": "text", "text": ...}')
  return [_part(part) for part in parts]


def _part(part: dict[str, Any]) -> dict[str, Any]:
  if part.get('type') == 'image_url':
    return {'type': 'image', 'data': data_url.read(part.get('image_url'))}
  if part.get('type') != 'text' or not isinstance(part.get('text'), str):
    raise ValueError(
      'every part is {"type": "text", "text": ...} or, where the base sees, '
      '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
    )
  return {'type': 'text', 'text': part['text']}


class Message(_Form):
  """A turn."""

  role: Literal['system', 'developer', 'user', 'assistant']
  content: Annotated[list[dict[str, Any]], pydantic.PlainValidator(_content)]


class Chat(Asked):
  """A chat to go on with."""

  messages: list[Message] = Field(min_length=1)
  max_completion_tokens: int | None = Field(None, ge=1)
  logprobs: bool | None = None
  top_logprobs: int | None = Field(None, ge=0, le=MOST)

  @property
  def prompt_count(self) -> int:
    return 1

  @property
  def likeliest(self) -> int | None:
    return (self.top_logprobs or 0) if self.logprobs else None

  @property
  def has_images(self) -> bool:
    return any('data' in part for turn in self.messages for part in turn.content)

  def _prompts(self, tokenizer: ChatTokenizer, looker: Looker | None) -> Iterator[_Prompt]:
    shown, turns = [], []
    for i, turn in enumerate(self.messages):
      for j, part in enumerate(turn.content):
        if 'data' not in part:
          continue
        where = f'messages.{i}.content.{j}'
        if looker is None:
          said = f'{where}: images are not taken, since this base does not see; say it in words'
          raise RefusalError(400, said, param=f'messages.{i}.content')
        shown.append(looker.shown(part['data'], where))
      role = 'system' if turn.role == 'developer' else turn.role
      content = [
        {key: held for key, held in part.items() if key != 'data'} for part in turn.content
      ]
      turns.append({'role': role, 'content': content})
    ids = tokenizer.encode_chat(turns)
    if looker is not None:
      ids = looker.eyes.spell(ids, tokenizer, [one.picture for one in shown])
    yield ids, shown

  @property
  def _limit(self) -> int | None:
    return super()._limit if self.max_completion_tokens is None else self.max_completion_tokens


def _is_ids(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _prompt(value: Any) -> list[Any]:
  prompts = [value] if isinstance(value, str) or _is_ids(value) else value
  is_prompt = lambda one: isinstance(one, str) or _is_ids(one)
  if not isinstance(prompts, list) or not prompts or not all(map(is_prompt, prompts)):
    raise ValueError('give a text, a list of token ids, or a list of either')
  return prompts


# Some clients say `false` for none.
_FalseIsNone = pydantic.BeforeValidator(lambda value: None if value is False else value)


class Text(Asked):
  """Texts to go on with."""

  prompt: Annotated[list[Any], pydantic.PlainValidator(_prompt)]
  # Of a prompt that is echoed, no more than its likelihood may be wanted.
  max_tokens: int | None = Field(None, ge=0)
  logprobs: Annotated[int | None, _FalseIsNone] = Field(None, ge=0, le=MOST)
  echo: bool | None = None

  # As everywhere where this interface is spoken.
  longest: ClassVar[int | None] = 16

  @property
  def prompt_count(self) -> int:
    return len(self.prompt)

  @property
  def likeliest(self) -> int | None:
    return self.logprobs

  @property
  def echoes(self) -> bool:
    return bool(self.echo)

  def echoed(self, number: int) -> str | None:
    prompt = self.prompt[number]
    return prompt if isinstance(prompt, str) else None

  def _prompts(self, tokenizer: ChatTokenizer, looker: Looker | None) -> Iterator[_Prompt]:
    for prompt in self.prompt:
      yield tokenizer.encode_text(prompt) if isinstance(prompt, str) else prompt, ()


class Load(_Form):
  """An adapter to list. Names are such that a header, a path or a table can hold them."""

  lora_name: str = Field(pattern=r'^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$')
  lora_path: str = Field(min_length=1, max_length=4096)


class Spell(_Form):
  """A text whose tokens are wanted; as `encode_text` has it, or without what begins a text."""

  prompt: str
  model: str | None = None
  add_special_tokens: bool | None = None


class Read(_Form):
  """Tokens whose text is wanted."""

  tokens: list[int]
  model: str | None = None


class Unload(_Form):
  """An adapter to list no longer."""

  lora_name: str = Field(max_length=1024)


Form = TypeVar('Form', bound=_Form)


def parse(form: type[Form], body: bytes) -> Form:
  """Reads what was sent.

  Raises:
    RefusalError: it is no JSON, is not of this form, or asks for what is not done here.
  """
  try:
    found = form.model_validate_json(body)
  except pydantic.ValidationError as errors:
    error = errors.errors(include_url=False, include_input=False)[0]
    # What our own functions say stands behind a preface of pydantic's.
    said = str(error.get('ctx', {}).get('error', error['msg']))
    param = '.'.join(map(str, error['loc'])) or None
    raise RefusalError(400, f'{param}: {said}' if param else said, param=param) from None
  _check_all_taken(found, '')
  return found


def _check_all_taken(form: _Form, where: str) -> None:
  for name, value in (form.model_extra or {}).items():
    if not (value is None or name in _LABELS or _is_absent(name, value)):
      param = f'{where}{name}'
      raise RefusalError(400, f'{param} is not supported; leave it out', param=param)
  if isinstance(form, Text) and form.max_tokens == 0 and not form.echoes:
    message = 'max_tokens: 0 is for prompts that are echoed; ask for at least 1'
    raise RefusalError(400, message, param='max_tokens')
  if isinstance(form, Chat):
    if form.top_logprobs and not form.logprobs:
      raise RefusalError(400, 'top_logprobs goes with logprobs', param='top_logprobs')
    for i, message in enumerate(form.messages):
      _check_all_taken(message, f'messages.{i}.')
  if isinstance(form, Asked) and form.stream_options:
    if not form.stream:
      raise RefusalError(400, 'stream_options is for streams', param='stream_options')
    _check_all_taken(form.stream_options, 'stream_options.')


def _is_absent(name: str, value: Any) -> bool:
  # For Python 0 is False, and of log probabilities 0 asks for some.
  held = _ABSENT.get(name)
  return name in _ABSENT and value == held and isinstance(value, bool) == isinstance(held, bool)

"""Chat templates: Jinja source as Hugging Face's tokenizers have it, and what it tells.

template = ChatTemplate(source, {'bos_token': '<s>', 'eos_token': '</s>'})
template.render([{'role': 'user', 'content': 'Which organ makes bile?'}])
template.turn_end(['<s>', '</s>', '<|eot|>'])   # what really ends an answer
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from lora_jax.errors import UserError, one_line

# Turns: 'role', and 'content': a text, or a list of parts, each {'type': 'text', 'text': ...}
# or {'type': 'image'}.
Messages = Sequence[Mapping[str, Any]]

# What stands for an image where a template takes texts alone.
IMAGE = '<image>'

# For a base that was never taught a chat: headings, and answers that end the text.
PLAIN = """\
{% if begins_with_bos %}{{ bos_token }}{% endif %}
{% for message in messages %}
{{- '### ' + message['role'] + '\\n' + message['content'] }}
{{- eos_token if message['role'] == 'assistant' }}
{{- '\\n\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '### assistant\\n' }}
{%- endif %}
"""

# What Jinja and the expressions in a template raise over messages that it does not take.
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A chat's form.

  Attributes:
    source: Jinja source.
    names: what it may use beside the messages: 'bos_token', 'eos_token' and the like.
  """

  source: str
  names: Mapping[str, Any]

  def check(self, where: str) -> None:
    """Raises `UserError` if the source is not Jinja; `where` names the file."""
    try:
      _compile(self.source)
    except jinja2.TemplateError as error:
      raise UserError(
        f'{where}: its chat template does not parse ({one_line(error)}); give another file'
      ) from error

  def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
    """The chat as text.

    Args:
      messages: turns, each with 'role' and 'content'; a text for a template that takes
        parts becomes one, and parts for one that takes texts are joined, with `IMAGE`.
      add_generation_prompt: whether to end with the opening of an assistant turn.

    Raises:
      UserError: the template refuses the messages.
    """
    try:
      # Templates ask whether `tools` is None, and undefined is not.
      return _compile(self.source).render(
        messages=[self._as_taken(message) for message in messages],
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **self.names,
      )
    except _REFUSALS as error:
      raise UserError(f'the chat template refuses these messages: {one_line(error)}') from error

  def standalone(self) -> str:
    """The source for other readers, which do not know the name that `PLAIN` asks for."""
    if self.source != PLAIN:
      return self.source
    return f'{{%- set begins_with_bos = {bool(self.names["begins_with_bos"])} %}}{PLAIN}'

  def turn_end(self, tokens: Collection[str]) -> str | None:
    """The first of `tokens` after an answer, or None where none follows.

    This is what a model really writes when it has answered; the end of text that files
    name is often another.
    """
    answer = 'pong'
    chat = [{'role': 'user', 'content': 'ping'}, {'role': 'assistant', 'content': answer}]
    found = _any_of(tokens).search(self._try(chat).rpartition(answer)[2])
    return found[0] if found else None

  def turn_tokens(self, tokens: Collection[str]) -> set[str]:
    """Those of `tokens` that a user's turn is made of."""
    return set(_any_of(tokens).findall(self._try([{'role': 'user', 'content': 'ping'}])))

  def _as_taken(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get('content')
    if isinstance(content, str) and self._takes_parts:
      return {**message, 'content': [{'type': 'text', 'text': content}]}
    if isinstance(content, list) and not self._takes_parts:
      return {**message, 'content': ''.join(part.get('text', IMAGE) for part in content)}
    return message

  @functools.cached_property
  def _takes_parts(self) -> bool:
    """Whether the template says nothing of a text, but what it says of parts."""

    def says(content: Any) -> bool:
      turn = {'role': 'user', 'content': content}
      try:
        text = _compile(self.source).render(messages=[turn], **self.names)
      except _REFUSALS:
        return False
      return 'ping' in text and "'type'" not in text

    return not says('ping') and says([{'type': 'text', 'text': 'ping'}])

  def _try(self, messages: Messages) -> str:
    try:
      return self.render(messages, add_generation_prompt=False)
    except UserError:
      return ''


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
  """Finds the longest of `tokens`, leaving out those that are as good as plain text.

  Some vocabularies hold runs of spaces and newlines that are found before all else.
  """
  marks = [token for token in tokens if len(token.strip(' \t\n\r\u2581')) > 2]
  return re.compile('|'.join(map(re.escape, sorted(marks, key=len, reverse=True))) or r'(?!)')


class _Generation(jinja2.ext.Extension):
  """`{% generation %}`, with which templates mark what an assistant says: its body."""

  tags: ClassVar[set[str]] = {'generation'}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
  """A chat template with the same environment as in Hugging Face transformers."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols', _Generation]
  )

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  # Jinja's own filter escapes HTML, which a prompt is not.
  def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)

  environment.filters['tojson'] = tojson
  environment.globals['raise_exception'] = raise_exception
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(source)

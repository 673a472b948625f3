"""Text and chats into token ids, and back, for any base.

    tokenizer = tokenizer_gguf.from_gguf(gguf.open_file(path))     # or
    tokenizer = tokenizer_hf.from_directory(directory, vocab_size)
    ids = tokenizer.encode_chat([{'role': 'user', 'content': 'Which organ makes bile?'}])
    text = tokenizer.decode(generated_ids)

Text in a dataset row is data, and may hold something that looks like a special
token. `encode_chat` never lets it become one; `encode` does, and is meant for text
that is trusted, such as a rendered chat in a test.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from lora_jax.hub.chat_template import ChatTemplate, Messages

_LONE_SURROGATE = re.compile('[\ud800-\udfff]')
_PRIVATE_USE = range(0xE000, 0xF900)
# Unicode's White_Space, which is what `tokenizers` strips; Python's own has more.
_WHITE_SPACE = '\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000'
_WHITE_SPACE += ''.join(map(chr, range(0x2000, 0x200B)))


class ChatTokenizer:
  """Turns text and chats into token ids, and back.

  Attributes:
    vocab_size: number of tokens; ids are below it.
    eos_id: the token that ends a turn.
    pad_id: the token to pad with; may equal `eos_id`.
    bos_id: the token that begins a text, or None. No method adds it: templates do.
    special_tokens: text of each special token -> its id.
    template: the form of a chat.
  """

  def __init__(
    self,
    full: Tokenizer,
    plain: Tokenizer,
    template: ChatTemplate,
    *,
    eos_id: int,
    pad_id: int,
    bos_id: int | None = None,
    inner: Tokenizer | None = None,
  ):
    """Puts the parts together; `tokenizer_json.build` makes the tokenizers.

    There are several over one vocabulary, since the switch of a tokenizer that ignores
    special tokens is mutable state, not safe between threads and lost in a pickle.

    Args:
      full: finds special tokens in text, unnormalised.
      plain: never gives one, whatever the text.
      template: the form of a chat.
      eos_id: the token that ends a turn.
      pad_id: the token to pad with.
      bos_id: the token that begins a text, or None.
      inner: `plain` for text that does not stand at the beginning, where that makes a
        difference; None: it makes none.
    """
    self.eos_id = eos_id
    self.pad_id = pad_id
    self.bos_id = bos_id
    self.template = template
    self._full = full
    self._plain = plain
    self._inner = plain if inner is None else inner
    self.vocab_size = full.get_vocab_size(with_added_tokens=True)
    added = full.get_added_tokens_decoder()
    self.special_tokens = {token.content: i for i, token in added.items() if token.special}
    names = sorted(self.special_tokens, key=len, reverse=True)
    self._special = re.compile('|'.join(map(re.escape, names)) or r'(?!)')
    # Some special tokens swallow the spaces beside them.
    self._eats_before = {token.content for token in added.values() if token.lstrip}
    self._eats_after = {token.content for token in added.values() if token.rstrip}

  def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
    """The chat as text; see `ChatTemplate.render`."""
    return self.template.render(messages, add_generation_prompt)

  def encode(self, text: str) -> list[int]:
    """Ids of trusted text: special tokens written out in it become those tokens."""
    return self._full.encode(_whole(text), add_special_tokens=False).ids

  def encode_text(self, text: str) -> list[int]:
    """Ids of trusted text that a base is to go on from, begun as those it was trained on.

    As `encode`, with `bos_id` before it where the base's texts have that and `text` does not.
    """
    ids = self.encode(text)
    bos_id = self.bos_id if self.template.names.get('begins_with_bos') else None
    return ids if bos_id is None or ids[:1] == [bos_id] else [bos_id, *ids]

  def encode_plain(self, text: str) -> list[int]:
    """Ids of untrusted text: none of them is special, whatever the text says.

    Where a vocabulary has no bytes to fall back to, a character that it lacks is its
    unknown token, as everywhere.
    """
    return self._plain.encode(_whole(text), add_special_tokens=False).ids

  def encode_chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
    """Ids of a chat in which only the template may put special tokens.

    Use this for anything that comes from a dataset or a client: a row cannot end
    its turn or open another. It equals `encode(render(...))` when no message holds
    the text of a special token.

    Raises:
      UserError: the template refuses the messages.
    """
    special = self._special
    everything = '\n'.join(text for message in messages for text in _texts(message))
    if not special.search(everything):
      return self.encode(self.render(messages, add_generation_prompt))

    # The text of specials in messages travels through the template in disguise, so
    # that what is found afterwards is the template's own.
    used = set(everything)
    mark = next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    disguise = lambda found: f'{mark}{self.special_tokens[found[0]]}{mark}'
    masked = [
      _with_texts(message, lambda text: special.sub(disguise, text)) for message in messages
    ]
    text = self.render(masked, add_generation_prompt)
    by_id = {str(i): token for token, i in self.special_tokens.items()}
    reveal = lambda part: re.sub(f'{mark}([0-9]+){mark}', lambda found: by_id[found[1]], part)
    ids: list[int] = []
    start, before = 0, ''
    for found in [*special.finditer(text), None]:
      part = text[start : found.start() if found else None]
      if before in self._eats_after:
        part = part.lstrip(_WHITE_SPACE)
      if found and found[0] in self._eats_before:
        part = part.rstrip(_WHITE_SPACE)
      tokenizer = self._inner if start else self._plain
      ids += tokenizer.encode(_whole(reveal(part)), add_special_tokens=False).ids
      if found:
        before, start = found[0], found.end()
        ids.append(self.special_tokens[before])
    return ids

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
    return self._full.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def to_json(self) -> str:
    """The content of a tokenizer.json of Hugging Face."""
    return self._full.to_str()

  def offsets(self, text: str) -> list[tuple[int, int]]:
    """Start and end character in `text` of each token of `encode_plain(text)`.

    Tokens that share one character, as parts of an emoji, all span it. A character
    without a token (in SmolLM2 a few control characters, as in its published form) is
    left out of the ids, and the offsets after it in its word lie too early.
    """
    return self._plain.encode(_whole(text), add_special_tokens=False).offsets

  def fit(self, text: str, max_tokens: int) -> int:
    """How many leading characters of `text` take at most `max_tokens` tokens.

    `len(encode_plain(text[:fit(text, n)])) <= n` always holds. Text that stands
    around the cut can move a count by a token or two: count the whole chat again.
    """
    offsets = self.offsets(text)
    if len(offsets) <= max_tokens:
      return len(text)
    # The first token left out may begin inside a character that is half covered.
    end = offsets[max(max_tokens, 0)][0]
    # Without the text after it, the last piece may split otherwise (whitespace).
    while end and len(self.encode_plain(text[:end])) > max_tokens:
      end -= 1
    return end


def _texts(message: Mapping[str, Any]) -> list[str]:
  """All that a message says, in texts or in their parts."""
  found: list[str] = []
  _with_texts(message, lambda text: found.append(text) or text)
  return found


def _with_texts(message: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
  """The message with each of its texts changed; of a part, 'type' is the format's own."""

  def part(held: Mapping[str, str]) -> dict[str, str]:
    return {key: text if key == 'type' else change(text) for key, text in held.items()}

  return {
    key: [*map(part, value)] if isinstance(value, list) else change(value)
    for key, value in message.items()
  }


def _whole(text: str) -> str:
  """Half a surrogate pair, which JSON allows, is not text that can be encoded."""
  return _LONE_SURROGATE.sub('\ufffd', text)

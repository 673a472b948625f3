"""Generated token ids into text as it comes: whole characters, up to a stop string.

stream, until = TextStream(tokenizer), Until(['Question:'])
for token_id in ids:
  print(until.push(stream.push(token_id)), end='')
"""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
  """What turns token ids into text, as a `ChatTokenizer` does."""

  def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
  """Token ids into text, a piece as soon as its characters are whole."""

  def __init__(self, tokenizer: Decoder):
    """Starts empty."""
    self._tokenizer = tokenizer
    self._ids: list[int] = []
    self._pieces: list[str] = []
    # Tokens up to the second index are told. Those from the first on are decoded again with
    # what follows, since a tokenizer may treat what stands first otherwise.
    self._start = self._told = 0

  @property
  def text(self) -> str:
    """All text so far."""
    return ''.join(self._pieces) + self._untold()

  def push(self, token_id: int) -> str:
    """The text that this token completes, maybe none."""
    self._ids.append(token_id)
    piece = self._untold()
    # A character of several bytes may end in the next token.
    if not piece or piece.endswith('\ufffd'):
      return ''
    return self._tell(piece)

  def rest(self) -> str:
    """What is left at the end, broken characters included."""
    return self._tell(self._untold())

  def _untold(self) -> str:
    before = self._tokenizer.decode(self._ids[self._start : self._told])
    return self._tokenizer.decode(self._ids[self._start :])[len(before) :]

  def _tell(self, piece: str) -> str:
    if piece:
      self._start, self._told = self._told, len(self._ids)
      self._pieces.append(piece)
    return piece


class Until:
  """Pieces of text up to the first stop string, wherever pieces are cut.

  Attributes:
    met: whether a stop string has come; it and what follows are not told.
  """

  def __init__(self, stops: Sequence[str]):
    """Looks for any of `stops`; an empty one is none."""
    self._stops = [stop for stop in stops if stop]
    self._held = ''
    self.met = False

  def push(self, piece: str) -> str:
    """The text that is known to come before any stop string, maybe none."""
    if self.met:
      return ''
    held = self._held + piece
    found = [(held.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in held]
    if found:
      # The one that ends first, as if characters came one at a time.
      end, length = min(found)
      self.met, self._held = True, ''
      return held[: end + length]
    begun = max(
      (
        n
        for stop in self._stops
        for n in range(1, min(len(stop), len(held) + 1))
        if held.endswith(stop[:n])
      ),
      default=0,
    )
    told = len(held) - begun
    self._held = held[told:]
    return held[:told]

  def rest(self) -> str:
    """What was held back at the end, where no stop string came of it."""
    held, self._held = self._held, ''
    return held

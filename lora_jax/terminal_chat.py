"""The loop of a chat in a terminal or a pipe.

  /base and /adapter switch what answers, /reset forgets the turns, /exit leaves.

Ctrl-C stops an answer; where none is under way it leaves, as Ctrl-D does.
"""

import re
from collections.abc import Callable, Mapping

from lora_jax.chat import Chat, Voice
from lora_jax.errors import UserError

BASE, ADAPTER = 'base', 'adapter'
COMMANDS = '/base, /adapter, /reset, /exit'

# Whatever a model says, it may not drive the terminal.
_CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f]')


def talk(
  chat: Chat,
  voices: Mapping[str, Voice],
  ask: Callable[[], str],
  write: Callable[[str], object],
  note: Callable[[str], object],
) -> None:
  """Reads turns and answers them until there are no more.

  Args:
    chat: the conversation.
    voices: `BASE`, and `ADAPTER` where there is one, which then answers first.
    ask: gives the next line; raises EOFError at the end.
    write: takes text of answers as it comes.
    note: takes lines about the conversation.
  """
  name = ADAPTER if ADAPTER in voices else BASE
  while True:
    try:
      text = ask().strip()
    except EOFError:
      return
    if text == '/exit':
      return
    if text == '/reset':
      chat.reset()
      note('all turns are forgotten')
    elif text in ('/base', '/adapter'):
      if text[1:] in voices:
        name = text[1:]
        note(f'the {name} answers from here on')
      else:
        note('there is no adapter; start with --adapter=DIRECTORY')
    elif re.fullmatch(r'/\w+', text):
      note(f'unknown command {text}; there are {COMMANDS}')
    elif text:
      try:
        answer(chat, text, voices[name], write, note)
      except UserError as error:
        note(str(error))


def answer(
  chat: Chat,
  text: str,
  voice: Voice,
  write: Callable[[str], object],
  note: Callable[[str], object],
) -> None:
  """Writes the answer to one turn as it comes.

  Raises:
    UserError: as `Chat.ask`.
  """
  pieces = chat.ask(text, voice)
  try:
    for i, piece in enumerate(pieces):
      if i == 0 and chat.dropped:
        note(f'the oldest {chat.dropped} turns no longer fit and are forgotten')
      write(_CONTROL.sub('', piece))
    write('\n')
  except KeyboardInterrupt:
    write('\n')
    note('stopped; Ctrl-C again to leave')
  finally:
    pieces.close()

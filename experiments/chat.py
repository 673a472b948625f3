"""Talks to a base in the terminal, with an adapter or without.

  python -m experiments.chat --adapter=mine
  python -m experiments.chat --prompt="Which organ makes bile?" --temperature=0.7 --top_p=0.9
  echo "Which organ makes bile?" | python -m experiments.chat

/base and /adapter switch what answers in the middle of a chat, /reset forgets it, /exit or
Ctrl-D leaves; Ctrl-C stops an answer. Answers go to standard output, all else to stderr.
"""

import io
import math
import sys
from pathlib import Path

from absl import flags

from experiments import _flags, _launcher
from lora_jax.errors import UserError
from lora_jax.presets import Settings

_ADAPTER = flags.DEFINE_string('adapter', None, 'Directory of an adapter; none: the base alone.')
_PROMPT = flags.DEFINE_string('prompt', None, 'One turn to answer, instead of a conversation.')
_SYSTEM = flags.DEFINE_string('system', None, "The system turn; none: the template's own.")
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0: always the most likely token.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw among the likeliest tokens of this probability.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the draws.')
_CONTEXT = flags.DEFINE_integer('context', None, "Tokens of a chat; none: all the base's.")
_flags.define_base(Settings().base)
_flags.define_changes('max_new_tokens', of=Settings())


def main() -> None:
  """Checks everything that can be checked, then answers."""
  if not 0 <= _TEMPERATURE.value < math.inf:
    raise UserError(f'--temperature={_TEMPERATURE.value}: give a number from zero')
  if not 0 < _TOP_P.value <= 1:
    raise UserError(f'--top_p={_TOP_P.value}: give a share above 0, at most 1')
  _flags.check_seed(_SEED.value)
  if _CONTEXT.value is not None and _CONTEXT.value < 64:
    raise UserError(f'--context={_CONTEXT.value}: give at least 64 tokens')
  if _PROMPT.value is not None and not _PROMPT.value.strip():
    raise UserError('--prompt is empty; give a question')
  # They take seconds to import, and a mistake above should not.
  from lora_jax import chat, terminal_chat
  from lora_jax.hub import adapters, bases
  from lora_jax.sampling import Sampling

  _launcher.imported()
  settings = _flags.changed(Settings())
  bases.check_name(settings.base)
  directory = Path(_ADAPTER.value).expanduser() if _ADAPTER.value else None
  if directory is not None:
    adapters.check(directory)
  base = _flags.load_base(settings.base)
  adapter = None if directory is None else adapters.load(directory, base)
  model, params = _flags.put_on_device(base, settings.train)
  answerer = chat.Answerer(
    model,
    base.tokenizer,
    min(_CONTEXT.value or base.config.max_length, base.config.max_length),
    settings.eval.max_new_tokens,
    Sampling(_TEMPERATURE.value, _TOP_P.value, seed=_SEED.value),
  )
  voices = {terminal_chat.BASE: answerer.voice(params)}
  if adapter is not None:
    voices[terminal_chat.ADAPTER] = answerer.voice(adapters.attach(params, adapter))
  talk = chat.Chat(answerer, _SYSTEM.value)
  note = lambda line: print(f'({line})', file=sys.stderr, flush=True)
  write = lambda text: print(text, end='', flush=True)
  for stream in (sys.stdin, sys.stdout):
    # A test may have put something else in their place.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='replace')
  if _PROMPT.value is not None:
    *_, voice = voices.values()
    terminal_chat.answer(talk, _PROMPT.value, voice, write, note)
    return
  asked = ''
  if sys.stdin.isatty():
    # Gives the line that is typed a history and an editor.
    import readline as readline

    print(f'{terminal_chat.COMMANDS}; Ctrl-C stops an answer', file=sys.stderr)
    asked = '> '
  terminal_chat.talk(talk, voices, lambda: input(asked), write, note)
  if asked:
    print()


if __name__ == '__main__':
  _launcher.run(main)

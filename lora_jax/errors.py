"""Errors that are the user's to mend: one line that says what, where and what would work."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import NoReturn


class UserError(Exception):
  """A mistake in what the user gave. Its text is one line and names the remedy."""


def one_line(error: Exception) -> str:
  """What an error of another library says, in one line."""
  return ' '.join(str(error).split())


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
  """Turns what the user can mend into one line on stderr and exit code 2.

  That is a `UserError`, a file or path that the system refuses, and a device that has
  no memory left. Ctrl-C is 130 and a closed pipe 141, as in a shell. Launchers wrap
  their `main` in it; library code raises and never exits.
  """
  try:
    yield
  except UserError as error:
    _exit(str(error))
  except BrokenPipeError:
    # Who read our output has gone, as `head` does; the flush at exit must not say so again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      _exit(f'{error.strerror}; make room, the same command goes on from there')
    if error.filename is None:
      raise
    _exit(f'{error.filename}: {error.strerror}')
  except KeyboardInterrupt:
    print('\nstopped', file=sys.stderr)
    sys.exit(130)
  except Exception as error:
    # What `Path.expanduser` raises is no OSError.
    if isinstance(error, RuntimeError) and 'home directory' in str(error):
      _exit('a path begins with "~" and a name that has no home directory here; give it in full')
    # XLA's word; its own class would cost every launcher the import of JAX.
    if not isinstance(error, MemoryError) and 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    _exit(
      'out of memory; lower --tokens_per_batch, --batch_rows, --max_length or --rank, '
      'or train with --remat'
    )


def _exit(text: str) -> NoReturn:
  print(f'error: {text}', file=sys.stderr)
  sys.exit(2)

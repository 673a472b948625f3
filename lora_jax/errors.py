"""Errors that are the user's to mend: one line that says what, where and what would work."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
  """A mistake in what the user gave. Its text is one line and names the remedy."""


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
  """Turns a `UserError` into its one line on stderr and exit code 2.

  Launchers wrap their `main` in it; library code raises and never exits.
  """
  try:
    yield
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)

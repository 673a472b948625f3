"""What every launcher does around its `main`: flags in, mistakes out in one line.

if __name__ == '__main__':
  _launcher.run(main)
"""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from lora_jax.errors import UserError, exit_on_user_error


def run(main: Callable[[], None]) -> None:
  """Parses the flags and calls `main`; a user's mistake is one line and exit code 2."""

  def checked(argv: Sequence[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
      # Orbax and tensorflow-datasets tell every file they touch at absl's default level.
      logging.set_verbosity(logging.WARNING)
    with exit_on_user_error():
      if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}; settings are given as --name=value')
      main()

  app.run(checked, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    print(f'error: {" ".join(str(error).split())}; --help lists the flags', file=sys.stderr)
    sys.exit(2)

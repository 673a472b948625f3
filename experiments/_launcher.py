"""What every launcher does around its `main`: flags in, mistakes out in one line.

if __name__ == '__main__':
  _launcher.run(main)
"""

import contextlib
import importlib.metadata
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from absl import app, flags, logging

from lora_jax.errors import UserError, exit_on_user_error

# XLA ends the process at a flag it does not know, so only versions that were tried get it.
_TRIED_JAX = ((0, 10), (0, 12))
_WIDE_VECTORS = '--xla_cpu_prefer_vector_width=512'


# glibc, from 2.35: memory of its own in pages of 2 MB where the kernel has them.
_HUGE_PAGES = 'glibc.malloc.hugetlb=1'
_STARTED_AGAIN = 'LORA_JAX_STARTED_AGAIN'


def prefer_huge_pages() -> None:
  """Starts the process again with memory in large pages: a sixth off a training step.

  XLA asks for its temporaries anew at every step, and the system then hands out each
  page on first touch. glibc reads the setting only at the start of a process; what the
  user has set stays.
  """
  # Once at most, since a privileged Python is started without the setting; and never the
  # process of a notebook, which is not ours.
  tried = os.environ.pop(_STARTED_AGAIN, None)
  if tried or not sys.executable or 'ipykernel' in sys.modules:
    return
  held = os.environ.get('GLIBC_TUNABLES', '')
  if platform.libc_ver()[0] == 'glibc' and 'hugetlb' not in held:
    wanted = {'GLIBC_TUNABLES': f'{held}:{_HUGE_PAGES}'.lstrip(':'), _STARTED_AGAIN: '1'}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


def prefer_wide_vectors() -> None:
  """Lets XLA use the whole width of AVX-512 on a CPU: about a tenth off a training step.

  To be called before JAX computes anything; what the user has set stays.
  """
  version = tuple(int(part) for part in importlib.metadata.version('jax').split('.')[:2])
  held = os.environ.get('XLA_FLAGS', '')
  if _TRIED_JAX[0] <= version <= _TRIED_JAX[1] and 'prefer_vector_width' not in held:
    os.environ['XLA_FLAGS'] = f'{held} {_WIDE_VECTORS}'.strip()


def cpu_has_bfloat16(cpuinfo: Path = Path('/proc/cpuinfo')) -> bool:
  """Whether this CPU has instructions for bfloat16 products; without them they are emulated.

  Where nothing tells (not Linux), False: float32 is never much slower there.
  """
  try:
    words = cpuinfo.read_text().split()
  except OSError:
    return False
  # x86 and Arm name them so.
  return not {'avx512_bf16', 'amx_bf16', 'bf16'}.isdisjoint(words)


def run(main: Callable[..., None], arguments: bool = False) -> None:
  """Parses the flags and calls `main`; a user's mistake is one line and exit code 2.

  With `arguments`, `main` is called with those that are no flags; otherwise they are a
  mistake. Until `main` calls `imported`, Ctrl-C ends the process at once: libraries turn an
  interrupt during their import into errors of their own.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop_at_once)
  prefer_huge_pages()
  prefer_wide_vectors()

  def checked(argv: Sequence[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
      # Orbax and tensorflow-datasets tell every file they touch at absl's default level.
      logging.set_verbosity(logging.WARNING)
    with exit_on_user_error():
      if arguments:
        main(*argv[1:])
        return
      if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}; settings are given as --name=value')
      main()

  app.run(checked, flags_parser=_parse)


def imported() -> None:
  """Says that nothing heavy is left to import: Ctrl-C is a `KeyboardInterrupt` from here on."""
  if signal.getsignal(signal.SIGINT) is _stop_at_once:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def stop_on_interrupt(says: str) -> Iterator[Callable[[], bool]]:
  """Ctrl-C once asks the work to end where it suits it; twice ends it at once.

  Args:
    says: what stderr is told the first time.

  Yields:
    Whether it was pressed.
  """
  pressed = False

  def ask(signum: int, frame: FrameType | None) -> None:
    nonlocal pressed
    pressed = True
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.write(2, f'\n{says}; Ctrl-C again to leave at once\n'.encode())

  held = signal.getsignal(signal.SIGINT)
  if held is signal.default_int_handler:
    signal.signal(signal.SIGINT, ask)
  try:
    yield lambda: pressed
  finally:
    signal.signal(signal.SIGINT, held)


def _stop_at_once(signum: int, frame: FrameType | None) -> None:
  os.write(2, b'\nstopped\n')
  os._exit(130)


def _parse(argv: Sequence[str]) -> list[str]:
  # --help lists those of the main module alone, unless others are declared its own.
  for module, shared in flags.FLAGS.flags_by_module_dict().items():
    if module.startswith('experiments.'):
      for flag in shared:
        flags.FLAGS.register_key_flag_for_module(argv[0], flag)
  try:
    return flags.FLAGS(argv)
  except SystemExit:
    # absl has printed --help, and would end with 1.
    sys.exit(0)
  except flags.Error as error:
    print(f'error: {" ".join(str(error).split())}; --help lists the flags', file=sys.stderr)
    sys.exit(2)

"""Runs the project on this machine and sets up what it needs on first use.

  python3 launch/local.py ablate --targets=o_proj,fc2   the main job; any module of experiments/
  python3 launch/local.py test [pytest arguments]       the tests
  python3 launch/local.py python -m benchmarks.train    anything, in the environment of the tests

`--python=3.12` or `--python=/path/to/python`, before the command, overrides the choice
of interpreter.

Each Python version has its environment in `.venv/<version>/`, with a stamp that says
what was installed there; while the stamp holds, a command starts at once. Standard
library only, since this file runs before anything is installed. POSIX systems.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Best first. From 3.12 on pip finds a newer JAX, about twice as fast in bfloat16 on CPU.
RUN_VERSIONS = ('3.12', '3.13', '3.11')
# The references that some tests compare with install on 3.11 alone (see setup.py).
TEST_VERSIONS = ('3.11', '3.12', '3.13')

_PROBE = 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])'
_TAIL_LINES = 15

# A process for each core, since nearly all of a test's time is tracing, up to what memory
# holds; files stay whole, since their tests share what is compiled. A later `-n0` undoes it.
PARALLEL = ('-nlogical', '--maxprocesses=8', '--dist=loadfile')

# Runs a command with its output appended to a log and returns its exit status.
Runner = Callable[[Sequence[str], Path], int]


class LaunchError(Exception):
  """What the user can mend; the text is one line."""


@dataclasses.dataclass(frozen=True)
class Interpreter:
  """A Python that can make virtual environments: its version ('3.12') and real path."""

  version: str
  path: str


def candidates(version: str, environ: Mapping[str, str], running: str) -> list[str]:
  """Paths that may hold Python `version`, likeliest first: running, on PATH, pyenv's."""
  found = [running]
  for folder in environ.get('PATH', '').split(os.pathsep):
    path = shutil.which(f'python{version}', path=folder) if folder else None
    if path:
      found.append(path)
  pyenv = Path(environ.get('PYENV_ROOT') or Path.home() / '.pyenv')
  releases = [p for p in pyenv.glob(f'versions/{version}.*') if p.name.split('.')[2:3]]
  patch = lambda p: int(p.name.split('.')[2]) if p.name.split('.')[2].isdigit() else -1
  found += [str(p / 'bin' / 'python') for p in sorted(releases, key=patch, reverse=True)]
  return list(dict.fromkeys(found))


def probe(path: str) -> Interpreter | None:
  """Asks the Python at `path` what it is; None where it does not run.

  Being there is not enough: a version manager's shim may refuse to run, and a system
  Python may come without the modules that make environments.

  Raises:
    LaunchError: it runs, but cannot make a virtual environment.
  """
  try:
    done = subprocess.run(
      [path, '-c', _PROBE], capture_output=True, text=True, timeout=30, check=False
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  if done.returncode == 0:
    return Interpreter(done.stdout.strip(), os.path.realpath(path))
  if 'ensurepip' in done.stderr or "'venv'" in done.stderr:
    raise LaunchError(f'{path} cannot make environments (Debian, Ubuntu: apt install python3-venv)')
  return None


def find(
  version: str,
  paths: Iterable[str],
  ask: Callable[[str], Interpreter | None] = probe,
) -> Interpreter | LaunchError:
  """The first of `paths` that is a working Python `version`, or why there is none."""
  reason = LaunchError(f'no Python {version} here')
  for path in paths:
    try:
      found = ask(path)
    except LaunchError as error:
      reason = error
      continue
    if found and found.version == version:
      return found
  return reason


@dataclasses.dataclass(frozen=True)
class Environment:
  """One virtual environment of a checkout.

  Attributes:
    root: the checkout.
    version: of Python, '3.12'.
  """

  root: Path
  version: str

  @property
  def folder(self) -> Path:
    """Where it lies."""
    return self.root / '.venv' / self.version

  @property
  def python(self) -> Path:
    """Its interpreter."""
    return self.folder / 'bin' / 'python'

  @property
  def log(self) -> Path:
    """What `venv` and `pip` said when it was made."""
    return self.root / '.venv' / f'{self.version}.log'

  def stamp(self) -> dict:
    """What is installed, or {} where the environment is missing or half made."""
    try:
      stamp = json.loads((self.folder / 'stamp.json').read_text())
    except (OSError, ValueError):
      return {}
    # A moved checkout would still import the old place; a removed Python leaves a
    # dangling link.
    usable = stamp.get('root') == str(self.root) and self.python.exists()
    return stamp if usable else {}

  def is_ready(self, extras: Iterable[str], interpreter: Interpreter | None = None) -> bool:
    """Whether it holds what setup.py now asks for, with `extras`, by this interpreter."""
    stamp = self.stamp()
    return (
      stamp.get('setup') == _setup_hash(self.root)
      and set(extras) <= set(stamp['extras'])
      and (interpreter is None or stamp['interpreter'] == interpreter.path)
    )

  def make(self, interpreter: Interpreter, extras: Iterable[str], run: Runner) -> None:
    """Creates it or brings it up to date, once at a time among processes.

    Raises:
      LaunchError: `venv` or `pip` failed; the end of the log is printed.
    """
    self.folder.parent.mkdir(exist_ok=True)
    with self._locked():
      if self.is_ready(extras, interpreter):
        return
      start = time.monotonic()
      _say(f'setting up .venv/{self.version} (once; about a minute; log in {_near(self.log)})')
      self.log.write_text('')
      old = self.stamp()
      wanted = sorted({*extras, *old.get('extras', ())})
      setup = _setup_hash(self.root)
      if old.get('interpreter') == interpreter.path:
        # Until pip is through, this is a half-made environment.
        (self.folder / 'stamp.json').unlink()
      else:
        self._must([interpreter.path, '-m', 'venv', '--clear', str(self.folder)], run)
      what = str(self.root) + (f'[{",".join(wanted)}]' if wanted else '')
      pip = [str(self.python), '-m', 'pip', '--disable-pip-version-check', 'install', '--no-input']
      self._must([*pip, '--editable', what], run)
      stamp = {
        'setup': setup,
        'extras': wanted,
        'interpreter': interpreter.path,
        'root': str(self.root),
      }
      draft = self.folder / 'stamp.json.new'
      draft.write_text(json.dumps(stamp))
      draft.replace(self.folder / 'stamp.json')
      _say(f'ready in {time.monotonic() - start:.0f} s')

  def _must(self, command: Sequence[str], run: Runner) -> None:
    if run(command, self.log) == 0:
      return
    tail = self.log.read_text(errors='replace').splitlines()[-_TAIL_LINES:]
    if tail:
      print('\n'.join(tail), file=sys.stderr)
    tool = command[command.index('-m') + 1]
    raise LaunchError(
      f'{tool} failed while setting up .venv/{self.version}: see {_near(self.log)}, then run again'
    )

  @contextlib.contextmanager
  def _locked(self) -> Iterator[None]:
    # One lock for all versions, since pip writes the package's metadata into the checkout.
    with (self.root / '.venv' / 'lock').open('w') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        _say('waiting for another set-up in .venv')
        fcntl.flock(file, fcntl.LOCK_EX)
      yield


def environment(
  versions: Sequence[str],
  extras: Iterable[str] = (),
  root: Path = ROOT,
  search: Callable[[str], Interpreter | LaunchError] | None = None,
  run: Runner | None = None,
) -> Path:
  """The interpreter of an environment with the project in it, made if need be.

  Args:
    versions: Python versions, best first; or one path to an interpreter.
    extras: of setup.py.
    root: the checkout.
    search: finds the interpreter of a version; default: on this machine.
    run: runs `venv` and `pip`; default: as child processes.

  Raises:
    LaunchError: no such Python, or it could not be set up.
  """
  search = search or _search
  run = run or _run_logged
  extras = tuple(extras)
  if len(versions) == 1 and os.sep in versions[0]:
    interpreter = probe(versions[0])
    if interpreter is None:
      raise LaunchError(f'--python={versions[0]} does not run')
    if interpreter.version not in RUN_VERSIONS:
      raise LaunchError(f'{versions[0]} is Python {interpreter.version}; {_needs()}')
    env = Environment(root, interpreter.version)
    if not env.is_ready(extras, interpreter):
      env.make(interpreter, extras, run)
    return env.python
  reasons = []
  for version in versions:
    if version not in RUN_VERSIONS:
      raise LaunchError(f'--python={version}: {_needs()}, or the path of one')
    env = Environment(root, version)
    if env.is_ready(extras):
      return env.python
    found = search(version)
    if isinstance(found, Interpreter):
      env.make(found, extras, run)
      return env.python
    reasons.append(str(found))
  raise LaunchError(f'{_needs()}: {"; ".join(reasons)}')


def available(versions: Sequence[str] = RUN_VERSIONS) -> list[str]:
  """Those of `versions` that this machine has, in the order given."""
  return [v for v in versions if isinstance(_search(v), Interpreter)]


def commands(root: Path = ROOT) -> list[str]:
  """The names that may stand as command: the modules of experiments/ and two more."""
  modules = (path.stem for path in (root / 'experiments').glob('*.py'))
  return [*sorted(name for name in modules if not name.startswith('_')), 'test', 'python']


def plan(arguments: Sequence[str], root: Path = ROOT) -> tuple[Sequence[str], tuple, list[str]]:
  """Reads the command line.

  Returns:
    the Python versions to try, the extras to install, and what to give the interpreter.

  Raises:
    LaunchError: no command, or an unknown one.
  """
  chosen, rest = None, list(arguments)
  while rest and rest[0].startswith('-'):
    option, _, value = rest.pop(0).partition('=')
    if option != '--python' or not value:
      raise LaunchError(
        f'unknown option {option}; --python=VERSION_OR_PATH goes before the command'
      )
    chosen = (value,)
  if not rest:
    raise LaunchError(f'no command given; one of: {", ".join(commands(root))}')
  command, rest = rest[0], rest[1:]
  if command not in commands(root):
    raise LaunchError(f'unknown command {command!r}; one of: {", ".join(commands(root))}')
  if command == 'python':
    return chosen or TEST_VERSIONS, ('test',), rest
  if command == 'test':
    return chosen or TEST_VERSIONS, ('test',), ['-m', 'pytest', *PARALLEL, *rest]
  extras = ('serve',) if command == 'serve' else ()
  return chosen or RUN_VERSIONS, extras, ['-m', f'experiments.{command}', *rest]


def main(arguments: Sequence[str]) -> None:
  """Sets up, then becomes the command. Returns only by an exit."""
  if list(arguments[:1]) in (['-h'], ['--help']):
    print(__doc__)
    sys.exit(0)
  try:
    versions, extras, rest = plan(arguments)
    python = environment(versions, extras)
  except LaunchError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    _say('stopped; the next run sets up afresh')
    sys.exit(130)
  if rest[:2] == ['-m', 'pytest']:
    # Test paths are named from the root, as is their configuration; for everything
    # else a relative path means what it means to the user's shell.
    os.chdir(ROOT)
  os.execv(python, [str(python), *rest])


def _search(version: str) -> Interpreter | LaunchError:
  return find(version, candidates(version, os.environ, sys.executable))


def _run_logged(command: Sequence[str], log: Path) -> int:
  with log.open('a') as file:
    return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def _setup_hash(root: Path) -> str:
  return hashlib.sha256((root / 'setup.py').read_bytes()).hexdigest()


def _needs() -> str:
  return f'needs a Python of {", ".join(sorted(RUN_VERSIONS))}'


def _near(path: Path) -> str:
  return os.path.relpath(path)


def _say(text: str) -> None:
  print(f'launch: {text}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])

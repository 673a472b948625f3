"""What a result was made with: this project, what it stands on, and what computed."""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import lora_jax

_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets', 'numpy')

_ROOT = Path(__file__).resolve().parent.parent


def versions() -> dict[str, str]:
  """Versions of what a result depends on; 'commit' where this project runs from a checkout."""
  own, at = {'lora_jax': lora_jax.__version__}, commit()
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {
    **own,
    **({'commit': at} if at else {}),
    'python': platform.python_version(),
    **device(),
    **found,
  }


def device() -> dict[str, str]:
  """'device': the kind of what computes; 'processor': which one, of a CPU, whose kind is 'cpu'.

  'mesh': how many devices share the work, by axis, where they do.
  """
  import jax  # readers of records do without

  from lora_jax import sharding

  kind, mesh = {'device': jax.devices()[0].device_kind}, sharding.current()
  if mesh is not None:
    kind['mesh'] = ','.join(f'{axis}={size}' for axis, size in mesh.shape.items())
  return {**kind, 'processor': processor()} if jax.default_backend() == 'cpu' else kind


def processor(cpuinfo: Path = Path('/proc/cpuinfo')) -> str:
  """Model of this machine's CPU, and how many of its cores this process may use."""
  try:
    found = re.search(r'^model name\s*:\s*(\S.*)$', cpuinfo.read_text(), re.MULTILINE)
  except OSError:
    found = None
  # Arm's kernels name no model there.
  name = found[1].strip() if found else platform.processor() or platform.machine()
  usable = getattr(os, 'sched_getaffinity', None)
  cores = len(usable(0)) if usable else os.cpu_count() or 1
  return f'{name}, {cores} core' + ('' if cores == 1 else 's')


@functools.cache
def commit(root: Path = _ROOT) -> str | None:
  """The commit that a checkout is at, with '-dirty' where its files are not as committed.

  None where `root` is no checkout, or git is missing or refuses.
  """
  # Without it, git would find a repository that holds an installed package by chance.
  if not (root / '.git').exists():
    return None
  command = ['git', '--no-optional-locks', '-C', str(root), 'describe', '--always', '--dirty']
  command += ['--abbrev=12', '--exclude=*']
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip() or None

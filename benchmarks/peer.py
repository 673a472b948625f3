"""Trains adapters with a peer, in the peer's own environment and process.

batches = pad([(tokens, completion), ...], rows_per_batch=8, pad_id=0)
record = run_peft(weights, batches, dtype='bfloat16', modules=('o_proj',), rank=8, steps=20)
record['real_tokens_per_second'], record['peak_bytes']
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import batches as batching
from benchmarks import side
from experiments import _flags
from launch import local
from lora_jax.errors import UserError
from lora_jax.targets import FUSED

# The versions that `benchmarks/tunix_peer.py` was written for.
_TUNIX = ('google-tunix==0.1.7', 'qwix==0.1.8')


def python() -> Path:
  """The interpreter of the environment that has PEFT, made on first use.

  Raises:
    UserError: this machine has no Python for it, or it could not be installed.
  """
  try:
    return local.environment(('3.11',), ('test',))
  except local.LaunchError as error:
    raise UserError(f'the PEFT peer: {error}') from error


def tunix_python(root: Path = local.ROOT) -> Path:
  """The interpreter of `.venv/tunix`, made on first use from the Python that runs this.

  An environment of its own, since Tunix brings a hundred packages.

  Raises:
    UserError: it could not be installed.
  """
  folder, log = root / '.venv' / 'tunix', root / '.venv' / 'tunix.log'
  interpreter, stamp = folder / 'bin' / 'python', folder / 'stamp.json'
  wanted = json.dumps([*_TUNIX, sys.version])
  if stamp.is_file() and stamp.read_text() == wanted:
    return interpreter
  folder.parent.mkdir(exist_ok=True)
  print(f'setting up {folder} (once; about a minute; log in {log})', file=sys.stderr)
  with log.open('w') as file:
    for command in (
      [sys.executable, '-m', 'venv', '--clear', str(folder)],
      [str(interpreter), '-m', 'pip', 'install', '--no-input', *_TUNIX],
    ):
      done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
      if done.returncode != 0:
        raise UserError(f'Tunix could not be installed: see {log}, or leave tunix out of --peers')
  stamp.write_text(wanted)
  return interpreter


def check_targets(targets: Sequence[str]) -> None:
  """Raises `UserError` for a set that matches nothing, or that peers have no modules for."""
  _flags.check_targets(targets)
  for names in targets:
    fused = sorted({*names.split(',')} & {*FUSED})
    if fused:
      apart = ','.join(FUSED[fused[0]])
      raise UserError(f'--targets={names}: peers have no {fused[0]}; give {apart}')


def run_peft(
  weights: Path,
  batches: Sequence[batching.PaddedBatch],
  dtype: str,
  modules: Sequence[str],
  rank: int,
  steps: int,
  compiled: bool = False,
) -> dict[str, Any]:
  """Trains adapters with PEFT and transformers.

  Args:
    weights: the base, a directory in Hugging Face's layout.
    batches: gone round as often as the steps need.
    dtype: of the base and its activations, 'float32' or 'bfloat16'; PEFT keeps the
      adapters float32.
    modules: names of the modules to adapt, such as 'o_proj'.
    rank: R.
    steps: timed steps, after some that are not.
    compiled: whether the peer compiles its model.

  Returns:
    The record that `benchmarks/peft_peer.py` writes.

  Raises:
    UserError: the peer could not be installed, or failed.
  """
  extra = ['--compile'] if compiled else []
  return _run(python(), 'peft_peer', 'PEFT', weights, batches, dtype, modules, rank, steps, extra)


def run_tunix(
  weights: Path,
  batches: Sequence[batching.PaddedBatch],
  dtype: str,
  modules: Sequence[str],
  rank: int,
  steps: int,
) -> dict[str, Any]:
  """Trains adapters with Tunix and qwix; arguments, result and errors as of `run_peft`."""
  interpreter = tunix_python()
  return _run(interpreter, 'tunix_peer', 'Tunix', weights, batches, dtype, modules, rank, steps)


def check_compiler() -> None:
  """Raises `UserError` where torch.compile would find no C++ compiler."""
  if not any(shutil.which(name) for name in ('g++', 'clang++', 'c++')):
    raise UserError(
      '--peer_compile needs a C++ compiler, and none is on PATH (Debian, Ubuntu: apt install g++)'
    )


def _run(
  interpreter, script, who, weights, batches, dtype, modules, rank, steps, extra=()
) -> dict[str, Any]:
  with tempfile.TemporaryDirectory() as folder:
    work = Path(folder)
    batching.write_padded(work / 'batches.npz', batches)
    command = [
      *(str(interpreter), '-m', f'benchmarks.{script}'),
      f'--weights={weights}',
      f'--dtype={dtype}',
      f'--targets={",".join(modules)}',
      f'--rank={rank}',
      f'--batches={work / "batches.npz"}',
      f'--steps={steps}',
      f'--out={work / "record.json"}',
      *extra,
    ]
    return side.run(command, work / 'record.json', f'the {who} peer')

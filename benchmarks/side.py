"""Runs one side of a comparison in a process of its own and returns the record it left."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import local
from lora_jax.errors import UserError


def check_json(path: str | None) -> None:
  """Raises `UserError` where records could not be kept: to be known before minutes of runs."""
  if not path:
    return
  file = Path(path)
  if file.is_dir() or not file.parent.is_dir():
    raise UserError(f'--json={path}: give a file in a directory that is there')
  if not os.access(file if file.exists() else file.parent, os.W_OK):
    raise UserError(f'--json={path}: it is not yours to write; give another file')


def run(
  command: Sequence[str], record: Path, who: str, environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
  """Runs a command from the checkout's root, so that `-m benchmarks.X` works in any Python.

  Args:
    command: the interpreter and what to give it; paths in it are absolute.
    record: the JSON file that it writes.
    who: name of the side, for an error.
    environ: added to the environment.

  Raises:
    UserError: it failed; what it said is on stderr.
  """
  done = subprocess.run(
    command,
    capture_output=True,
    text=True,
    check=False,
    cwd=local.ROOT,
    env=os.environ | (environ or {}),
  )
  if done.returncode != 0:
    print(done.stderr, file=sys.stderr)
    raise UserError(f'{who} ended with exit code {done.returncode}; what it said is above')
  return json.loads(record.read_text())


def check_alike(ours: Mapping[str, Any], theirs: Mapping[str, Any], who: str) -> None:
  """Raises `UserError` where two sides ran on other kinds of device: no ratio would mean a thing.

  Args:
    ours: a record with 'where': 'device' or 'host'.
    theirs: another one.
    who: name of the other side.
  """
  if ours['where'] != theirs['where']:
    on = {'device': 'an accelerator', 'host': 'the CPU'}
    raise UserError(
      f'our side ran on {on[ours["where"]]} and {who} on {on[theirs["where"]]}, which is no '
      'comparison; give both a JAX and a torch for the same device'
    )

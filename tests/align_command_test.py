"""The command that aligns a tower, as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.hub import bases

ROOT = Path(__file__).resolve().parent.parent


def align(*arguments):
  command = [sys.executable, '-m', 'experiments.align_vision', *arguments]
  return subprocess.run(
    command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300
  )  # fmt: skip


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((), 'error: give --out=DIRECTORY'),
    (('--out=x', '--steps=1,2'), 'error: --steps=1,2: give 3 numbers from 0, for read, speak'),
    (('--out=x', '--rows=1,0,1'), 'error: --rows=1,0,1: give 3 numbers from 1'),
    (('--out=x', '--steps=0,0,0'), 'error: --steps leaves out all stages'),
    (('--out=x', '--lr=1e-3,nan,1'), 'error: --lr=1e-3,nan,1: give 3 numbers'),
  ],
)
def test_a_mistake_is_one_line(arguments, message):
  run = align(*arguments)
  assert run.returncode == 2
  assert run.stderr.startswith(message)
  assert run.stderr.count('\n') == 1


@pytest.mark.slow
def test_a_tower_is_aligned_and_is_a_base(tmp_path):
  settings = ('--base=tiny', f'--cache={tmp_path / "cache"}', f'--out={tmp_path / "run"}')
  settings += ('--steps=2,0,0', '--rows=2,1,1', '--seed=3')
  run = align(*settings)
  assert run.returncode == 0, run.stderr
  assert run.stdout.startswith('read: known/characters')
  assert 'known/loss' in run.stdout
  where = next(line for line in run.stdout.splitlines() if line.startswith('base: '))
  base = bases.load(where.removeprefix('base: '))
  assert base.config.vision.embeddings(base.images.tile) == 81
  # What is done is not done again.
  again = align(*settings)
  assert again.returncode == 0, again.stderr
  assert again.stdout == run.stdout
  other = align(*settings[:-1], '--seed=4')
  assert other.returncode == 2
  assert 'says another recipe' in other.stderr

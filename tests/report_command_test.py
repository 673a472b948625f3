"""`python -m experiments.report` as a user runs it: from records alone, or one line and exit 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from planted_run import plant, plant_latency, start
from report_test import section

from lora_jax.report import report

ROOT = Path(__file__).resolve().parent.parent
FILES = ('report.md', 'report.html', 'results.json', 'accuracy_decode.svg')


def command(*arguments):
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': '7'}
  return subprocess.run(
    [sys.executable, '-m', 'experiments.report', *map(str, arguments)],
    capture_output=True, text=True, cwd=ROOT, check=False, timeout=300, env=environment,
  )  # fmt: skip


@pytest.fixture
def run(tmp_path):
  run = start(tmp_path / 'one')
  for dataset in ('medmcqa', 'cocohd'):
    plant(run, dataset, 'base', [0.1 * i for i in range(9)])
    for seed in (0, 1):
      plant(run, dataset, 'o_proj', [0.1 * (i + seed % 2) for i in range(9)], seed)
  plant_latency(run, o_proj=1.1)
  return run


def test_a_report_is_rebuilt_byte_for_byte(run):
  report.write(run)
  before = {name: (run.path / name).read_bytes() for name in FILES}
  for name in FILES:
    (run.path / name).unlink()
  held = command(run.path)
  assert held.returncode == 0, held.stderr
  assert held.stderr == ''
  assert 'MedMCQA' in held.stdout
  assert held.stdout.splitlines()[-1].endswith(str(run.path / 'report.md'))
  assert {name: (run.path / name).read_bytes() for name in FILES} == before


def test_several_runs_are_compared(run, tmp_path):
  other = start(tmp_path / 'two')
  plant(other, 'medmcqa', 'base', [0, 1, 1])
  held = command(run.path, other.path, f'--out={tmp_path / "both"}')
  assert held.returncode == 0, held.stderr
  for path in (run.path / 'report.html', other.path / 'report.md', tmp_path / 'both'):
    assert path.exists()
  assert {file.name for file in (tmp_path / 'both').iterdir()} >= {
    'comparison.html',
    'comparison.md',
  }


def test_runs_that_are_called_alike_are_both_compared(tmp_path):
  paths = [tmp_path / one / 'quick' for one in ('a', 'b')]
  for path, rows in zip(paths, ([0, 1, 1], [1, 0, 0]), strict=True):
    plant(start(path), 'medmcqa', 'base', rows)
  held = command(*paths, f'--out={tmp_path / "both"}')
  assert held.returncode == 0, held.stderr
  text = (tmp_path / 'both' / 'comparison.md').read_text()
  rows = section(text, 'MedMCQA')
  names = [f'`smollm2-135m-instruct, {path}`' for path in paths]
  assert [rows['`base`'][name][:4] for name in names] == ['66.7', '33.3']


@pytest.mark.parametrize(
  ('make', 'says'),
  [
    (lambda path: [], 'give the directory of a run'),
    (lambda path: [path / 'nowhere'], 'nowhere: there is no such directory'),
    (lambda path: [path], 'holds no finished cells'),
  ],
)
def test_a_mistake_is_one_line(tmp_path, make, says):
  held = command(*make(tmp_path))
  assert held.returncode == 2
  assert held.stdout == ''
  assert held.stderr.count('\n') == 1
  assert says in held.stderr
  assert not [*tmp_path.iterdir()]


def test_reading_records_needs_no_jax():
  code = (
    'import sys, lora_jax.report.report, lora_jax.report.comparison; '
    'sys.exit(any(name in sys.modules for name in ("jax", "flax", "scipy")))'
  )
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  held = subprocess.run([sys.executable, '-c', code], check=False, env=environment, timeout=300)
  assert held.returncode == 0

"""The launcher as a user meets it: a process, its exit code, and what it leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lora_jax import checkpoint
from lora_jax.hub import bases, peft

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ('--preset=smoke', '--targets=o_proj,fc2', '--steps=2', '--test_rows=2')


def command(*arguments):
  return [sys.executable, '-m', 'experiments.ablate', *arguments]


def ablate(*arguments):
  return subprocess.run(
    command(*arguments), capture_output=True, text=True, cwd=ROOT, check=False, timeout=300
  )


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """One small run over two datasets and the one that needs vision."""
  out = tmp_path_factory.mktemp('run') / 'out'
  arguments = (*SMOKE, '--datasets=medmcqa,cocohd,llava_cot', f'--out={out}')
  return out, arguments, ablate(*arguments)


def test_a_run_leaves_a_report_and_names_it(finished):
  out, _, done = finished
  assert done.returncode == 0, done.stderr
  assert str(out / 'report.md') in done.stdout.splitlines()[-1]
  # Standard output is for what was asked for.
  assert 'base tiny: ' in done.stderr
  assert 'base tiny: ' not in done.stdout
  results = json.loads((out / 'results.json').read_text())
  assert {'medmcqa', 'cocohd'} <= set(json.dumps(results).replace('"', ' ').split())
  report = (out / 'report.md').read_text()
  assert 'MedMCQA' in report
  assert 'needs vision' in report
  assert 'synthetic' in report


def test_records_hold_configuration_scores_and_versions(finished):
  out, _, _ = finished
  record = json.loads((out / 'cells' / 'cocohd-o_proj,fc2-equal_rank-seed0.json').read_text())
  assert record['status'] == 'done'
  assert record['settings']['train']['steps'] == len(record['train']['losses']) == 2
  assert len(record['scores']['rows']) == 2
  assert record['lora']['modules'] == ['layers/attn/o_proj', 'layers/mlp/down_proj']
  assert record['versions']['jax']
  assert (out / 'cells' / 'cocohd-o_proj,fc2-equal_rank-seed0.adapter').is_dir()
  seeing = json.loads((out / 'cells' / 'llava_cot-base.json').read_text())
  assert seeing['status'] == 'needs vision'


def test_finished_cells_are_skipped_and_the_report_is_the_same(finished):
  out, arguments, _ = finished
  cells = {path: path.stat().st_mtime_ns for path in (out / 'cells').glob('*.json')}
  report = (out / 'report.md').read_bytes()
  again = ablate(*arguments)
  assert again.returncode == 0, again.stderr
  assert {path: path.stat().st_mtime_ns for path in (out / 'cells').glob('*.json')} == cells
  assert (out / 'report.md').read_bytes() == report
  assert 'train medmcqa' not in again.stderr


def test_cells_train_together_and_programs_are_counted(tmp_path):
  more = ('--targets=qkv', '--seeds=0,1', '--pack=2', '--datasets=medmcqa')
  done = ablate(*SMOKE, *more, f'--out={tmp_path / "out"}')
  assert done.returncode == 0, done.stderr
  assert 'train medmcqa, cells 1-2 of 4: 2/2' in done.stderr
  assert 'train medmcqa, cells 3-4 of 4: 2/2' in done.stderr
  assert 'training and scoring: ' in done.stderr
  assert ' programs compiled in ' in done.stderr
  files = sorted((tmp_path / 'out' / 'cells').glob('*-seed?.json'))
  records = [json.loads(file.read_text()) for file in files]
  assert [record['train']['cells'] for record in records] == [2] * 4
  assert len({tuple(record['train']['losses']) for record in records}) == 4
  for file, record in zip(files, records, strict=True):
    held = checkpoint.load(file.with_suffix('.adapter'))['layers']
    named = {f'layers/{block}/{module}' for block in held for module in held[block]}
    assert named == {*record['lora']['modules']}


@pytest.mark.slow
def test_a_quantised_base_is_measured_and_recorded(tmp_path):
  done = ablate(*SMOKE, '--quantize=nf4', '--datasets=medmcqa', f'--out={tmp_path / "out"}')
  assert done.returncode == 0, done.stderr
  assert 'nf4: 14 kernels, ' in done.stderr
  record = json.loads(
    (tmp_path / 'out' / 'cells' / 'medmcqa-o_proj,fc2-equal_rank-seed0.json').read_text()
  )
  assert record['status'] == 'done'
  assert record['settings']['train']['quantize'] == 'nf4'
  assert 'stored as nf4' in (tmp_path / 'out' / 'report.md').read_text()


def test_times_of_batches_join_the_report(finished, tmp_path):
  run = shutil.copytree(finished[0], tmp_path / 'run', ignore=shutil.ignore_patterns('.lock'))
  small = ('--targets=o_proj,fc2', '--rows=2', '--adapters=1,2', '--turns=1', '--prompt_tokens=4')

  def latency(*arguments):
    return subprocess.run(
      [sys.executable, '-m', 'experiments.latency', *small, *arguments, f'--out={run}'],
      capture_output=True, text=True, cwd=ROOT, check=False, timeout=300,
    )  # fmt: skip

  done = latency()
  assert done.returncode == 0, done.stderr
  about = json.loads((run / 'batches.json').read_text())['about']
  # The study's, not the launcher's own.
  assert (about['base'], about['rank']) == ('tiny', 4)
  assert 'In a batch: 2 rows, 2 adapters' in (run / 'report.md').read_text()
  for arguments, says in (('--rank=3',), 'adapters'), (('--base=smollm2-135m-instruct',), 'tiny'):
    other = latency(*arguments)
    assert (other.returncode, other.stderr.count('\n')) == (2, 1)
    assert says in other.stderr


def test_a_probe_joins_the_report(finished, tmp_path):
  run = shutil.copytree(finished[0], tmp_path / 'run', ignore=shutil.ignore_patterns('.lock'))

  def probe(*arguments):
    return subprocess.run(
      [sys.executable, '-m', 'experiments.probe', '--batches=4', *arguments, f'--out={run}'],
      capture_output=True, text=True, cwd=ROOT, check=False, timeout=300,
    )  # fmt: skip

  done = probe()
  assert done.returncode == 0, done.stderr
  assert 'llava_cot: left out' in done.stderr
  held = json.loads((run / 'probe.json').read_text())
  # The study's, not the launcher's own.
  assert (held['about']['base'], held['about']['lora']['rank']) == ('tiny', 4)
  assert {*held['datasets']} == {'medmcqa', 'cocohd'}
  assert {'o_proj,fc2', 'all'} <= {*held['sets']}
  report = (run / 'report.md').read_text()
  assert '## Probe' in report
  # One set was trained, so there is nothing to be right about.
  assert 'It cannot be told: no two sets are in both.' in report
  for arguments, says in (('--rank=3',), 'its own'), (('--base=smollm2-135m-instruct',), 'tiny'):
    other = probe(*arguments)
    assert other.returncode == 2
    assert says in other.stderr.splitlines()[-1]


def export(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.export', *arguments],
    capture_output=True, text=True, cwd=ROOT, check=False, timeout=300,
  )  # fmt: skip


def test_a_cells_adapter_is_exported_as_it_was_trained(finished, tmp_path):
  out, _, _ = finished
  cell = out / 'cells' / 'cocohd-o_proj,fc2-equal_rank-seed0.adapter'
  done = export(f'--adapter={cell}', f'--out={tmp_path / "adapter"}')
  assert done.returncode == 0, done.stderr
  assert str(tmp_path / 'adapter') in done.stdout.splitlines()[-1]
  settings = json.loads(cell.with_suffix('.json').read_text())['settings']
  exported = peft.load(tmp_path / 'adapter', bases.load('tiny').params)
  scale = settings['lora']['alpha'] / settings['lora']['rank']
  for path, scales in exported.scales().items():
    assert (scales == scale).all()
    block, module = path.split('/')[1:]
    for leaf, value in checkpoint.load(cell)['layers'][block][module].items():
      np.testing.assert_array_equal(value, exported.params['layers'][block][module][leaf])


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    ([], '--adapter='),
    (['--adapter=nowhere.adapter', '--out=x'], 'no adapter in nowhere.adapter'),
    (['--adapter=tests', '--out=x'], 'no adapter in tests'),
  ],
)
def test_a_mistake_in_an_export_is_one_line(arguments, says):
  done = export(*arguments)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert says in done.stderr


def test_other_settings_in_the_same_directory_are_refused(finished):
  out, arguments, _ = finished
  done = ablate(*arguments, '--rank=2')
  assert done.returncode == 2
  assert str(out) in done.stderr
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['--targets=banana'], ["'banana'", 'qkv, o_proj, fc1, fc2, all']),
    (['--targets=o_proj', '--targets=fc2,banana'], ["'banana'"]),
    (['--targets=o_proj['], ["'o_proj['"]),
    (['--datasets='], ['no dataset given', 'medmcqa']),
    (['--base='], ["''", 'smollm2-135m-instruct']),
    (['--targets=a{99999999999999999999}'], ['a{99999999999999999999}']),
    (['--datasets=medmca'], ["'medmca'", 'medmcqa']),
    (['--data=/no/such/place'], ['/no/such/place']),
    (['--base=gpt'], ["'gpt'", 'smollm2-135m-instruct']),
    (['--base=missing.gguf'], ['missing.gguf']),
    (['--preset=huge'], ['huge', 'quick']),
    (['--rank=0'], ['--rank=0']),
    (['--learning_rates=1e-4'], ['--learning_rates=1e-4', '1e-4,5e-4']),
    (['--learning_rates=1e-4,-1'], ['--learning_rates=1e-4,-1', 'above zero']),
    (['--learning_rates=1e-4,1e-3', '--lr=1e-3'], ['--lr', '--learning_rates']),
    (['--learning_rates=1e-4,1e-3', '--eval_rows=0'], ['--eval_rows=0', '--learning_rates']),
    (['--arms=equal_parameters'], ['--arms=equal_parameters', 'equal_rank,equal_parameters']),
    (['--arms=equal_rank,equal'], ['--arms=equal_rank,equal', 'equal_rank,equal_parameters']),
    (
      ['--arms=equal_rank,equal_parameters', '--rank_pattern=fc2=8'],
      ['--rank_pattern', '--arms=equal_parameters'],
    ),
    (['--dropout=1'], ['--dropout=1', 'below 1']),
    (['--rank_pattern=o_proj'], ['--rank_pattern=o_proj', 'o_proj=8']),
    (['--rank_pattern=o_proj=1.5'], ['--rank_pattern=o_proj=1.5']),
    (['--alpha_pattern=o_proj=-1'], ['o_proj=-1']),
    (['--layers=first'], ["'first'", '0-7,12']),
    (['--init=olora'], ['olora', 'pissa']),
    (['--targets=qkv_proj,q_proj'], ['q_proj twice']),
    (['--lr=nan'], ['--lr=nan']),
    (['--eval_rows=0', '--patience=2'], ['--eval_rows=0', '--patience']),
    (['--seeds=one'], ['--seeds=one']),
    (['--seeds='], ['--seeds=', '0,1,2']),
    (['--seeds=0,4294967296'], ['--seeds=4294967296', 'from 0 to 4294967295']),
    (['--out=/dev/null/x'], ['/dev/null/x']),
    (['--no_such_flag'], ['no_such_flag']),
    (['o_proj'], ["'o_proj'"]),
  ],
)
def test_a_mistake_is_one_line_and_comes_first(arguments, says, tmp_path):
  cache = tmp_path / 'cache'
  done = ablate(f'--out={tmp_path / "out"}', f'--cache={cache}', *arguments)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert done.stderr.startswith('error: ')
  for text in says:
    assert text in done.stderr
  assert not cache.exists(), 'something was downloaded or prepared before the check'


def test_a_row_without_a_field_names_file_and_line(tmp_path):
  folder = tmp_path / 'medmcqa'
  folder.mkdir()
  row = {'question': 'Which?', 'opa': 'a', 'opb': 'b', 'opc': 'c', 'opd': 'd', 'cop': 1}
  broken = {key: value for key, value in row.items() if key != 'cop'}
  (folder / 'train.jsonl').write_text(json.dumps(row) + '\n' + json.dumps(broken) + '\n')
  (folder / 'test.jsonl').write_text(json.dumps(row) + '\n')
  done = ablate('--preset=smoke', f'--data={tmp_path}', '--datasets=medmcqa')
  assert done.returncode == 2, done.stderr
  assert 'train.jsonl:2' in done.stderr
  assert 'cop' in done.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_finished_cells_and_the_run_goes_on(tmp_path):
  out = tmp_path / 'out'
  arguments = (*SMOKE, '--datasets=medmcqa,invoice_ocr', f'--out={out}')
  # A shell starts background jobs with interrupts ignored, and children inherit that.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  process = subprocess.Popen(
    command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  )
  signal.signal(signal.SIGINT, before)
  first = out / 'cells' / 'medmcqa-base.json'
  deadline = time.monotonic() + 240
  while not first.exists() and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGINT)
  _, said = process.communicate(timeout=120)
  assert process.returncode == 130, said
  assert '--pack=1' in said.splitlines()[-1]
  assert 'Traceback' not in said
  kept = first.stat().st_mtime_ns
  whole = ablate(*arguments)
  assert whole.returncode == 0, whole.stderr
  assert first.stat().st_mtime_ns == kept
  assert len(list((out / 'cells').glob('*.json'))) == 4

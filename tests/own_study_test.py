"""A study of a user's own file, from the command to the report."""

import json

import pytest
from ablate_test import ablate
from own_rows_test import many, row, write
from report_test import section

SMOKE = ('--preset=smoke', '--targets=o_proj', '--steps=2', '--train_rows=0', '--test_rows=0')
ARMS = '--arms=equal_rank,equal_parameters'


@pytest.mark.slow
def test_an_own_file_gets_the_same_report(tmp_path):
  data, out = write(tmp_path / 'sums.jsonl', many(80)), tmp_path / 'out'
  arguments = (*SMOKE, ARMS, f'--data={data}', f'--out={out}', f'--cache={tmp_path / "cache"}')
  done = ablate(*arguments, '--metric=numeric')
  assert done.returncode == 0, done.stderr
  record = json.loads((out / 'cells' / 'own-o_proj-equal_rank-seed0.json').read_text())
  held = record['rows']
  assert held['train'] + held['eval'] + held['test'] + held['left_out'] == 80
  assert record['scores']['headline'] == 'accuracy'
  assert len(record['scores']['rows']) == held['test'] >= 8
  # Ids are lines of the file, and no text of it is in a record.
  assert {int(one['id']) for one in record['scores']['rows']} <= {*range(1, 81)}
  assert 'what is' not in json.dumps(record)
  other = json.loads((out / 'cells' / 'own-o_proj-equal_parameters-seed0.json').read_text())
  assert other['settings']['lora']['rank'] == 32
  sizes = 'at equal parameters, 4,096 trainable: o_proj rank 32 with 4,096 (+0.0 %)'
  assert sizes in ' '.join(done.stdout.split())
  text = (out / 'report.md').read_text()
  assert '\n## At equal parameters\n' in text
  assert next(iter(section(text, 'Scores'))) == 'sums'
  assert f'sums.jsonl, {80 - held["test"]} train; {held["test"]} test, held out of' in text
  assert str(tmp_path) not in text
  assert 'compared by numeric' in text
  lacks = section(text, 'Which modules')['accuracy']['what it lacks']
  assert 'more datasets' not in lacks
  again = ablate(*arguments, '--metric=exact')
  assert again.returncode == 2
  assert len(again.stderr.splitlines()) == 1
  assert '--out' in again.stderr


@pytest.mark.parametrize(
  ('rows', 'arguments', 'says'),
  [
    (many(80), [], ['--metric', 'exact', 'numeric']),
    (many(80), ['--metric=exact', '--datasets=medmcqa'], ['--datasets', 'of its own']),
    (many(80), ['--metric=exact', '--choices=A,B'], ['--choices', '--metric=choice']),
    (many(80), ['--metric=choice'], ['80 different answers']),
    ([*many(80), row('x?', 'none')], ['--metric=numeric'], ['my.jsonl:81', 'no number']),
  ],
)
def test_a_mistake_is_one_line_and_comes_first(tmp_path, rows, arguments, says):
  data, cache = write(tmp_path / 'my.jsonl', rows), tmp_path / 'cache'
  done = ablate(f'--data={data}', f'--out={tmp_path / "out"}', f'--cache={cache}', *arguments)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1, done.stderr
  for text in says:
    assert text in done.stderr
  assert not cache.exists()


@pytest.mark.parametrize('flag', ['--metric=exact', '--test_data=x.jsonl', '--choices=A,B'])
def test_flags_of_own_rows_want_a_file(flag):
  done = ablate(flag)
  assert done.returncode == 2
  assert '--data=FILE.jsonl' in done.stderr

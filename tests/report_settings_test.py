"""The report states how a run came about: its settings, its base, its rows."""

import json
import re

from planted_run import plant, plant_latency, plant_status, start, written
from report_test import section

from lora_jax.data.tasks import TASKS
from lora_jax.records import Cell, write_json


def test_settings_of_no_preset_are_not_called_one(tmp_path):
  run = start(tmp_path, steps=17)
  plant(run, 'medmcqa', 'base', [0, 1])
  text, held, _ = written(run)
  assert 'preset `' not in text
  assert held['preset'] is None
  assert 'stored as' not in text


def test_a_quantised_base_is_said(tmp_path):
  run = start(tmp_path, quantize='nf4')
  plant(run, 'medmcqa', 'base', [0, 1])
  text, held, _ = written(run)
  assert 'bfloat16, kernels stored as nf4;' in text
  assert held['preset'] is None


def test_an_early_end_and_the_best_adapter_are_said(tmp_path):
  run = start(tmp_path, patience=3, keep_best=True)
  plant(run, 'medmcqa', 'base', [0, 1])
  text, _, _ = written(run)
  assert 'ended after 3 evaluations in a row without a lower validation loss' in text
  assert 'with the adapter of the lowest validation loss;' in text


def test_scores_that_mean_little_are_told_so(tmp_path):
  run = start(tmp_path, base='tiny', data='synthetic')
  plant(run, 'medmcqa', 'base', [0, 1])
  file = run.cell_file(Cell('tiny', 'medmcqa', 'base', '', 0))
  record = json.loads(file.read_text())
  record['base']['name'] = 'tiny'
  record['rows']['source'] = 'synthetic'
  write_json(file, record)
  text, held, said = written(run)
  for told in (text, said, str(held['warnings'])):
    assert 'random weights' in told
    assert 'nothing of the real datasets' in told
  assert 'Only the base was run.' in text


def test_what_it_ran_on_is_said_where_records_say_it(tmp_path):
  run = start(tmp_path)
  plant(run, 'medmcqa', 'base', [0, 1])
  plant(run, 'medmcqa', 'o_proj', [0, 1])
  plant_latency(run, o_proj=1.1)
  text, _, _ = written(run)
  assert ' on cpu in bfloat16.' in text
  assert 'device cpu; jax 0.12.0; python 3.12.1.' in text
  # Cells that a later version adds to such a run say more.
  file = run.cell_file(Cell('smollm2-135m-instruct', 'medmcqa', 'o_proj', 'equal_rank', 0))
  record = json.loads(file.read_text())
  record['versions'] |= {'commit': '12ab', 'processor': 'EPYC, 2 cores'}
  write_json(file, record)
  run.write_latency({**(run.latency() or {}), 'processor': 'EPYC, 2 cores'})
  text, held, _ = written(run)
  assert ' on cpu (EPYC, 2 cores) in bfloat16.' in text
  assert 'python 3.12.1; commit 12ab; processor EPYC, 2 cores.' in text
  assert held['versions']['processor'] == ['EPYC, 2 cores']


def test_what_is_known_of_a_datasets_rows_beside_their_numbers_is_said(tmp_path):
  run = start(tmp_path)
  plant(run, 'medmcqa', 'base', [0, 1])
  before = '- MedMCQA: Posed plainly.\n'
  assert before in written(run)[0]
  file = run.cell_file(Cell('smollm2-135m-instruct', 'medmcqa', 'base', '', 0))
  record = json.loads(file.read_text())
  record['rows'] |= {'in_test': 0}
  write_json(file, record)
  assert before in written(run)[0]
  record['rows'] |= {'in_test': 3}
  write_json(file, record)
  says = 'Left out of training, since test rows ask the same: 3 rows.'
  assert f'- MedMCQA: Posed plainly. {says}\n' in written(run)[0]
  record['rows'] |= {'in_test': 0, 'test_of': 2}
  write_json(file, record)
  assert before in written(run)[0]
  record['rows'] |= {'test_of': 4183}
  write_json(file, record)
  says = 'Scored are the first 2 of 4,183 test rows, in their order;'
  assert f'- MedMCQA: Posed plainly. {says} standard errors take them' in written(run)[0]


def test_what_did_not_happen_is_not_told(tmp_path):
  run = start(tmp_path)
  plant(run, 'medmcqa', 'base', [0, 1])
  unread = {'source': 'x', 'description': 'synthetic rows, seed 0, 512 train, 12 test', 'note': ''}
  plant_status(run, 'llava_cot', 'base', 'needs vision', rows=unread)
  text, held, _ = written(run)
  rows = section(text, 'Rows and tasks')
  assert rows['LLaVA-CoT']['source'] == 'synthetic rows, seed 0'
  assert rows['MedMCQA']['source'].endswith(', 300 train, 120 test')
  assert (rows['LLaVA-CoT']['answer limit'], rows['MedMCQA']['answer limit']) == ('-', '160')
  assert held['datasets']['llava_cot']['rows']['description'] == 'synthetic rows, seed 0'
  # What holds in a run is for its report to say.
  assert not [name for name, task in TASKS.items() if re.search(r'\d tokens', task.note)]


def test_no_path_of_the_machine_gets_in(tmp_path):
  base = '/home/someone/models/llama.gguf'
  run = start(tmp_path, base=base, data='/home/someone/my, data')
  plant(
    run,
    'medmcqa',
    'base',
    [0, 1],
    description='directory /home/someone/my, data/medmcqa, 300 train, 120 test',
  )
  file = run.cell_file(Cell(base, 'medmcqa', 'base', '', 0))
  record = json.loads(file.read_text())
  record['base']['name'] = base
  write_json(file, record)
  text, held, _ = written(run)
  assert 'someone' not in text + json.dumps(held)
  assert 'llama.gguf' in text
  assert 'directory my, data/medmcqa, 300 train, 120 test' in text


def test_learning_rates_are_told_with_what_they_were_chosen_by(tmp_path):
  run = start(tmp_path)
  plant(run, 'medmcqa', 'base', [0, 1])
  before, held, _ = written(run)
  assert 'peak rate of 0.0005 for A' in before
  assert 'rates' not in held
  plant(run, 'medmcqa', 'o_proj', [0, 1])
  file = run.cell_file(Cell('', 'medmcqa', 'o_proj', 'equal_rank', 0))
  tried = {'tried': [[1e-4, 2.5], [1e-3, None]], 'seed': 0, 'chosen': 1e-4}
  write_json(file, {**json.loads(file.read_text()), 'rates': tried})
  shared = json.loads((run.path / 'run.json').read_text())
  shared['shared']['learning_rates'] = [1e-4, 1e-3]
  write_json(run.path / 'run.json', shared)
  text, held, _ = written(run)
  assert 'peak rate of whichever of 0.0001, 0.001 has the lowest validation loss' in text
  assert held['rates'] == {'medmcqa': {'o_proj': tried}}
  row = section(text, 'Learning rates')['MedMCQA']
  assert row == {'dataset': 'MedMCQA', '`o_proj`': '0.0001 (0.0001: 2.500, 0.001: diverged)'}

"""The report states what the records say: each number, each status, and nothing else."""

import itertools
import math
import random
import xml.etree.ElementTree

import pytest
from planted_run import HEADLINES, plant, plant_latency, plant_status, start, written

from lora_jax.errors import UserError
from lora_jax.presets import ARTICLE_TARGETS, PRESETS
from lora_jax.records import RunDirectory
from lora_jax.report import report, tables

DRAWINGS = ('accuracy_prefill.svg', 'accuracy_decode.svg', 'difficulty_spread.svg')


def section(text, title):
  """Column -> cell of each row of a section's first table, by the row's first cell."""
  lines = text.split(f'\n## {title}\n')[1].split('\n## ')[0].splitlines()
  start = next(i for i, line in enumerate(lines) if line[:1] == '|')
  lines = [*itertools.takewhile(lambda line: line[:1] == '|', lines[start:])]
  header, _, *rows = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in lines]
  assert all(line.endswith('|') for line in lines)
  assert all(len(row) == len(header) for row in rows)
  return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


@pytest.fixture
def run(tmp_path):
  """Two configurations on a dataset, with round numbers."""
  run = start(tmp_path / 'run')
  plant(run, 'medmcqa', 'base', [0, 0, 1, 1])
  plant(run, 'medmcqa', 'o_proj', [0, 1, 1, 1])
  plant(run, 'medmcqa', 'qkv', [1, 0, 0, 0])
  return run


def test_scores_and_differences_are_those_of_the_rows(run):
  text, held, said = written(run)
  # sd of (0, 0, 1, 1) is sqrt(1/3): 100 sqrt(1/3) / 2 = 28.9; three to one: 25.
  assert section(text, 'Scores')['MedMCQA'] == {
    'dataset': 'MedMCQA',
    'score': '`accuracy`',
    'rows': '4',
    'base': '50.0 (0.0 to 100.0)',
    '`qkv`': '25.0 (0.0 to 82.7)',
    '`o_proj`': '**75.0** (17.3 to 100.0)',
  }
  # Row by row o_proj gains 0 1 0 0, and qkv gains 1 0 -1 -1.
  differences = section(text, 'Differences to the base')['MedMCQA']
  assert differences['`o_proj`'].startswith('+25.0 (')
  assert differences['`qkv`'].startswith('-25.0 (')
  # Of four rows nothing can be told.
  assert {cell[-1] for cell in (differences['`o_proj`'], differences['`qkv`'])} == {'≈'}
  entry = held['datasets']['medmcqa']['configurations']['qkv']
  gaps = [1, 0, -1, -1]
  by_hand = math.sqrt(sum((gap + 0.25) ** 2 for gap in gaps) / 3 / 4)
  assert entry['difference'] == pytest.approx(-25)
  assert entry['difference_se'] == pytest.approx(100 * by_hand)
  assert (entry['rows'], entry['status'], entry['seed_means']) == (4, 'done', {'0': 25.0})
  assert '75.0 ±25.0*' in said
  assert said.endswith(f'{run.path / "report.html"} and {run.path / "report.md"}')


def test_the_best_follows_the_records(run):
  plant(run, 'medmcqa', 'o_proj', [1, 0, 0, 0])
  plant(run, 'medmcqa', 'qkv', [0, 1, 1, 1])
  cells = section(written(run)[0], 'Scores')['MedMCQA']
  assert [name for name, cell in cells.items() if '**' in cell] == ['`qkv`']
  for targets in ('base', 'o_proj', 'qkv'):
    plant(run, 'medmcqa', targets, [1, 0, 0, 1])
  assert '**' not in str(section(written(run)[0], 'Scores'))


def test_a_difference_beyond_the_noise_is_marked(tmp_path):
  run = start(tmp_path)
  random_rows = random.Random(0)
  base = [random_rows.random() / 2 for _ in range(40)]
  shifted = lambda by: [score + by + random_rows.random() / 50 for score in base]
  plant(run, 'medmcqa', 'base', base)
  plant(run, 'medmcqa', 'o_proj', shifted(0.1))
  plant(run, 'medmcqa', 'qkv', shifted(-0.1))
  plant(run, 'medmcqa', 'fc1', [*base[1:], base[0]])
  text, held, _ = written(run)
  cells = section(text, 'Differences to the base')['MedMCQA']
  assert [cells[name][-1] for name in ('`qkv`', '`o_proj`', '`fc1`')] == ['▼', '▲', '≈']
  sides = {(c['first'], c['second']): c for c in held['datasets']['medmcqa']['comparisons']}
  assert len(sides) == 6
  assert sides['base', 'qkv']['beyond_noise'] == 1
  assert sides['base', 'o_proj']['beyond_noise'] == -1
  assert sides['base', 'fc1']['beyond_noise'] == 0
  robust = section(text, 'Robustness')
  assert robust['`qkv`']['failures'] == '1'
  assert robust['`qkv`']['worst to base'].endswith('(MedMCQA)')
  assert (robust['`o_proj`']['above base'], robust['`o_proj`']['best on']) == ('1', '1')
  assert (robust['`o_proj`']['wins'], robust['`qkv`']['losses']) == ('3', '3')
  assert robust['`o_proj`']['mean rank'] == '1.0'


def test_a_difference_that_rounds_to_zero_has_no_sign():
  assert tables.spread(-0.04, -0.2, 0.04) == '+0.0 (-0.2 to +0.0)'


def test_seeds_are_averaged_row_by_row_before_the_error(tmp_path):
  run = start(tmp_path)
  plant(run, 'medmcqa', 'base', [0, 0, 1, 1])
  plant(run, 'medmcqa', 'o_proj', [0, 1, 1, 1], seed=0)
  plant(run, 'medmcqa', 'o_proj', [1, 0, 1, 1], seed=10)
  plant(run, 'medmcqa', 'o_proj', [0, 0, 1, 1], seed=2)
  text, held, _ = written(run)
  entry = held['datasets']['medmcqa']['configurations']['o_proj']
  by_row = [100 / 3, 100 / 3, 100, 100]
  mean = sum(by_row) / 4
  assert entry['mean'] == pytest.approx(mean)
  assert entry['se'] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in by_row) / 12))
  gaps = [100 / 3, 100 / 3, 0, 0]
  mean = sum(gaps) / 4
  assert entry['difference_se'] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in gaps) / 12))
  # By number, where a file listing has 10 before 2.
  assert section(text, 'Each seed')['MedMCQA']['`o_proj`'] == '75.0, 50.0, 75.0'
  assert '3 seeds (0, 2, 10)' in text
  assert 'intervals of 95 % over test rows and seeds' in text
  assert 'what another training run would give is not known' not in text


def test_statuses_stand_where_scores_would(run):
  plant(run, 'cocohd', 'base', [0.25, 0.5])
  plant_status(run, 'cocohd', 'o_proj', 'diverged', why='5 updates in a row were not finite')
  for targets in ('base', 'o_proj', 'qkv'):
    plant_status(run, 'llava_cot', targets, 'needs vision')
  text, held, said = written(run)
  scores = section(text, 'Scores')
  assert list(scores) == ['MedMCQA', 'CoCoHD', 'LLaVA-CoT', 'average of 1']
  assert scores['CoCoHD']['`o_proj`'] == 'diverged'
  assert scores['CoCoHD']['`qkv`'] == '-'
  assert scores['LLaVA-CoT']['`qkv`'] == 'needs vision'
  assert '- CoCoHD, `o_proj`, seed 0: diverged (5 updates in a row were not finite).' in text
  assert 'LLaVA-CoT was not run: its task needs the image' in text
  # Only MedMCQA has every configuration.
  assert scores['average of 1']['`qkv`'] == scores['MedMCQA']['`qkv`']
  assert held['average']['datasets'] == ['medmcqa']
  statuses = held['datasets']['cocohd']['configurations']
  assert [statuses[key]['status'] for key in ('base', 'o_proj', 'qkv')] == [
    'done',
    'diverged',
    'missing',
  ]
  assert statuses['qkv']['mean'] is None
  assert 'diverged' in said
  assert 'needs vision: LLaVA-CoT' in said


def test_a_seed_that_diverged_is_told_and_is_no_winner(run):
  plant_status(run, 'medmcqa', 'o_proj', 'diverged', seed=1, why='not finite')
  plant(run, 'medmcqa', 'o_proj', [0, 1, 1, 1], seed=10)
  text, held, said = written(run)
  cells = section(text, 'Scores')['MedMCQA']
  assert cells['`o_proj`'].startswith('75.0 (')
  assert cells['`o_proj`'].endswith('(1 of 3 seeds diverged)')
  assert section(text, 'Each seed')['MedMCQA']['`o_proj`'] == '75.0, diverged, 75.0'
  assert '75.0 ±25.0†' in said
  assert '† without the seeds that diverged' in said
  assert cells['base'].startswith('**50.0** (')
  assert 'average of' not in text
  assert section(text, 'Which modules')['accuracy']['targets'] == '-'
  assert held['average']['configurations'] == {}


def test_datasets_count_alike_in_the_average(run):
  plant(run, 'cocohd', 'base', [0.0, 0.5])
  plant(run, 'cocohd', 'o_proj', [0.5, 0.9])
  plant(run, 'cocohd', 'qkv', [0.1, 0.2])
  text, held, _ = written(run)
  average = held['average']['configurations']['o_proj']
  assert average['mean'] == pytest.approx((75 + 70) / 2)
  assert average['se'] == pytest.approx(math.hypot(25, 20) / 2)
  assert average['difference'] == pytest.approx((25 + 45) / 2)
  # CoCoHD rows gain 50 and 40: a standard error of 5.
  assert average['difference_se'] == pytest.approx(math.hypot(25, 5) / 2)
  assert section(text, 'Scores')['average of 2']['`o_proj`'].startswith('**72.5** (')
  average = section(text, 'Differences to the base')['average of 2']['`o_proj`']
  assert average.startswith('+35.0 (')


def test_columns_have_the_articles_order_and_others_follow(tmp_path):
  run = start(tmp_path)
  others = ['.*/q_proj', 'down_proj']
  for targets in random.Random(0).sample(['base', *ARTICLE_TARGETS, *others], 11):
    plant(run, 'medmcqa', targets, [0, 1])
  text, held, _ = written(run)
  assert held['order']['configurations'] == ['base', *ARTICLE_TARGETS, *others]
  columns = list(section(text, 'Scores')['MedMCQA'])
  assert columns[3:] == ['base', *(f'`{name}`' for name in (*ARTICLE_TARGETS, *others))]


def test_costs_latency_and_other_scores(run):
  plant(run, 'cocohd', 'base', [0.25, 0.5], unfinished=2, others={'valid_json': 0.5})
  plant(run, 'cocohd', 'o_proj', [0.5, 0.5], unfinished=0, others={'valid_json': 1.0})
  plant_latency(run, o_proj=1.08, fc2=1.2)
  text, held, _ = written(run)
  # 4 steps of 2000 tokens: three of them in 25 - 5 seconds.
  assert section(text, 'Size and training')['`o_proj`'] == {
    'targets': '`o_proj`',
    'modules': 'o_proj',
    'trainable parameters': '1,234,567',
    'adapter MiB': '1.50',
    'tokens/s': '300',
    's a run': '25.0',
  }
  latency = section(text, 'Latency')
  assert list(latency) == ['`base`', '`o_proj`', '`fc2`']
  assert latency['`o_proj`']['prefill ms'] == '270'
  assert latency['`o_proj`']['decoded token ms'] == '13.5'
  assert latency['`o_proj`']['ratio to base'] == '1.08 (1.07 to 1.10)'
  other = section(text, 'Other scores')['CoCoHD']
  assert (other['score'], other['base'], other['`o_proj`']) == ('`valid_json`', '50.0', '100.0')
  assert other['`qkv`'] == '-'
  assert 'CoCoHD, answers stopped by the token limit before their end: `base` 2 of 2.' in text
  cell = held['datasets']['cocohd']['configurations']['o_proj']
  assert (cell['trainable_params'], cell['adapter_bytes']) == (1_234_567, 1_572_864)
  assert (cell['prefill_ratio'], cell['decode_ratio']) == (1.08, 1.08)
  assert cell['other_scores'] == {'valid_json': 100.0}


def test_what_was_run_is_said(run):
  text, held, _ = written(run)
  quick = PRESETS['quick'].train
  for fact in (
    '`smollm2-135m-instruct`',
    'dequantised Q4_1',
    '`b179c9523d0e`',
    'rank 16',
    'alpha 32',
    '0.0005',
    '4 times that for B',
    f'{quick.steps} steps of {quick.tokens_per_batch:,} tokens',
    '512 tokens',
    f'at most {PRESETS["quick"].eval.max_new_tokens} tokens.',
    'bfloat16',
    '1 seed (0)',
    'preset `quick`',
    'the files in the directory `../rows`',
    'jax 0.12.0',
    'device cpu',
  ):
    assert fact in text
  rows = section(text, 'Rows and tasks')['MedMCQA']
  assert (rows['trained on'], rows['validation'], rows['scored']) == ('292', '8', '4')
  assert rows['batch'] == '4 × 512'
  assert '- MedMCQA: Posed plainly.' in text
  assert 'Note:' not in text
  assert held['preset'] == 'quick'


def test_rows_that_the_base_lacks_are_left_out_of_the_difference(run):
  plant(run, 'medmcqa', 'o_proj', [0, 1, 1, 1, 1, 1])
  text, held, _ = written(run)
  entry = held['datasets']['medmcqa']['configurations']['o_proj']
  assert (entry['rows'], entry['paired_rows']) == (6, 4)
  assert entry['difference'] == pytest.approx(25)
  assert "only 4 of its 6 test rows are the base's" in text


def test_a_single_row_has_no_error(tmp_path):
  run = start(tmp_path)
  plant(run, 'medmcqa', 'base', [0])
  plant(run, 'medmcqa', 'o_proj', [1])
  text, held, _ = written(run)
  assert section(text, 'Scores')['MedMCQA']['`o_proj`'] == '**100.0**'
  assert section(text, 'Differences to the base')['MedMCQA']['`o_proj`'] == '+100.0 ≈'
  assert held['average']['configurations']['o_proj']['se'] is None


def test_same_records_give_same_bytes(tmp_path):
  files = ('report.md', 'report.html', 'results.json', *DRAWINGS)
  cells = [
    (dataset, targets, [(i * 7 + j) % 10 / 10 for j in range(11)], seed)
    for dataset in HEADLINES
    for i, targets in enumerate(('base', 'o_proj', 'o_proj,fc2'))
    for seed in ((0,) if targets == 'base' else (0, 1, 2))
  ]
  found = []
  for order in range(3):
    run = start(tmp_path / str(order))
    for dataset, targets, rows, seed in random.Random(order).sample(cells, len(cells)):
      plant(run, dataset, targets, rows, seed)
    plant_latency(run, **{'o_proj': 1.05, 'o_proj,fc2': 1.11})
    for _ in range(2):
      report.write(run)
      found.append([(run.path / file).read_bytes() for file in files])
  assert all(bytes_ == found[0] for bytes_ in found)


def test_latency_is_drawn_where_it_was_measured(run):
  assert 'Accuracy against latency' not in written(run)[0]
  plant_latency(run, o_proj=1.1, qkv=1.05)
  text = written(run)[0]
  for drawing in DRAWINGS[:2]:
    assert f']({drawing})' in text
    root = xml.etree.ElementTree.fromstring((run.path / drawing).read_text())
    assert root.tag == '{http://www.w3.org/2000/svg}svg'
    assert {'base', 'o_proj', 'qkv'} <= {element.text for element in root.iter()}
  (run.path / 'latency.json').unlink()
  assert 'Accuracy against latency' not in written(run)[0]
  assert not (run.path / DRAWINGS[0]).exists()


def test_the_recommendation_follows_the_records(tmp_path):
  run = start(tmp_path)
  for dataset in HEADLINES:
    rows = [i % 7 / 10 for i in range(40)]
    plant(run, dataset, 'base', rows)
    for targets, gain in (('o_proj', 0.1), ('qkv', 0.05), ('all', 0.3)):
      plant(run, dataset, targets, [score + gain for score in rows])
  plant_latency(run, o_proj=1.2, qkv=1.05, all=1.3)
  text, held, _ = written(run)
  cards = section(text, 'Which modules')
  assert {want: card['targets'] for want, card in cards.items()} == {
    'accuracy': '`all`',
    'balance': '`all`',
    'lowest latency': '`qkv`',
    'hard tasks': '`all`',
  }
  assert 'a second seed' in cards['accuracy']['what it lacks']
  assert 'more datasets than 3' in cards['accuracy']['what it lacks']
  assert next(card['choice'] for card in held['recommendations']) == '`all`'
  for dataset in HEADLINES:
    for targets in ('o_proj', 'qkv', 'all'):
      plant(run, dataset, targets, [0.0] * 40)
  cards = section(written(run)[0], 'Which modules')
  assert {card['targets'] for card in cards.values()} == {'base'}
  (run.path / 'latency.json').unlink()
  plant(run, 'medmcqa', 'o_proj', [1.0] * 40)
  plant(run, 'cocohd', 'o_proj', [1.0] * 40)
  cards = section(written(run)[0], 'Which modules')
  assert cards['lowest latency']['targets'] == '`o_proj`'
  assert 'latency was not measured' in cards['lowest latency']['what it lacks']


def test_difficulty_and_noise_are_told(tmp_path):
  run = start(tmp_path)
  for dataset, level in (('medmcqa', 0.5), ('cocohd', 0.1)):
    plant(run, dataset, 'base', [level] * 4)
    for seed in (0, 1):
      plant(run, dataset, 'o_proj', [level + 0.1] * 4, seed)
      plant(run, dataset, 'all', [level + 0.2] * 4, seed)
  text = written(run)[0]
  wide = section(text, 'Difficulty against spread')
  assert wide['CoCoHD']['base'] == '10.0'
  assert wide['CoCoHD']['highest'] == '30.0 (`all`)'
  assert wide['CoCoHD']['spread'].startswith('10.0')
  assert '](difficulty_spread.svg)' in text
  noise = section(text, 'Noise')['MedMCQA']
  assert (noise['target sets'], noise['rest']) == ('7.1 (100 %)', '0.0 (0 %)')


def test_names_with_special_characters_break_no_table_or_plot(run):
  name = '.*(q_proj|[o]_proj)$'
  plant(run, 'medmcqa', name, [0, 1, 1, 1])
  plant_latency(run, **{name: 1.1})
  text, _, said = written(run)
  assert '`.*(q_proj\\|[o]_proj)$`' in section(text, 'Scores')['MedMCQA']
  # A narrow column cuts a long name, and loses nothing of it.
  assert '.*(q_proj|[' in said
  assert 'o]_proj)$' in said


def test_nothing_to_report_is_a_users_mistake(tmp_path):
  with pytest.raises(UserError, match='no finished cells'):
    report.write(RunDirectory(tmp_path / 'nowhere'))
  run = start(tmp_path)
  with pytest.raises(UserError, match='no finished cells'):
    report.write(run)
  plant(run, 'medmcqa', 'base', [0, 1])
  (run.path / 'latency.json').write_text('{')
  with pytest.raises(UserError, match=r'latency\.json is not a readable record'):
    report.write(run)

"""Arms stand beside each other in a report, and neither changes what is said of the other."""

import json
import shutil

import numpy as np
import pytest
from planted_run import plant, plant_latency, plant_status, start, written
from report_test import section

from lora_jax.records import RunDirectory
from lora_jax.report import comparison, results, statistics, terminal

DATASETS = ('fincot', 'medmcqa', 'cocohd')
ARM = 'equal_parameters'
LIFTS = {'qkv': 2, 'o_proj': 5, 'fc1': 8, 'fc2': 11, 'all': 14}
RANKS = {'qkv': 60, 'o_proj': 141, 'fc1': 38, 'fc2': 77, 'all': 16}


def rows(lift, seed):
  random = np.random.default_rng(seed)
  return [float(x) / 100 for x in 40 + lift + 8 * np.sin(np.arange(30)) + random.normal(0, 0.3, 30)]


def sized(targets, **other):
  return {'rank': RANKS[targets], 'budget': 1_222_344, 'miss': 0.01, 'most_rank': 192, **other}


@pytest.fixture
def run(tmp_path, monkeypatch):
  """The arm of equal rank, whose scores grow with the size of a set."""
  monkeypatch.setattr(statistics, 'DRAWS', 400)
  run = start(tmp_path / 'run')
  for dataset in DATASETS:
    plant(run, dataset, 'base', rows(0, 0))
    for i, (targets, lift) in enumerate(LIFTS.items()):
      plant(run, dataset, targets, rows(lift, i + 1))
  plant_latency(run, **dict.fromkeys(LIFTS, 1.1))
  return run


def plant_arm(run, lifts):
  for dataset in DATASETS:
    for i, (targets, lift) in enumerate(lifts.items()):
      plant(run, dataset, targets, rows(lift, 50 + i), arm=ARM, size=sized(targets))


def reversed_lifts():
  return dict(zip(LIFTS, reversed(LIFTS.values()), strict=True))


def test_an_arm_changes_nothing_that_is_said_of_equal_rank(run):
  before, held, said = written(run)
  plant_arm(run, reversed_lifts())
  text, more, told = written(run)
  assert more.pop('arms').keys() == {ARM}
  assert more['claims'].pop(ARM) != more['claims']['equal_rank'] == held['claims']['equal_rank']
  assert {**more, 'claims': 0} == {**held, 'claims': 0}
  for title in ('Which modules', 'Scores', 'Differences to the base', 'Robustness', 'Noise'):
    assert section(text, title) == section(before, title)
  assert told.startswith(said.split('scores 0 to 100')[0])


def test_the_ranking_survives_where_the_records_say_so(run):
  plant_arm(run, LIFTS)
  text, held, _ = written(run)
  found = held['arms'][ARM]['rank_correlation']
  assert found['low'] > 0.5
  assert (found['sets'], found['datasets'], found['best']) == (5, 3, ['all', 'all'])
  assert 'survive at equal parameters?** Yes: ' in text
  assert '; highest in both: `all`.' in text
  plant_arm(run, reversed_lifts())
  text, held, _ = written(run)
  assert held['arms'][ARM]['rank_correlation']['high'] < -0.5
  assert 'survive at equal parameters?** No: ' in text
  assert '; highest at equal rank: `all`, here: `qkv`.' in text
  for dataset in DATASETS:
    for targets in LIFTS:
      plant(run, dataset, targets, rows(5, 50), arm=ARM, size=sized(targets))
  text, _, _ = written(run)
  assert '** It cannot be told from noise: ' in text
  assert '; highest at equal rank: `all`, here: none.' in text


def test_ranks_sizes_and_both_averages_stand_in_one_row(run):
  plant_arm(run, reversed_lifts())
  times = json.loads((run.path / 'latency.json').read_text())
  faster = {name: {**held, 'decode_ratio': 1.3} for name, held in times['targets'].items()}
  run.write_latency({**times, 'arms': {ARM: faster}})
  text, held, _ = written(run)
  row = section(text, 'At equal parameters')['`o_proj`']
  assert [row[name] for name in ('rank', 'trainable parameters', 'off the budget')] == [
    '141', '1,234,567', '+1.0 %',
  ]  # fmt: skip
  mean = lambda d: d['average']['configurations']['o_proj']['mean']
  assert row['average: equal rank'] == f'{mean(held):.1f}'
  gained = mean(held['arms'][ARM]) - mean(held)
  assert row['change'].startswith(f'{gained:+.1f} (')
  assert row['decoded token: equal rank'] == '1.10'
  assert row['decoded token: here'] == '1.30'
  assert held['latency']['targets']['o_proj']['decode_ratio'] == 1.1
  assert held['arms'][ARM]['sizes']['o_proj'] == sized('o_proj')


def test_a_budget_that_cannot_be_met_is_told(run):
  plant_arm(run, LIFTS)
  assert 'where the budget is' not in written(run)[0]
  plant(run, 'cocohd', 'qkv', rows(2, 9), arm=ARM, size=sized('qkv', miss=-0.38, rank=192))
  text, held, said = written(run)
  for told in (text, said, ' '.join(held['warnings'])):
    assert 'where the budget is 1,222,344 (-38 %): rank 192 is the smallest side' in told


def test_what_failed_in_the_arm_is_told(run):
  plant_arm(run, LIFTS)
  plant_status(run, 'cocohd', 'fc1', 'diverged', arm=ARM, why='not finite')
  text, held, _ = written(run)
  assert '- CoCoHD, `fc1`, seed 0: diverged (not finite).' in text
  assert held['average']['datasets'] == list(DATASETS)
  assert held['arms'][ARM]['average']['datasets'] == ['fincot', 'medmcqa']
  assert held['arms'][ARM]['rank_correlation']['datasets'] == 2


def test_two_sets_are_not_ranked(run):
  for targets in ('qkv', 'o_proj'):
    plant(run, 'fincot', targets, rows(3, 4), arm=ARM, size=sized(targets))
  text, held, _ = written(run)
  assert held['arms'][ARM]['rank_correlation'] is None
  assert '** It cannot be told: no dataset' in text


def test_the_terminal_and_a_comparison_keep_arms_apart(run, tmp_path):
  plant_arm(run, LIFTS)
  gathered = results.gather(run)
  said = terminal.render(gathered, 100)
  first, second = said.split('at equal parameters, 1,222,344 trainable:')
  assert 'o_proj rank 141 with 1,234,567 (+1.0 %)' in ' '.join(second.split())
  assert first.count('CoCoHD') == second.count('CoCoHD') == 1
  assert said.count('scores 0 to 100') == 1
  other = RunDirectory(shutil.copytree(run.path, tmp_path / 'other'))
  text = comparison.write({'run': gathered, 'other': results.gather(other)}, tmp_path)
  assert 'comparison.md' in text
  text = (tmp_path / 'comparison.md').read_text()
  both = [
    section(text, f'Average difference to the base{more}') for more in ('', ', at equal parameters')
  ]
  assert both[0].keys() == both[1].keys() == {f'`{name}`' for name in LIFTS}
  assert both[0] != both[1]

"""Verdicts follow the records: each claim holds, does not hold and is open as they are planted."""

import shutil
import zlib

import numpy as np
import pytest
from planted_run import plant, plant_batch, plant_latency, plant_status, start

from lora_jax.presets import ARTICLE_TARGETS
from lora_jax.records import Cell, RunDirectory
from lora_jax.report import statistics
from lora_jax.report.claims import DOES_NOT_HOLD, HOLDS, UNDETERMINED, judge
from lora_jax.report.results import gather

DATASETS = ('fincot', 'govreport', 'medmcqa', 'cocohd')
# Points above the base, on every dataset: C1, C3, C5 and C8 hold, C2 and C6 do not.
LIFTS = {
  'base': 0.0,
  'qkv': 3.0,
  'o_proj': 5.0,
  'fc1': 3.0,
  'fc2': 3.5,
  'qkv,o_proj': 6.0,
  'o_proj,fc2': 7.0,
  'qkv,fc1,fc2': 6.5,
  'all': 6.8,
}


def change(run, dataset, targets, lift, level=40.0, noise=0.2, arm=None):
  """Plants a cell `lift` points above `level`, with so much noise a row."""
  random = np.random.default_rng(zlib.crc32(f'{dataset} {targets}'.encode()))
  scores = level + lift + 8 * np.sin(np.arange(30)) + random.normal(0, noise, 30)
  rows = [float(score) for score in np.clip(scores, 0, 100) / 100]
  plant(run, dataset, targets, rows, **({} if arm is None else {'arm': arm}))


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  run = start(tmp_path_factory.mktemp('claims') / 'world')
  for dataset in DATASETS:
    for targets, lift in LIFTS.items():
      change(run, dataset, targets, lift)
  return run.path


@pytest.fixture
def run(world, tmp_path, monkeypatch):
  """A copy of the world, to be changed."""
  monkeypatch.setattr(statistics, 'DRAWS', 600)
  return RunDirectory(shutil.copytree(world, tmp_path / 'run'))


def verdict(run, claim, arm=None):
  results = gather(run)
  held = {found.claim: found for found in judge(results.others[arm] if arm else results)}
  assert list(held) == [f'C{i}' for i in range(1, 9)]
  assert all(found.numbers for found in held.values())
  return held[claim].verdict


def drop(run, dataset, targets):
  run.cell_file(Cell('', dataset, targets, 'equal_rank', 0)).unlink()


def everywhere(run, targets, lift, **more):
  for dataset in DATASETS:
    change(run, dataset, targets, lift, **more)


def noisy(run):
  for dataset in DATASETS:
    for targets, lift in LIFTS.items():
      change(run, dataset, targets, lift / 5, noise=20.0)


def test_c1_o_proj_is_the_most_robust(run):
  assert verdict(run, 'C1') == HOLDS
  change(run, 'cocohd', 'o_proj', -6)
  assert verdict(run, 'C1') == DOES_NOT_HOLD


def test_c1_does_not_hold_where_others_are_far_ahead(run):
  for dataset in DATASETS[:2]:
    change(run, dataset, 'all', 20)
  assert verdict(run, 'C1') == DOES_NOT_HOLD


def test_c1_does_not_hold_where_another_single_target_is_safer(run):
  everywhere(run, 'fc2', 6.5)
  assert verdict(run, 'C1') == DOES_NOT_HOLD


def test_c1_is_open_where_a_single_target_is_missing_or_noise_is_large(run):
  drop(run, 'fincot', 'fc1')
  assert verdict(run, 'C1') == UNDETERMINED
  noisy(run)
  assert verdict(run, 'C1') == UNDETERMINED


def test_c2_qkv_is_unstable(run):
  assert verdict(run, 'C2') == DOES_NOT_HOLD
  change(run, 'cocohd', 'qkv', -8)
  assert verdict(run, 'C2') == HOLDS
  change(run, 'medmcqa', 'qkv', -8)
  assert verdict(run, 'C2') == DOES_NOT_HOLD
  change(run, 'medmcqa', 'qkv', 3)
  plant_status(run, 'cocohd', 'qkv', 'diverged', why='not finite')
  assert verdict(run, 'C2') == UNDETERMINED


def test_c3_combinations_are_best(run):
  assert verdict(run, 'C3') == HOLDS
  everywhere(run, 'fc1', 9)
  assert verdict(run, 'C3') == DOES_NOT_HOLD


def test_c3_needs_a_point_on_average(run):
  everywhere(run, 'o_proj', 6.6)
  assert verdict(run, 'C3') == DOES_NOT_HOLD


def test_c3_is_open_where_combinations_are_missing(run):
  for dataset in DATASETS:
    drop(run, dataset, 'all')
  assert verdict(run, 'C3') == UNDETERMINED


def _levels(run, scales):
  """The base's score by dataset, and how far the target sets spread there."""
  for dataset, (level, scale) in scales.items():
    for targets, lift in LIFTS.items():
      change(run, dataset, targets, lift * scale, level)


def test_c4_harder_tasks_widen_the_spread(run):
  hard = {'fincot': (30, 2.0), 'govreport': (50, 1.0), 'medmcqa': (65, 0.5), 'cocohd': (12, 3.0)}
  _levels(run, hard)
  assert verdict(run, 'C4') == HOLDS
  change(run, 'cocohd', 'o_proj', 25, 12)
  assert verdict(run, 'C4') == DOES_NOT_HOLD


def test_c4_turns_where_easy_tasks_spread(run):
  easy = {'fincot': (30, 1.0), 'govreport': (50, 2.0), 'medmcqa': (65, 3.0), 'cocohd': (15, 0.5)}
  _levels(run, easy)
  assert verdict(run, 'C4') == DOES_NOT_HOLD


def test_c4_is_open_below_four_datasets(run):
  for targets in LIFTS:
    file = run.cell_file(Cell('', 'fincot', targets, 'equal_rank', 0))
    file.unlink()
  assert verdict(run, 'C4') == UNDETERMINED


def test_c5_o_proj_fc2_is_best_for_accuracy(run):
  assert verdict(run, 'C5') == HOLDS
  everywhere(run, 'o_proj,fc2', 4)
  assert verdict(run, 'C5') == DOES_NOT_HOLD


def test_c5_does_not_hold_where_another_set_is_better(run):
  everywhere(run, 'all', 12)
  assert verdict(run, 'C5') == DOES_NOT_HOLD


def test_c5_is_open_where_the_set_was_not_run(run):
  for dataset in DATASETS:
    drop(run, dataset, 'o_proj,fc2')
  assert verdict(run, 'C5') == UNDETERMINED


def test_c6_o_proj_is_within_two_percent(run):
  assert verdict(run, 'C6') == DOES_NOT_HOLD
  everywhere(run, 'o_proj', 6.7)
  assert verdict(run, 'C6') == HOLDS
  drop(run, 'fincot', 'o_proj')
  assert verdict(run, 'C6') == UNDETERMINED
  (says,) = judge(gather(run))[5].numbers
  assert says.endswith('(needs at least 4 complete datasets; there are 3)')


def test_c7_follows_the_times(run):
  assert verdict(run, 'C7') == UNDETERMINED
  plant_latency(run, **{'o_proj': 1.02, 'o_proj,fc2': 1.32})
  assert verdict(run, 'C7') == HOLDS
  plant_latency(run, **{'o_proj': 1.02, 'o_proj,fc2': 1.10})
  assert verdict(run, 'C7') == DOES_NOT_HOLD
  plant_latency(run, o_proj=1.02)
  assert verdict(run, 'C7') == UNDETERMINED


def test_c7_is_judged_in_every_batch(run):
  plant_latency(run, **{'o_proj': 1.02, 'o_proj,fc2': 1.32})
  plant_batch(run, 8, 8, **{'o_proj': 1.02, 'o_proj,fc2': 1.32})
  assert verdict(run, 'C7') == HOLDS
  plant_batch(run, 8, 8, **{'o_proj': 1.02, 'o_proj,fc2': 1.10})
  assert verdict(run, 'C7') == DOES_NOT_HOLD
  # One row is what latency.json is asked of.
  plant_batch(run, 1, 1, **{'o_proj': 1.02, 'o_proj,fc2': 1.10})
  assert verdict(run, 'C7') == HOLDS
  plant_batch(run, 8, 8, o_proj=1.02)
  assert verdict(run, 'C7') == HOLDS


def test_c8_lora_beats_the_base(run):
  assert verdict(run, 'C8') == HOLDS
  change(run, 'govreport', 'fc1', -4)
  assert verdict(run, 'C8') == DOES_NOT_HOLD
  plant_status(run, 'govreport', 'fc1', 'diverged', why='not finite')
  assert verdict(run, 'C8') == UNDETERMINED


def test_c8_is_open_inside_the_noise(run):
  noisy(run)
  assert verdict(run, 'C8') == UNDETERMINED


def test_a_task_that_the_base_cannot_see_leaves_nothing_open(run):
  for targets in ('base', *ARTICLE_TARGETS):
    plant_status(run, 'llava_cot', targets, 'needs vision')
  assert verdict(run, 'C8') == HOLDS
  assert verdict(run, 'C1') == HOLDS


def test_a_small_run_decides_little(tmp_path):
  run = start(tmp_path)
  change(run, 'medmcqa', 'base', 0)
  change(run, 'medmcqa', 'o_proj', 9)
  found = {held.verdict for held in judge(gather(run))}
  assert found == {UNDETERMINED}
  change(run, 'medmcqa', 'o_proj', -9)
  # A counterexample is one even alone.
  assert verdict(run, 'C8') == DOES_NOT_HOLD
  change(start(tmp_path / 'base'), 'medmcqa', 'base', 0)
  assert {v.verdict for v in judge(gather(RunDirectory(tmp_path / 'base')))} == {UNDETERMINED}


def test_arms_are_judged_apart(run):
  for dataset in DATASETS:
    for targets, lift in LIFTS.items():
      if targets != 'base':
        change(run, dataset, targets, -lift, arm='equal_parameters')
  assert verdict(run, 'C8') == HOLDS
  assert verdict(run, 'C8', 'equal_parameters') == DOES_NOT_HOLD
  results = gather(run)
  assert results.configurations == ['base', *ARTICLE_TARGETS]
  assert results.others['equal_parameters'].configurations == results.configurations

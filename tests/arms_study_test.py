"""The arm of equal parameters, run beside what is there."""

import dataclasses
import json

import jax
import pytest
from study_test import GRID, SETTINGS, records, run

from lora_jax import arms, checkpoint
from lora_jax.hub import adapters, bases
from lora_jax.presets import ARMS

MODULES = {'o_proj': 'attn/o_proj', 'fc2': 'mlp/down_proj'}


@pytest.mark.slow
def test_the_arm_of_equal_parameters_is_run_beside_what_is_there(tmp_path):
  cells, losses = tmp_path / 'out' / 'cells', []
  run(tmp_path / 'out', tmp_path / 'cache')
  before = {file: file.read_bytes() for file in cells.glob('*.json')}
  run(tmp_path / 'out', tmp_path / 'cache', dataclasses.replace(GRID, arms=ARMS))
  assert all(file.read_bytes() == held for file, held in before.items())
  params = bases.load('tiny').params
  budget = arms.size('all', ARMS[0], SETTINGS.lora, params).summary.trainable_params
  for targets in GRID.targets:
    name = f'medmcqa-{targets}-equal_parameters-seed0'
    record = json.loads((cells / f'{name}.json').read_text())
    held, own = record['lora'], record['settings']['lora']
    assert held['budget'] == budget
    assert held['rank'] == own['rank'] > SETTINGS.lora.rank
    assert own['alpha'] / own['rank'] == SETTINGS.lora.alpha / SETTINGS.lora.rank
    assert held['trainable_params'] == pytest.approx(budget, rel=0.05)
    leaves = jax.tree.leaves(checkpoint.load(cells / f'{name}.adapter'))
    assert sum(leaf.size for leaf in leaves) == held['trainable_params']
    # An export reads the cell's own rank and alpha.
    adapter = adapters.of_cell(cells / f'{name}.adapter')
    assert {*adapter.ranks[f'layers/{MODULES[targets]}']} == {own['rank']}
    losses.append(record['train']['losses'])
  times = json.loads((tmp_path / 'out' / 'latency.json').read_text())
  assert {*times['targets']} == {*times['arms']['equal_parameters']} == {'base', 'o_proj', 'fc2'}
  alone = records(tmp_path / 'out')['medmcqa-o_proj-equal_rank-seed0.json']
  assert alone['train']['losses'] not in losses

"""--mesh as a user gives it, on eight forced devices."""

import json
import os

import pytest
from commands_test import done, run, write_rows

EIGHT = {**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
MESH = '--mesh=data=2,fsdp=2,tensor=2'


@pytest.mark.slow
def test_training_and_scoring_over_a_mesh_are_those_of_one_device(tmp_path):
  rows = write_rows(tmp_path / 'my.jsonl')
  common = ('--base=tiny', f'--cache={tmp_path / "cache"}', f'--data={rows}', '--dtype=float32')
  losses, said = {}, {}
  for name, mesh in (('one', ()), ('eight', (MESH,))):
    out = tmp_path / name
    args = (f'--out={out}', '--steps=3', '--tokens_per_batch=2048', *common, *mesh)
    done('train', *args, env=EIGHT)
    lines = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    losses[name] = [line['loss'] for line in lines if 'loss' in line]
    scored = done(
      'evaluate', f'--adapter={out / "adapter"}', '--metric=exact', *common, *mesh, env=EIGHT
    )
    said[name] = scored.stdout
    versions = json.loads((out / 'run.json').read_text())['versions']
    assert versions.get('mesh') == ('data=2,fsdp=2,tensor=2' if mesh else None)
  assert losses['eight'] == pytest.approx(losses['one'], abs=1e-5)
  assert len(losses['one']) == 3
  assert said['eight'] == said['one']


@pytest.mark.parametrize(
  ('mesh', 'says'),
  [('banana', "no axis 'banana'"), ('data=3', 'there are 8 devices'), ('data=-3', 'whole number')],
)
def test_a_mesh_that_cannot_be_is_one_line_before_anything_is_loaded(tmp_path, mesh, says):
  held = run('ablate', f'--mesh={mesh}', f'--out={tmp_path / "out"}', env=EIGHT)
  assert held.returncode == 2
  assert says in held.stderr
  assert held.stderr.count('\n') == 1
  assert not (tmp_path / 'out').exists()

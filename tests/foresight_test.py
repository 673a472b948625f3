"""A report holds a probe against the grid: right, wrong, and by how many points."""

import shutil

import pytest
from planted_run import plant, plant_latency, plant_probe, plant_status, start, written
from report_command_test import command
from report_test import section

from lora_jax.ranking import DECREASE, FEATURE_NORM, PER_LATENCY, PER_PARAMETER
from lora_jax.records import RunDirectory
from lora_jax.report import probe, statistics
from lora_jax.report.document import markdown
from lora_jax.report.page import render

OUT, DOWN, UP, QUERY = (
  f'layers/{p}' for p in ('attn/o_proj', 'mlp/down_proj', 'mlp/up_proj', 'attn/q_proj')
)
MODULES = {'o_proj': OUT, 'fc2': DOWN, 'up_proj': UP, 'q_proj': QUERY}
SETS = {targets: ([module], 1000) for targets, module in MODULES.items()}
# Points above 40.
LIFTS = {'o_proj': 2, 'fc2': 5, 'up_proj': 9, 'q_proj': 14}
DATASETS = ('medmcqa', 'cocohd')


def level(value):
  return [(40 + value + i % 3 - 1) / 100 for i in range(30)]


@pytest.fixture
def run(tmp_path, monkeypatch):
  monkeypatch.setattr(statistics, 'DRAWS', 400)
  run = start(tmp_path / 'run')
  for dataset in DATASETS:
    plant(run, dataset, 'base', level(0))
    for targets, lift in LIFTS.items():
      plant(run, dataset, targets, level(lift))
  return run


def foretell(run, order, norms=None, **more):
  """A probe that gives these sets, the best first, these places."""
  decreases = {MODULES[targets]: 0.01 * (9 - i) for i, targets in enumerate(order)}
  norms = {MODULES[targets]: 1.0 + i for i, targets in enumerate(norms or order)}
  plant_probe(run, DATASETS, decreases, norms, SETS, **more)


def of(held, score, datasets):
  (one,) = (f for f in held['foresight'] if (f['score'], f['datasets']) == (score, datasets))
  return one


BEST_FIRST = ('q_proj', 'up_proj', 'fc2', 'o_proj')


def test_without_a_probe_nothing_is_said_of_one(run):
  text, held, _ = written(run)
  assert '## Probe' not in text
  assert 'foresight' not in held


def test_an_order_that_came_true(run):
  foretell(run, BEST_FIRST)
  text, held, _ = written(run)
  for datasets in (['medmcqa'], ['cocohd'], ['medmcqa', 'cocohd']):
    for score in (DECREASE, PER_PARAMETER, FEATURE_NORM):
      one = of(held, score, datasets)
      assert (one['spearman'], one['kendall'], one['regret']) == (1, 1, 0)
      assert (one['pick'], one['best'], one['sets']) == ('q_proj', 'q_proj', 4)
      assert one['interval'] == pytest.approx([1, 1], abs=0.01)
      assert one['always'] == {'o_proj': pytest.approx(12)}
  assert len(held['foresight']) == 9
  row = section(text, 'Probe')['MedMCQA']
  assert (row['ranked by'], row['Kendall'], row['picks']) == ('feature norm', '+1.00', '`q_proj`')
  assert row['Spearman'].startswith('+1.00 (')
  assert (row['regret'], row['regret of `o_proj`'], row['regret of `all`']) == ('0.0', '12.0', '-')
  assert 'On the mean of 2 datasets: by decrease rank correlation +1.00 (' in text
  assert 'regret 0.0 (`q_proj`)' in text
  assert 'always `o_proj`: regret 12.0' in text
  assert 'By decrease: `q_proj` (`q_proj` 100% of the resamples).' in text


def test_an_order_that_came_out_reversed(run):
  foretell(run, BEST_FIRST[::-1], norms=('up_proj', 'q_proj', 'o_proj', 'fc2'))
  text, held, _ = written(run)
  one = of(held, DECREASE, [*DATASETS])
  assert (one['spearman'], one['kendall'], one['pick']) == (-1, -1, 'o_proj')
  assert one['regret'] == pytest.approx(12)
  assert one['interval'][1] < 0
  norm = of(held, FEATURE_NORM, [*DATASETS])
  # Places 2 1 4 3 of 4: Spearman 1 - 6 * 4 / 60, Kendall 4 of 6 pairs alike and 2 not.
  assert norm['spearman'] == pytest.approx(0.6)
  assert norm['kendall'] == pytest.approx(1 / 3, abs=1e-6)
  assert norm['regret'] == pytest.approx(5)
  assert 'regret 12.0 (`o_proj`)' in text


def test_latency_has_a_say_where_it_is_known(run):
  foretell(run, BEST_FIRST)
  plant_latency(run, o_proj=0.1, fc2=1.0, up_proj=1.0)
  _, held, _ = written(run)
  one = of(held, PER_LATENCY, [*DATASETS])
  assert (one['sets'], one['pick'], one['best'], one['regret']) == (3, 'o_proj', 'up_proj', 7)
  assert one['spearman'] == pytest.approx(-0.5)


def test_what_was_not_measured_is_not_correlated(run):
  foretell(run, BEST_FIRST)
  plant_status(run, 'cocohd', 'q_proj', 'diverged', why='not finite')
  _, held, _ = written(run)
  assert of(held, DECREASE, ['cocohd'])['sets'] == 3
  assert of(held, DECREASE, ['cocohd'])['regret'] == 0
  # A mean is over datasets with all of them.
  assert {tuple(one['datasets']) for one in held['foresight']} == {('medmcqa',), ('cocohd',)}


def test_equal_scores_have_no_order(run):
  foretell(run, BEST_FIRST)
  for targets in LIFTS:
    plant(run, 'medmcqa', targets, level(3))
  one = of(written(run)[1], DECREASE, ['medmcqa'])
  assert (one['spearman'], one['kendall'], one['interval'], one['regret']) == (None, None, None, 0)


def test_two_sets_have_no_correlation_and_one_has_no_regret(run):
  for dataset in DATASETS:
    for targets in ('fc2', 'up_proj', 'q_proj'):
      next(run.path.glob(f'cells/{dataset}-{targets}-*.json')).unlink()
  foretell(run, BEST_FIRST)
  text, held, _ = written(run)
  assert held['foresight'] == []
  assert 'It cannot be told: no two sets are in both.' in text
  for dataset in DATASETS:
    plant(run, dataset, 'fc2', level(5))
  one = of(written(run)[1], DECREASE, [*DATASETS])
  assert (one['spearman'], one['sets'], one['regret'], one['pick']) == (None, 2, 0, 'fc2')


def test_an_undecided_ranking_is_called_so(run):
  foretell(run, BEST_FIRST, noise=0.2)
  text = written(run)[0]
  assert 'By decrease: undecided, ' in text


def test_the_report_is_rebuilt_byte_for_byte(run, tmp_path):
  foretell(run, BEST_FIRST, noise=0.02)
  plant_latency(run, o_proj=1.1, q_proj=1.2)
  other = shutil.copytree(run.path, tmp_path / 'other')
  made = []
  for path in (run.path, other):
    done = command(path)
    assert done.returncode == 0, done.stderr
    made.append([(path / n).read_bytes() for n in ('report.md', 'report.html', 'results.json')])
  assert b'Did it foresee the grid?' in made[0][1]
  assert made[0] == made[1]


@pytest.mark.parametrize('width', [60, 80, 120])
def test_a_probe_alone_has_tables_of_its_own(tmp_path, width):
  run = RunDirectory(tmp_path)
  foretell(run, BEST_FIRST)
  made = probe.document(run.probe(), None)
  text = markdown(made)
  assert 'What a probe foretells on tiny' in text
  assert 'training batches of 2 datasets (seed 0), which took 7 s on cpu' in text
  assert section(text, 'Scores of the probe')['`q_proj`']['decrease'] == '0.09 (0.09 to 0.09)'
  assert section(text, 'Module by module')[f'`{QUERY}`']['feature norm'] == '1.000 (1.000 to 1.000)'
  assert 'foresee' not in text
  assert render(made)
  said = probe.text(run.probe(), None, width)
  assert max(map(len, said.split('By decrease')[0].splitlines())) <= width
  assert 'By feature norm: q_proj (q_proj 100% of the resamples).' in said

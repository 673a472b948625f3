"""A probe's numbers are the loss's own derivatives, and the norms are what their name says."""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from planted_run import plant, plant_status, start
from tiny_model import CONFIG, MODEL
from train_test import toy_batches

from lora_jax import feature_norm, lora, lora_family, probe
from lora_jax.config import LoraConfig, OptimConfig
from lora_jax.data import sources, tasks
from lora_jax.errors import UserError
from lora_jax.hub import bases
from lora_jax.presets import ARTICLE_TARGETS, PRESETS
from lora_jax.step import batch_loss
from lora_jax.task_rows import TaskRows
from lora_jax.transformer import Transformer

ROOT = Path(__file__).resolve().parent.parent
LORA = LoraConfig(rank=4, alpha=8.0)
OPTIM = OptimConfig(learning_rate=5e-3, lr_ratio=4.0)
BATCHES = 3


def paths(targets='all'):
  return lora.resolve(targets, tiny_model.params())


def batches(count=BATCHES):
  return [*itertools.islice(toy_batches(5), count)]


def measured(targets='all', config=LORA, seed=1, **options):
  base = tiny_model.params()
  return probe.measure(MODEL, base, batches(), paths(targets), config, OPTIM, seed, **options)


@pytest.fixture(scope='module')
def found():
  return measured()


def _mean_loss(adapters, batch):
  total, count = batch_loss(MODEL, tiny_model.params(), adapters, batch, LORA.scale)
  return total / count


mean_loss, gradient = jax.jit(_mean_loss), jax.jit(jax.grad(_mean_loss))


@functools.cache
def fresh():
  return lora_family.init(jax.random.key(1), tiny_model.params(), paths(), LORA)


def after_step(targets, on, share):
  """Fresh adapters after so much of Adam's first step with the gradient of one batch."""
  grads = gradient(fresh(), batches()[on])
  rate = OPTIM.learning_rate * OPTIM.lr_ratio

  def moved(path, leaf, grad):
    module = '/'.join(key.key for key in path[:-1])
    # A has no gradient.
    return leaf - share * rate * jnp.sign(grad) if module in paths(targets) else leaf

  return jax.tree_util.tree_map_with_path(moved, fresh(), grads)


@pytest.mark.parametrize('targets', ['o_proj', 'qkv,fc2', 'all'])
def test_the_decrease_is_what_a_small_step_on_another_batch_gives(found, targets):
  share = 0.05
  for on, of in ((0, 1), (2, 0), (1, 1)):
    before, after = (
      float(mean_loss(after_step(targets, on, by), batches()[of])) for by in (-share, share)
    )
    # Central: what is left of the error is of third order in the step.
    difference = (before - after) / (2 * share)
    # Additive: of a set it is the sum over its modules.
    foretold = sum(found.decreases[path][on, of] for path in paths(targets))
    assert foretold == pytest.approx(difference, rel=2e-3)


def test_the_losses_are_those_of_the_base(found):
  expected = [float(mean_loss(fresh(), batch)) for batch in batches()]
  np.testing.assert_allclose(found.losses, expected, rtol=1e-5)


def test_a_module_has_the_same_number_in_every_set(found):
  alone = measured('o_proj')
  assert [*alone.decreases] == ['layers/attn/o_proj']
  for path, decrease in alone.decreases.items():
    np.testing.assert_allclose(decrease, found.decreases[path], rtol=1e-4)


def test_a_batch_in_parts_is_the_same(found):
  parts = measured(positions=16)
  np.testing.assert_allclose(parts.losses, found.losses, rtol=1e-5)
  for path, norms in parts.feature_norms.items():
    np.testing.assert_allclose(norms, found.feature_norms[path], rtol=1e-4)
  for path, decrease in parts.decreases.items():
    # An entry whose gradient is nearly zero may have either sign.
    np.testing.assert_allclose(decrease, found.decreases[path], rtol=1e-2, atol=1e-5)


def test_the_same_seed_gives_the_same(found):
  again, other = measured(), measured(seed=2)
  for path, decrease in found.decreases.items():
    assert (decrease == again.decreases[path]).all()
    assert not np.allclose(decrease, other.decreases[path], rtol=1e-3)
  # A has no part in these.
  for path, norms in found.feature_norms.items():
    np.testing.assert_allclose(norms, other.feature_norms[path], rtol=1e-6)
  assert json.loads(json.dumps(found.record()))['losses'] == pytest.approx(found.losses.tolist())


def test_a_step_on_a_batch_always_gains_on_itself(found):
  for decrease in found.decreases.values():
    assert (np.diag(decrease) > 0).all()


def test_fused_modules_are_probed_beside_their_parts(found):
  both = measured('qkv_proj')
  assert [*both.decreases] == ['layers/attn/qkv_proj']
  base = tiny_model.params()
  names = [*paths(), *paths('qkv_proj')]
  whole = probe.measure(MODEL, base, batches(), names, LORA, OPTIM, 1)
  assert {*whole.decreases} == {*names}
  for path in names:
    expected = (both if 'qkv' in path else found).decreases[path]
    np.testing.assert_allclose(whole.decreases[path], expected, rtol=1e-4)


def test_the_whole_family_can_be_probed(found):
  dora = measured('o_proj', dataclasses.replace(LORA, dora=True))
  path = 'layers/attn/o_proj'
  # Its magnitudes move in the first step, too.
  assert not np.allclose(dora.decreases[path], found.decreases[path], rtol=1e-3)
  assert (
    np.diag(measured('o_proj', dataclasses.replace(LORA, init='pissa')).decreases[path]) > 0
  ).all()
  part = measured('all', dataclasses.replace(LORA, layers='1'))
  assert (np.diag(part.decreases[path]) < np.diag(found.decreases[path])).all()


def test_a_loss_that_is_no_number_is_a_users_mistake():
  base = jax.tree.map(lambda x: x * jnp.nan, tiny_model.params())
  with pytest.raises(UserError, match='not finite'):
    probe.measure(MODEL, base, batches(), paths('o_proj'), LORA, OPTIM, 0)


def test_feature_norms_of_a_linear_map_by_hand():
  # Only the first input counts: at random a vector of length 1 would become 3 / sqrt(2) long.
  w = jnp.array([[3.0, 0.0], [0.0, 0.0]])
  x = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
  expected = [2**0.5, 0.0, 0.6 * 2**0.5, 0.0]
  np.testing.assert_allclose(feature_norm.feature_norms(x, x @ w, w), expected, atol=1e-6)


@pytest.mark.parametrize('shape', [(48, 16), (16, 48)])
def test_feature_norms_of_random_inputs_are_about_one(shape):
  keys = jax.random.split(jax.random.key(0))
  x, w = jax.random.normal(keys[0], (2000, shape[0])), 7 * jax.random.normal(keys[1], shape)
  norms = feature_norm.feature_norms(5 * x, 5 * x @ w, w)
  assert float((norms**2).mean()) == pytest.approx(1, abs=0.02)
  # Neither scale has a part in it.
  np.testing.assert_allclose(norms, feature_norm.feature_norms(x, x @ (w / 7), w / 7), rtol=1e-4)


@pytest.mark.parametrize('config', [CONFIG, dataclasses.replace(CONFIG, qkv_bias=True)])
def test_feature_norms_are_taken_at_every_layer_of_the_model(config):
  params, batch = tiny_model.params(config), batches()[0]
  model = Transformer(config)
  sums, tokens = jax.jit(feature_norm.over_tokens, static_argnums=0)(model, params, batch)
  real_BT = batch['segments'] != 0
  assert float(tokens) == real_BT.sum() < real_BT.size
  assert {*sums} == {*paths()}
  assert all(of_layers.shape == (CONFIG.num_layers,) for of_layers in sums.values())
  # What the first layer's queries are made from can be had by hand.
  x_BTD = params['embed_tokens']['embedding'][batch['tokens']]
  x_BTD = x_BTD / jnp.sqrt((x_BTD**2).mean(-1, keepdims=True) + config.norm_eps)
  x_BTD = x_BTD * params['layers']['input_layernorm']['scale'][0][None, None]
  w = params['layers']['attn']['q_proj']['kernel'][0]
  lengths = jnp.linalg.norm(x_BTD @ w, axis=-1) / jnp.linalg.norm(x_BTD, axis=-1)
  by_hand = (lengths * CONFIG.model_dim**0.5 / jnp.linalg.norm(w))[real_BT].sum()
  assert float(sums['layers/attn/q_proj'][0]) == pytest.approx(float(by_hand), rel=1e-4)


def tiny_rows(tmp_path, train):
  quick = PRESETS['quick']
  sized = dataclasses.replace(quick.train, max_length=1024, train_rows=train, eval_rows=0)
  settings = dataclasses.replace(quick, train=sized)
  source = sources.Synthetic(seed=0, train=train, test=2)
  task = tasks.TASKS['medmcqa']
  return TaskRows(task, source, bases.load('tiny'), settings, tmp_path, None)


def test_no_row_is_in_two_batches(tmp_path, capsys):
  rows = tiny_rows(tmp_path, 30)
  found = probe.distinct_batches(rows, 1000, seed=3)
  assert f'medmcqa: {len(found)} batches, since' in capsys.readouterr().err
  held = []
  for batch in found:
    for row in range(len(batch['tokens'])):
      segments = batch['segments'][row]
      held += [
        tuple(batch['targets'][row][segments == s].tolist()) for s in range(1, segments.max() + 1)
      ]
  assert len({*held}) == len(held) > 20
  assert len(probe.distinct_batches(rows, 4, seed=3)) == 4
  with pytest.raises(UserError, match='at least 4 are needed; lower --tokens_per_batch'):
    probe.distinct_batches(tiny_rows(tmp_path, 3), 4, seed=0)


def launch(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.probe', *map(str, arguments)],
    capture_output=True, text=True, cwd=ROOT, check=False, timeout=300,
  )  # fmt: skip


SMALL = (
  '--base=tiny', '--batches=4', '--train_rows=40', '--max_length=1024', '--rank=4',
  '--datasets=medmcqa', '--targets=o_proj', '--targets=fc2,o_proj',
)  # fmt: skip


def test_a_probe_is_kept_and_added_to(tmp_path):
  out = tmp_path / 'out'
  done = launch(*SMALL, f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == f'probe: {out / "probe.html"} and {out / "probe.md"}'
  assert 'By decrease: ' in done.stdout
  held = json.loads((out / 'probe.json').read_text())
  assert [*held['sets']] == ['o_proj', 'o_proj,fc2']
  assert len(held['datasets']['medmcqa']['losses']) == 4
  assert {*held['datasets']['medmcqa']['decreases']} == {*paths()}
  about = held['about']
  assert (about['base'], about['lora']['rank'], about['seed']) == ('tiny', 4, 0)
  assert about['sha256'] == bases.load('tiny').record['sha256']
  assert held['versions']['jax']
  more = launch(*SMALL, '--targets=fc1', f'--out={out}')
  assert more.returncode == 0, more.stderr
  assert 'probe medmcqa' not in more.stderr
  again = json.loads((out / 'probe.json').read_text())
  assert again['datasets'] == held['datasets']
  assert [*again['sets']] == ['fc1', 'o_proj', 'o_proj,fc2']
  assert '| `fc1`' in (out / 'probe.md').read_text()
  other = launch(*SMALL, '--rank=3', f'--out={out}')
  assert (other.returncode, other.stderr.count('\n')) == (2, 2)
  assert 'holds a probe with lora=' in other.stderr


def test_a_study_is_joined_with_its_settings_rows_and_report(tmp_path):
  out, sized = tmp_path / 'run', {'max_length': 1024, 'train_rows': 40, 'dtype': 'float32'}
  run = start(out, base='tiny', data='synthetic', **sized)
  for i, targets in enumerate(('base', 'o_proj', 'fc2', 'up_proj')):
    plant(run, 'medmcqa', targets, [0.1 * i, 0.2, 0.3])
  plant_status(run, 'llava_cot', 'base', 'needs vision')
  # It is this process's as long as it lives.
  del run
  done = launch('--batches=4', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert 'llava_cot: left out' in done.stderr
  held = json.loads((out / 'probe.json').read_text())
  # The study's, not the launcher's own.
  assert (held['about']['base'], held['about']['train_rows']) == ('tiny', 40)
  assert [*held['datasets']] == ['medmcqa']
  assert {*held['sets']} == {*ARTICLE_TARGETS, 'up_proj'}
  assert 'Did it foresee the grid?' in (out / 'report.md').read_text()
  assert len(json.loads((out / 'results.json').read_text())['foresight']) == 3
  for arguments, says in (('--rank=3',), 'its own'), (('--base=smollm2-135m-instruct',), 'tiny'):
    other = launch('--batches=4', *arguments, f'--out={out}')
    assert (other.returncode, other.stderr.count('\n')) == (2, 1)
    assert says in other.stderr


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (('--batches=3',), '--batches=3: give at least 4'),
    (('--seed=-1',), '--seed=-1'),
    (('--targets=banana',), 'banana'),
    (('--datasets=x',), "unknown dataset 'x'"),
    (('--base=gpt',), 'gpt'),
    (('--lr=0',), '--lr=0'),
    (('--rank=0',), '--rank=0'),
    (('--data=nowhere',), 'nowhere'),
    (('--data=my.jsonl',), '--metric'),
    (('--out=/dev/null/x',), '/dev/null'),
  ],
)
def test_a_mistake_is_one_line_and_comes_first(arguments, says, tmp_path):
  done = launch('--base=tiny', f'--out={tmp_path / "out"}', f'--cache={tmp_path / "c"}', *arguments)
  assert done.returncode == 2
  assert says in done.stderr
  assert done.stderr.count('\n') == 1
  assert not [*tmp_path.iterdir()]


def test_a_task_that_needs_sight_is_left_out(tmp_path, capsys):
  base = bases.load('tiny')
  prober = probe.Prober(
    PRESETS['quick'], base, MODEL, base.params, sources.Synthetic(0, 4, 1), tmp_path
  )
  both = tasks.by_names(['llava_cot', 'medmcqa'])
  assert [task.name for task in prober.posed(both)] == ['medmcqa']
  assert 'llava_cot: left out' in capsys.readouterr().err
  with pytest.raises(UserError, match='none of these datasets'):
    prober.posed(both[:1])
  assert {*prober.sets(['qkv'])['qkv']['modules']} == {*paths('qkv')}

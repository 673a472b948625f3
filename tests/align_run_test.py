"""A micro tower learns to read and to speak; nothing else moves; a killed run ends the same."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lora_jax.align import plot, read, run, sight, speak, state, work
from lora_jax.align.recipe import ACCELERATOR, CPU, Drawn, Recipe, Stage
from lora_jax.config import ImageConfig, VisionConfig
from lora_jax.drawings import fonts
from lora_jax.drawings.drawing import KINDS
from lora_jax.errors import UserError
from lora_jax.hub import bases, seeing
from lora_jax.vision import cut

VISION = VisionConfig(
  image_size=64,
  patch_size=8,
  model_dim=32,
  num_layers=1,
  num_heads=2,
  mlp_dim=64,
  shuffle=2,
  image_token=0,
)
BOTH = (Drawn('note', 1.0), Drawn('scatter', 1.0))
READ = Stage('read', 4, 3, 3e-3, BOTH, eval_batches=1, eval_every=2)
SPEAK = dataclasses.replace(
  READ, name='speak', rows=2, drawn=(Drawn('scatter', 1.0, (1,)),), length=300, tiles=1
)
RECIPE = Recipe('tiny', (READ, SPEAK), VISION, ImageConfig(longest_edge=128, tile=64))


@pytest.fixture(scope='module')
def base():
  return bases.load('tiny')


@pytest.fixture(scope='module')
def finished(base, tmp_path_factory):
  out = tmp_path_factory.mktemp('align') / 'run'
  assert run.run(RECIPE, base, out)
  return out


@pytest.mark.slow
def test_a_tower_learns_what_lies_in_a_few_drawings(base):
  stage = dataclasses.replace(READ, steps=60, rows=4)
  of = work.work(RECIPE, stage, base, None)
  batch = of.batches(fonts.FACES, 0)[0]
  held, step = state.fresh(RECIPE, stage, of.fresh), state.make_step(RECIPE, stage, of.loss)
  told = []
  for _ in range(stage.steps):
    held, metrics = step(held, of.frozen, batch)
    told.append({name: float(x[0] / x[1]) for name, x in metrics.items() if x.ndim})
  assert told[-1]['loss'] < 0.5 * told[0]['loss']
  assert told[-1]['kinds'] > 0.6
  # As long as the embeddings of the language model.
  seen = work.finished(base, held.params['sight'])
  features = sight.Sight(VISION, base.config.model_dim).apply(
    {'params': seen}, (batch['pixels'] / 127.5 - 1).astype(np.float32)
  )
  own = np.asarray(features) - np.asarray(of.frozen['mean'])
  length = np.sqrt((own**2).mean(-1))
  assert 0.4 < np.median(length) / float(of.frozen['length']) < 2.5


def test_a_patch_embedding_begins_with_all_that_varies_equally_loud():
  width = VISION.model_dim
  pixels = np.random.default_rng(0).standard_normal((24, 64, 64, 3))
  # Light paper, faint strokes, and a colour that never changes.
  pixels = np.cumsum(0.1 * pixels, axis=1) + 3 * np.arange(24)[:, None, None, None]
  pixels[..., 2] = 1
  held = sight.init(VISION, 16, jax.random.key(0))
  sharp = sight.sharpened(held, VISION, pixels.astype(np.float32), jax.random.key(1))
  assert jax.tree.map(jnp.shape, sharp) == jax.tree.map(jnp.shape, held)
  embedding = sharp['vision']['patch_embedding']
  patches = np.asarray(cut(jnp.asarray(pixels, jnp.float32), VISION.patch_size))
  seen = patches.reshape(-1, patches.shape[-1]) @ embedding['kernel'] + embedding['bias']
  np.testing.assert_allclose(np.cov(seen, rowvar=False), np.eye(width), atol=0.02)
  np.testing.assert_allclose(seen.mean(0), 0, atol=0.02)


def test_a_cell_is_asked_for_its_tokens_among_all_that_are_written():
  # One embedding that is the second of three candidates, one that is nothing.
  rows = jnp.asarray(np.eye(4, dtype=np.float32))
  plain = 2 * jnp.asarray([[[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]])
  batch = {
    'candidates': jnp.asarray([0, 1, 2]),
    'tokens': jnp.asarray([[[1, -1], [-1, -1], [1, 2]]]),
    'asked': jnp.ones((1, 3)),
  }
  loss, hits = read._named(plain, rows, batch)
  np.testing.assert_array_equal(hits, [2, 2])
  # All on one of two right answers costs half of what missing the other does.
  assert float(loss) == pytest.approx(20 / 2 / 2.1, rel=1e-4)
  unasked = {**batch, 'asked': jnp.asarray([[1.0, 1, 0]])}
  assert float(read._named(plain, rows, unasked)[0]) < 1e-6


def test_only_the_tower_learns_to_speak(base):
  of = work.work(RECIPE, SPEAK, base, None)
  batch = of.batches(fonts.FACES, 0)[0]
  assert set(of.fresh) == {'sight'}
  assert set(of.fresh['sight']) == {'vision', 'connector'}
  grads, metrics = jax.jit(jax.grad(of.loss, has_aux=True))(of.fresh, of.frozen, batch)
  assert float(metrics['loss'][1]) == batch['weights'].sum()
  for path, leaf in flatten_dict(grads, sep='/').items():
    # Of keys a bias changes no softmax.
    assert np.abs(leaf).max() > 1e-9 or path.endswith('k_proj/bias'), path
  blank = {**batch, 'pixels': np.full_like(batch['pixels'], 255)}
  loss = jax.jit(lambda batch: of.loss(of.fresh, of.frozen, batch)[0])
  assert float(loss(blank)) != float(loss(batch))


def test_answers_are_asked_for_after_their_image(base):
  joined = seeing.join(base, VISION, RECIPE.images, sight.init(VISION, 32, jax.random.key(0)))
  batch = speak.Conversations(RECIPE, SPEAK, joined, fonts.FACES, 0)[2]
  for tokens, targets, weights, slots in zip(
    *(batch[name] for name in ('tokens', 'targets', 'weights', 'slots')), strict=True
  ):
    said = targets[weights > 0]
    assert said[-1] == joined.tokenizer.eos_id
    assert joined.tokenizer.decode(said)
    np.testing.assert_array_equal(slots[slots >= 0], np.arange(16))
    assert (tokens[slots >= 0] == joined.config.vision.image_token).all()
    np.testing.assert_array_equal(tokens[1:], targets[:-1])
    assert np.flatnonzero(slots >= 0).max() < np.flatnonzero(weights).min()
  short = speak.Conversations(RECIPE, dataclasses.replace(SPEAK, length=20), joined, fonts.FACES, 0)
  with pytest.raises(UserError, match='raise the length of the stage speak'):
    short.__getitem__(0)


def test_a_run_leaves_a_base_that_sees(base, finished):
  seen = bases.load(str(finished / run.BASE))
  assert seen.record['sees'] == 'images'
  for path, leaf in flatten_dict(base.params['layers'], sep='/').items():
    np.testing.assert_array_equal(flatten_dict(seen.params['layers'], sep='/')[path], leaf)
  vision, images, small = seeing.read_sight(finished / run.SIGHT, base.config)
  assert (vision, images) == (VISION, RECIPE.images)
  for name in ('vision', 'connector'):
    theirs = flatten_dict(seen.params[name], sep='/')
    for path, leaf in flatten_dict(small[name], sep='/').items():
      np.testing.assert_array_equal(theirs[path], leaf, err_msg=path)
  assert (finished / run.SIGHT).stat().st_size < 3 * sum(
    leaf.size for leaf in jax.tree.leaves(small)
  )
  lines = run.metrics(finished, RECIPE)
  assert [line['step'] for line in lines['read'] if 'loss' in line] == [1, 2, 3, 4]
  looked = [line for line in lines['speak'] if 'blank/loss' in line or 'new/loss' in line]
  assert [line['step'] for line in looked] == [2, 2, 4, 4]
  assert (finished / 'curve.png').read_bytes().startswith(b'\x89PNG')
  assert plot.curve({}).startswith(b'\x89PNG')
  # Nothing is left to do.
  assert run.run(RECIPE, base, finished)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_numbers(base, finished, tmp_path):
  asked = iter([False] * 3 + [True] + [False] * 2 + [True])
  out = tmp_path / 'run'
  assert not run.run(RECIPE, base, out, stop=lambda: next(asked))
  assert state.latest(out / 'read')[0] == 3
  # As a killed run leaves it: a step that no checkpoint holds, and half a line.
  with (out / 'read' / run.METRICS).open('a') as file:
    file.write('{"step": 4, "loss": 9}\n{"step"')
  assert not run.run(RECIPE, base, out, stop=lambda: next(asked))
  assert run.run(RECIPE, base, out)
  assert (out / run.SIGHT).read_bytes() == (finished / run.SIGHT).read_bytes()
  timeless = lambda line: {key: value for key, value in line.items() if 'per_second' not in key}
  ours, theirs = run.metrics(out, RECIPE), run.metrics(finished, RECIPE)
  for name in ('read', 'speak'):
    assert [*map(timeless, ours[name])] == [*map(timeless, theirs[name])]


def test_another_recipe_does_not_go_on(base, finished):
  other = dataclasses.replace(RECIPE, seed=1)
  with pytest.raises(UserError, match='says another recipe than this run has'):
    run.run(other, base, finished)


def test_a_damaged_checkpoint_is_named(base, finished, tmp_path):
  (tmp_path / 'read' / 'checkpoint-0000002').mkdir(parents=True)
  with pytest.raises(UserError, match='checkpoint-0000002 is damaged; delete it'):
    run.run(RECIPE, base, tmp_path)


def test_weights_of_another_shape_are_refused(base, finished):
  config = dataclasses.replace(base.config, model_dim=48)
  with pytest.raises(UserError, match=r'kernel is \(1, 128, 32\), and \(1, 128, 48\) was expected'):
    seeing.read_sight(finished / run.SIGHT, config)


def test_a_checkpoint_that_is_no_sight_is_refused(base, finished):
  with pytest.raises(UserError, match='does not say what it is the sight of'):
    seeing.read_sight(finished / run.BASE / 'model.safetensors', base.config)


def test_recipes_are_json_and_name_what_can_be_drawn():
  for stages in (CPU, ACCELERATOR):
    assert [stage.name for stage in stages] == ['read', 'speak', 'whole']
    assert json.dumps(dataclasses.asdict(Recipe('tiny', stages)))
    assert {drawn.kind for drawn in stages[0].drawn} == {*KINDS}
    for stage in stages[1:]:
      assert stage.length > stage.tiles * 81

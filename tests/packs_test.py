import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import tiny_model
from train_test import LENGTH, LORA, ROWS, STEPS, toy_batches

from lora_jax import lora, lora_family, packs
from lora_jax.config import LoraConfig, OptimConfig
from lora_jax.presets import ARTICLE_TARGETS
from lora_jax.step import make_evaluation, make_step, part_rows, stack_batches
from lora_jax.train import DivergedError, Outcome, TrainJob, prepare, train_wave

MODEL = tiny_model.MODEL
CONFIG = dataclasses.replace(STEPS, steps=12, eval_every=4)


def job(targets, seed=0, lora_config=LORA, optim=None, batches=None, watched=2):
  paths = lora.resolve(targets, tiny_model.params())
  stream = (lambda: toy_batches(seed)) if batches is None else (lambda: batches)
  # The project's own rates: Adam makes whole steps of what rounding leaves of a gradient
  # near zero, so that differences grow with the rate.
  optim = OptimConfig() if optim is None else optim
  return TrainJob(
    paths, lora_config, optim, seed, stream, list(itertools.islice(toy_batches(99), watched))
  )


def together(jobs, config=CONFIG, cells=None):
  base = tiny_model.params()
  return train_wave(MODEL, base, prepare(base, jobs, config.steps, cells), config)


@functools.cache
def wave_step(cells, dropout=0.0):
  return make_step(MODEL, cells, dropout), make_evaluation(MODEL, cells)


def alone(given, config=CONFIG):
  base = tiny_model.params()
  wave = prepare(base, [given], config.steps)
  step, evaluate = wave_step(1, given.lora.dropout)
  return train_wave(MODEL, base, wave, config, step=step, evaluate=evaluate)[0]


def assert_same(one, other, tolerance=1e-4):
  np.testing.assert_allclose(one.losses, other.losses, atol=tolerance)
  assert [step for step, _ in one.eval_losses] == [step for step, _ in other.eval_losses]
  np.testing.assert_allclose(
    [loss for _, loss in one.eval_losses], [loss for _, loss in other.eval_losses], atol=tolerance
  )
  tiny_model.assert_trees_close(one.adapters, other.adapters, atol=tolerance)
  counts = ('tokens', 'completion_tokens', 'examples', 'bad_steps', 'kept_step', 'stopped')
  for name in counts:
    assert getattr(one, name) == getattr(other, name)


@pytest.mark.slow
def test_the_articles_grid_in_one_program_equals_its_cells_alone():
  cells = [(targets, seed) for targets in ARTICLE_TARGETS for seed in (0, 1)]
  outcomes = together([job(*cell) for cell in cells])
  for cell, outcome in zip(cells, outcomes, strict=True):
    assert isinstance(outcome, Outcome)
    assert outcome.cells == 16
    assert_same(outcome, alone(job(*cell)))
  losses = {tuple(np.round(outcome.losses, 6)) for outcome in outcomes}
  assert len(losses) == 16


@pytest.mark.slow
def test_ranks_rates_and_streams_may_differ_between_cells():
  def cells():
    return [
      job('o_proj', 0, LoraConfig(rank=2, alpha=8.0)),
      job('qkv,fc2', 3, LoraConfig(rank=5, alpha=5.0, rslora=True, rank_pattern=(('fc2', 3),))),
      job('all', 1, LORA, OptimConfig(5e-3, lr_ratio=8.0, clip_norm=0.1, weight_decay=0.1)),
      job('fc1', 2, LoraConfig(rank=4, layers='1'), OptimConfig(1e-2, warmup=0.5), watched=1),
      job('fc2', 2, watched=0),
    ]

  for outcome, given in zip(together(cells()), cells(), strict=True):
    assert_same(outcome, alone(given))


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {'dropout': 0.3},
    {'train_also': ('norm', 'input_layernorm')},
    {'dora': True, 'init': 'pissa', 'rslora': True},
  ],
  ids=str,
)
def test_the_whole_family_packs(changes):
  config = dataclasses.replace(LORA, **changes)
  short = dataclasses.replace(CONFIG, steps=3)
  cells = lambda: [job('o_proj', 0, config, watched=0), job('qkv,fc2', 1, config, watched=0)]
  for outcome, given in zip(together(cells(), short), cells(), strict=True):
    # PiSSA's singular vectors take the rounding of their products along.
    assert_same(outcome, alone(given, short), tolerance=5e-4)


def test_what_drops_out_of_a_row_does_not_depend_on_the_rows_that_run_with_it():
  short = dataclasses.replace(CONFIG, steps=3, positions=ROWS * LENGTH)
  assert part_rows(ROWS, LENGTH, 1, short.positions) == 2 * part_rows(
    ROWS, LENGTH, 2, short.positions
  )
  config = dataclasses.replace(LORA, dropout=0.3)
  cells = lambda: [job('o_proj', 0, config, watched=0), job('qkv,fc2', 1, config, watched=0)]
  for outcome, given in zip(together(cells(), short), cells(), strict=True):
    assert_same(outcome, alone(given, short))


@pytest.mark.slow
def test_fused_modules_pack_with_their_like():
  cells = lambda: [job('qkv_proj', 0), job('qkv_proj,fc2', 1)]
  for outcome, given in zip(together(cells()), cells(), strict=True):
    assert_same(outcome, alone(given))


def test_what_cannot_share_a_tree_is_of_another_kind():
  base = tiny_model.params()

  def kind(targets, **changes):
    config = dataclasses.replace(LORA, **changes)
    fresh = lora_family.init(jax.random.key(0), base, lora.resolve(targets, base), config)
    return packs.kind(fresh, config)

  alike = [kind('o_proj'), kind('all'), kind('fc2', rank=2), kind('o_proj', layers='0')]
  assert len({*alike}) == 1
  apart = [kind('all', dora=True), kind('all', init='pissa'), kind('all', dropout=0.1)]
  apart += [kind('all', train_also=('norm',)), kind('qkv_proj'), kind('qkv_proj,gate_up_proj')]
  assert len({*alike, *apart}) == 7


def test_a_cell_that_diverges_changes_no_other():
  good = lambda: job('o_proj', 0)
  hopeless = job('all', 1, optim=OptimConfig(learning_rate=float('inf')))
  batch = next(toy_batches())
  bad = batch | {'tokens': np.full_like(batch['tokens'], tiny_model.CONFIG.vocab_size)}
  poisoned = job('fc2', 2, batches=itertools.chain([batch], itertools.repeat(bad)))
  first, second, third = together([hopeless, good(), poisoned])
  assert isinstance(first, DivergedError)
  assert isinstance(third, DivergedError)
  assert_same(second, alone(good()))


def test_a_cell_that_stops_early_changes_no_other_and_is_not_changed():
  patient = dataclasses.replace(CONFIG, eval_every=1, patience=2, keep_best=True)
  # With so high a rate the loss on the rows kept out soon rises.
  hasty = lambda: job('all', 1, optim=OptimConfig(learning_rate=0.3, lr_ratio=1.0))
  steady = lambda: job('o_proj', 0)
  outcomes = together([hasty(), steady()], patient)
  assert outcomes[0].stopped == 'patience'
  assert len(outcomes[0].losses) < len(outcomes[1].losses)
  # At that rate rounding grows faster, too.
  assert_same(outcomes[0], alone(hasty(), patient), tolerance=5e-3)
  assert_same(outcomes[1], alone(steady(), patient))


def test_places_left_over_change_nothing():
  cells = lambda: [job('o_proj', 0), job('fc2', 1)]
  outcomes = together(cells(), cells=4)
  assert len(outcomes) == 2
  for outcome, given in zip(outcomes, cells(), strict=True):
    assert outcome.cells == 2
    assert_same(outcome, alone(given))


def test_what_is_not_a_cells_own_stays_zero():
  base = tiny_model.params()
  wave = prepare(base, [job('o_proj'), job('all', lora_config=LoraConfig(rank=2))], 3)
  states, step = wave.states, make_step(MODEL, 2)
  for batch in itertools.islice(toy_batches(), 3):
    states, _ = step(states, base, stack_batches([batch, batch]), np.asarray([True, True]))
  adapters = jax.tree.map(np.asarray, states.adapters)['layers']
  down = adapters['mlp']['down_proj']
  for leaf in down.values():
    assert not leaf[0].any()
    assert leaf[1].any()
  shared = adapters['attn']['o_proj']
  assert shared['a'].shape[-1] == LORA.rank
  assert shared['a'][0].all()
  assert shared['a'][1, ..., :2].all()
  assert not shared['a'][1, ..., 2:].any()
  assert not shared['b'][1, :, 2:].any()


def test_a_union_holds_and_gives_back_each_of_its_trees():
  base = tiny_model.params()
  trees = [tiny_model.trained_adapters(targets) for targets in ('o_proj', 'qkv', 'all')]
  shapes = packs.union(trees)
  assert shapes == packs.union([tiny_model.trained_adapters('all')])
  for tree in trees:
    tiny_model.assert_trees_close(packs.extract(packs.embed(tree, shapes), tree), tree, atol=0)
  attach = lambda tree, scale: lora.attach(base, tree, scale)
  tokens = tiny_model.tokens(2, 9)
  for tree in trees:
    own = packs.scales(tree, LORA, shapes)
    whole = tiny_model.logits(MODEL, attach(packs.embed(tree, shapes), own), tokens)
    np.testing.assert_allclose(
      whole, tiny_model.logits(MODEL, attach(tree, LORA.scale), tokens), atol=1e-5
    )


def test_the_base_is_multiplied_once_for_all_cells():
  """No product with a frozen kernel has the cells as a batch dimension."""
  base = tiny_model.params()
  wave = prepare(base, [job('all', seed) for seed in range(3)], 2)
  batch = stack_batches([next(toy_batches(seed)) for seed in range(3)])
  active = np.ones(3, bool)
  traced = make_step(MODEL, 3).trace(wave.states, base, batch, active)
  shapes = {leaf.shape[1:] for path, leaf in jax.tree_util.tree_leaves_with_path(base['layers'])
            if path[-1].key == 'kernel'}  # fmt: skip
  found = 0
  for equation in _equations(traced.jaxpr.jaxpr):
    if equation.primitive.name == 'dot_general' and equation.invars[1].aval.shape in shapes:
      (_, _), (batched, _) = equation.params['dimension_numbers']
      assert not batched
      assert equation.invars[0].aval.size % (3 * ROWS * LENGTH) == 0
      found += 1
  assert found >= 7


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      [*equation.params.values()], is_leaf=lambda value: _jaxpr_of(value) is not None
    ):
      if _jaxpr_of(value) is not None:
        yield from _equations(_jaxpr_of(value))


def _jaxpr_of(value):
  """What an equation's parameter holds of a program, closed or open."""
  inner = getattr(value, 'jaxpr', value)
  return inner if hasattr(inner, 'eqns') else None


@pytest.mark.parametrize(
  ('wanted', 'available', 'expected'),
  [(8, 900, 8), (8, 600, 5), (8, 130, 1), (1, 0, 1), (3, 350, 2)],
)
def test_as_many_cells_as_fit(wanted, available, expected):
  tried = []

  def need(cells):
    tried.append(cells)
    assert cells > 1
    return 100 + 100 * cells

  assert packs.largest(wanted, need, available) == expected
  assert len(tried) <= 2


def test_a_programs_memory_grows_with_its_cells():
  base = tiny_model.params()

  def need(cells):
    wave = prepare(base, [job('all')] * cells, 2)
    batch = stack_batches([next(toy_batches())] * cells)
    lowered = make_step(MODEL, cells).lower(wave.states, base, batch, np.ones(cells, bool))
    return packs.program_bytes(lowered.compile(), 0)

  assert need(4) > 1.5 * need(1)
  assert packs.free_bytes() > 2**20


def test_free_memory_is_read_where_there_is_something_to_read(tmp_path):
  file = tmp_path / 'meminfo'
  file.write_text('MemTotal: 100 kB\nMemAvailable:    2000 kB\n')
  assert packs.free_bytes(file) == int(0.9 * 2000 * 1024)
  assert packs.free_bytes(tmp_path / 'none') is None

import dataclasses
import time

import jax
import numpy as np
import pytest
import tiny_model
from packs_test import alone, assert_same, job
from train_test import LENGTH, LORA, ROWS, STEPS

from lora_jax import grid, packs
from lora_jax.config import OptimConfig
from lora_jax.data.pipeline import BatchShape
from lora_jax.grid import Trainer
from lora_jax.presets import ARTICLE_TARGETS
from lora_jax.programs import Programs
from lora_jax.train import DivergedError

MODEL = tiny_model.MODEL
SHAPE = BatchShape(ROWS, LENGTH)
CONFIG = dataclasses.replace(STEPS, steps=2, eval_every=2)


def trained(jobs, cells=0, config=CONFIG):
  """Outcome of each job, in the order of the jobs, and the sizes of the waves."""
  trainer = Trainer(MODEL, tiny_model.params(), config, cells)
  found, sizes = {}, []
  for wave, outcomes in trainer.train(jobs, SHAPE):
    found |= {id(one): outcome for one, outcome in zip(wave.jobs, outcomes, strict=True)}
    sizes.append((len(wave.jobs), wave.cells))
  return [found[id(one)] for one in jobs], sizes


@pytest.mark.slow
def test_waves_are_even_and_every_job_is_trained_as_alone():
  cells = [(targets, seed) for targets in ('o_proj', 'fc2') for seed in range(2)] + [('all', 5)]
  outcomes, sizes = trained([job(*cell) for cell in cells], cells=3)
  assert sizes == [(3, 3), (2, 3)]
  for cell, outcome in zip(cells, outcomes, strict=True):
    assert_same(outcome, alone(job(*cell), CONFIG))


@pytest.mark.slow
def test_kinds_that_share_no_tree_take_turns():
  dora = dataclasses.replace(LORA, dora=True)
  jobs = [job('o_proj'), job('qkv_proj'), job('fc2', lora_config=dora), job('fc1', 1)]
  outcomes, sizes = trained(jobs)
  assert sorted(sizes) == [(1, 1), (1, 1), (2, 2)]
  assert not any(isinstance(outcome, DivergedError) for outcome in outcomes)
  assert 'm' in outcomes[2].adapters['layers']['mlp']['down_proj']


def test_a_last_wave_that_is_not_full_uses_the_program_of_the_others():
  jobs = [job('o_proj', seed) for seed in range(3)]
  trainer = Trainer(MODEL, tiny_model.params(), CONFIG, cells=2)
  waves = []
  for wave, _ in trainer.train(jobs, SHAPE):
    waves.append((len(wave.jobs), wave.cells))
  assert waves == [(2, 2), (1, 2)]
  assert len(trainer._steps) == 1


def test_a_part_of_a_wave_is_scored_in_few_places_and_few_programs():
  jobs = [job(targets) for targets in ('o_proj', 'fc2', 'qkv', 'fc1', 'all')]
  ((wave, outcomes),) = Trainer(MODEL, tiny_model.params(), CONFIG, cells=5).train(jobs, SHAPE)
  sizes = []
  for count in range(1, 6):
    chosen = dict(enumerate(outcomes[-count:], start=5 - count))
    pack = wave.pack(chosen)
    sizes.append(pack.cells)
    for place, outcome in enumerate(chosen.values()):
      own = packs.extract(packs.take(pack.adapters, place), outcome.adapters)
      jax.tree.map(np.testing.assert_array_equal, own, outcome.adapters)
  assert sizes == [1, 2, 3, 5, 5]


def test_modules_of_one_shape_at_other_paths_are_another_program():
  trainer = Trainer(MODEL, tiny_model.params(), CONFIG)
  for targets in ('k_proj', 'v_proj'):
    ((_, (outcome,)),) = trainer.train([job(targets)], SHAPE)
    assert_same(outcome, alone(job(targets), CONFIG))


@pytest.mark.parametrize(
  ('jobs', 'cells', 'even'), [(4, 3, 2), (5, 5, 5), (7, 3, 3), (9, 4, 3), (1, 8, 1), (3, 0, 1)]
)
def test_waves_are_as_even_as_they_come(jobs, cells, even):
  assert grid._even(jobs, cells) == even


@pytest.mark.slow
def test_the_articles_grid_compiles_no_more_programs_than_two_of_its_sets():
  counts = []
  for sets in (('qkv', 'all'), ARTICLE_TARGETS, (*ARTICLE_TARGETS, 'q_proj', 'up_proj', 'k_proj')):
    jax.clear_caches()
    jobs = [job(targets, seed) for targets in sets for seed in (0, 1)]
    with Programs() as programs:
      trained(jobs, cells=2)
    counts.append(programs.count)
    assert programs.seconds > 0
  assert counts[0] == counts[1] == counts[2] > 0


def test_a_program_is_counted_once():
  doubled = jax.jit(lambda x: 2 * x)
  one, other = np.ones(3, np.float32), np.ones(4, np.float32)
  doubled(one)
  with Programs() as programs:
    doubled(one)
    assert programs.count == 0
    doubled(other)
    doubled(other)
  assert programs.count == 1
  doubled(np.ones(5, np.float32))
  assert str(programs).startswith('1 program')


@pytest.mark.slow
def test_what_runs_out_of_memory_goes_on_with_fewer_cells(monkeypatch, capsys):
  def scarce(model, base, wave, *rest, **options):
    if wave.cells > 1:
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.')
    return train_wave(model, base, wave, *rest, **options)

  train_wave = grid.train_wave
  monkeypatch.setattr(grid, 'train_wave', scarce)
  cells = [('o_proj', 0), ('fc2', 1), ('all', 2)]
  outcomes, sizes = trained([job(*cell) for cell in cells])
  assert sizes == [(1, 1)] * 3
  assert 'out of memory; 1 cells at a time' in capsys.readouterr().err
  for cell, outcome in zip(cells, outcomes, strict=True):
    assert_same(outcome, alone(job(*cell), CONFIG))


def test_compiling_a_step_ahead_is_part_of_its_waves_time(monkeypatch):
  def slow(trainer, wave, shape):
    if not trainer._steps:
      time.sleep(1.0)
    return compiled(trainer, wave, shape)

  compiled = Trainer._step
  monkeypatch.setattr(Trainer, '_step', slow)
  # Room for sizing a wave by its program, as on an accelerator.
  monkeypatch.setattr(packs, 'free_bytes', lambda: 2**40)
  begun = time.perf_counter()
  outcomes, sizes = trained([job('o_proj', seed) for seed in range(3)], cells=2)
  taken = time.perf_counter() - begun
  assert sizes == [(2, 2), (1, 2)]
  compiling = [outcome.compile_seconds for outcome in outcomes]
  # A cell's share of it, and none for the wave that finds the program compiled.
  assert compiling[0] == compiling[1] > 0.5 > compiling[2]
  assert all(outcome.seconds > outcome.compile_seconds for outcome in outcomes)
  assert sum(outcome.seconds for outcome in outcomes) <= taken


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
  def broken(*arguments, **options):
    raise jax.errors.JaxRuntimeError('INTERNAL: something else')

  monkeypatch.setattr(grid, 'train_wave', broken)
  with pytest.raises(jax.errors.JaxRuntimeError, match='something else'):
    trained([job('o_proj'), job('fc2')])


@pytest.mark.slow
def test_no_more_cells_are_planned_than_memory_holds(monkeypatch, capsys):
  jobs = [job('o_proj', seed) for seed in range(4)]
  needs = {}

  def program_bytes(compiled, resident):
    needs[len(needs)] = held(compiled, resident)
    return needs[len(needs) - 1]

  held = packs.program_bytes
  monkeypatch.setattr(packs, 'program_bytes', program_bytes)
  trained(jobs)
  (four,) = needs.values()
  monkeypatch.setattr(packs, 'free_bytes', lambda: int(0.6 * four))
  _, sizes = trained(jobs)
  assert sizes == [(2, 2), (2, 2)]
  assert 'of 4 cells fit in memory' in capsys.readouterr().err


def test_a_hopeless_cell_is_named_and_the_others_are_not():
  hopeless = job('all', 1, optim=OptimConfig(learning_rate=float('inf')))
  outcomes, _ = trained([job('o_proj'), hopeless], config=dataclasses.replace(CONFIG, steps=8))
  assert [isinstance(outcome, DivergedError) for outcome in outcomes] == [False, True]

"""A learning rate is chosen by the loss on rows kept out, once, and holds for all seeds."""

import dataclasses
import json
import types

import pytest
from study_test import GRID, SETTINGS, records, run

from lora_jax import sweep
from lora_jax.config import LoraConfig, OptimConfig
from lora_jax.errors import UserError
from lora_jax.records import Cell, RunDirectory
from lora_jax.train import DivergedError, Outcome, TrainJob

RATES = (1e-3, 1e-1)


def outcome(eval_losses, kept_step=2):
  return Outcome(
    adapters=object(), losses=[1.0], eval_losses=eval_losses, tokens=1, completion_tokens=1,
    examples=1, cells=1, seconds=1.0, compile_seconds=0.0, eval_seconds=0.0, bad_steps=0,
    kept_step=kept_step, stopped='finished',
  )  # fmt: skip


class Trainer:
  """Gives each trial what `found` says of its seed and rate, `size` trials a wave."""

  def __init__(self, found, size):
    self.found, self.size = found, size

  def train(self, jobs, shape, what):
    for at in range(0, len(jobs), self.size):
      wave = jobs[at : at + self.size]
      for job in wave:
        for step in (1, 2):
          job.log({'step': step, 'loss': job.optim.learning_rate})
      yield (
        types.SimpleNamespace(jobs=wave),
        [self.found[job.seed, job.optim.learning_rate] for job in wave],
      )


@pytest.mark.parametrize('size', [1, 2, 3, 4])
def test_the_lowest_loss_wins_whatever_trains_together(size):
  logs = ([], [])
  jobs = [
    TrainJob(('o_proj',), LoraConfig(), OptimConfig(), seed, list, log=logs[seed].append)
    for seed in (0, 1)
  ]
  found = {
    (0, 1e-3): outcome([(0, 0.1), (1, 2.0), (2, 3.0)]),
    (0, 1e-1): outcome([(0, 0.1), (1, 4.0), (2, 2.5)]),
    (1, 1e-3): DivergedError('not finite'),
    # The best adapter of this one is of its first step.
    (1, 1e-1): outcome([(0, 0.1), (1, 7.0), (2, 9.0)], kept_step=1),
  }
  chosen = [*sweep.choose(Trainer(found, size), jobs, RATES, None, 'rates')]
  assert [job for job, _, _ in chosen] == jobs
  assert chosen[0][1] == sweep.Choice(((1e-3, 3.0), (1e-1, 2.5)), 0)
  assert chosen[1][1] == sweep.Choice(((1e-3, None), (1e-1, 7.0)), 1)
  assert [choice.rate for _, choice, _ in chosen] == [1e-1, 1e-1]
  assert [best for _, _, best in chosen] == [found[0, 1e-1], found[1, 1e-1]]
  # What the chosen trial logged is the cell's, and nothing of the others is.
  assert logs == ([{'step': 1, 'loss': 1e-1}, {'step': 2, 'loss': 1e-1}],) * 2
  assert str(chosen[1][1]) == 'learning rate 0.1 of 0.001 diverged, 0.1 loss 7.0000'


def test_equal_losses_give_the_lower_rate_and_none_is_chosen_of_what_diverged():
  assert sweep.Choice(((1e-1, 2.0), (1e-3, 2.0)), 0).rate == 1e-3
  assert sweep.Choice(((1e-1, 0.0), (1e-3, None)), 0).rate == 1e-1
  refuse = lambda entry: pytest.fail('nothing was trained')
  jobs = [TrainJob(('o_proj',), LoraConfig(), OptimConfig(), 0, list, log=refuse)]
  found = dict.fromkeys([(0, rate) for rate in RATES], DivergedError('not finite'))
  ((_, choice, best),) = sweep.choose(Trainer(found, 2), jobs, RATES, None, 'rates')
  assert (choice.rate, best) == (1e-3, None)


def test_a_choice_is_kept_for_every_seed_and_for_those_rows_alone(tmp_path):
  directory, choice = RunDirectory(tmp_path), sweep.Choice(((1e-3, 1.5), (1e-1, None)), 0)
  cell, other = (Cell('tiny', 'medmcqa', 'o_proj', 'equal_rank', seed) for seed in (0, 7))
  sweep.Rates(RATES, directory).keep(cell, {'rows': 'a'}, choice)
  held = sweep.Rates(RATES, directory)
  assert held.chosen(other, {'rows': 'a'}) == held.chosen(other) == choice
  assert held.chosen(other, {'rows': 'b'}) is None
  assert held.chosen(dataclasses.replace(cell, arm='equal_parameters')) is None
  assert held.optim(other, OptimConfig()) == OptimConfig(learning_rate=1e-3)
  assert sweep.Rates((), directory).optim(other, OptimConfig()) == OptimConfig()


@pytest.mark.slow
def test_all_seeds_train_at_the_rate_that_was_chosen(tmp_path, monkeypatch):
  grid = dataclasses.replace(GRID, targets=('o_proj',), rates=RATES)
  run(tmp_path / 'out', tmp_path / 'cache', grid)
  # A seed that comes later is not asked again.
  tried = lambda trainer, jobs, *more: iter(jobs and pytest.fail('tried again'))
  monkeypatch.setattr('lora_jax.sweep.choose', tried)
  run(tmp_path / 'out', tmp_path / 'cache', dataclasses.replace(grid, seeds=(0, 1)))
  cells = {name: held for name, held in records(tmp_path / 'out').items() if 'seed' in name}
  assert len(cells) == 2
  kept = json.loads((tmp_path / 'out/rates/medmcqa-o_proj-equal_rank.json').read_text())
  losses = dict(kept['tried'])
  assert {*losses} == {*RATES}
  assert kept['chosen'] == min(losses, key=losses.get)
  for seed in (0, 1):
    record = cells[f'medmcqa-o_proj-equal_rank-seed{seed}.json']
    assert record['settings']['optim']['learning_rate'] == kept['chosen']
    assert record['rates'] == {name: kept[name] for name in ('tried', 'seed', 'chosen')}
    metrics = tmp_path / f'out/cells/medmcqa-o_proj-equal_rank-seed{seed}.metrics.jsonl'
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    logged = [entry['loss'] for entry in entries if 'loss' in entry]
    assert logged == record['train']['losses']
  # The first seed's adapter is the one that was tried: its loss decided.
  first = cells['medmcqa-o_proj-equal_rank-seed0.json']['train']
  assert dict(first['eval_losses'])[first['kept_step']] == losses[kept['chosen']]


def test_a_rate_cannot_be_chosen_without_rows(tmp_path):
  settings = dataclasses.replace(SETTINGS, train=dataclasses.replace(SETTINGS.train, train_rows=6))
  grid = dataclasses.replace(GRID, rates=RATES)
  with pytest.raises(UserError, match='medmcqa: no rows are kept out to choose'):
    run(tmp_path / 'out', tmp_path / 'cache', grid, settings)

"""A learning rate for each target set on each dataset, chosen by the loss on rows kept out.

Every rate is tried with one seed, and the best holds for all seeds. Rows kept out are of the
train split, so nothing of the test split has a part in the choice.

  for job, choice, outcome in choose(trainer, jobs, (1e-4, 5e-4), shape, 'rates'): ...
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.config import OptimConfig
from lora_jax.data.pipeline import BatchShape
from lora_jax.grid import Trainer
from lora_jax.records import Cell, RunDirectory, read_json, write_json
from lora_jax.train import DivergedError, Outcome, TrainJob


@dataclasses.dataclass(frozen=True)
class Choice:
  """The rates that were tried.

  Attributes:
    tried: (rate, loss of the adapter that it gives); None: it diverged.
    seed: of the run that tried them.
  """

  tried: tuple[tuple[float, float | None], ...]
  seed: int

  @property
  def rate(self) -> float:
    """The one with the lowest loss; of equal ones the lowest rate."""
    order = lambda of: (of[1] is None, of[1] or 0.0, of[0])
    return min(self.tried, key=order)[0]

  def __str__(self) -> str:
    told = ', '.join(
      f'{rate:g} diverged' if loss is None else f'{rate:g} loss {loss:.4f}'
      for rate, loss in self.tried
    )
    return f'learning rate {self.rate:g} of {told}'

  def record(self) -> dict[str, Any]:
    """As plain JSON values."""
    return {'tried': [[*pair] for pair in self.tried], 'seed': self.seed, 'chosen': self.rate}


class Rates:
  """The choices of a run, one file each in its directory."""

  def __init__(self, rates: Sequence[float], run: RunDirectory):
    """`rates` are those to try; none: all cells train at the settings' own."""
    self.rates, self._run = tuple(rates), run

  def chosen(self, cell: Cell, made_from: Mapping[str, str] | None = None) -> Choice | None:
    """What was chosen for the cell's target set, dataset and arm.

    Args:
      cell: of any seed.
      made_from: what the choice must have been made from; None: whatever it was.
    """
    file = self._file(cell)
    if not self.rates or not file.exists():
      return None
    held = read_json(file)
    if made_from is not None and held['provenance'] != made_from:
      return None
    return Choice(tuple((rate, loss) for rate, loss in held['tried']), held['seed'])

  def optim(self, cell: Cell, config: OptimConfig) -> OptimConfig:
    """How the cell trains: at the rate that was chosen, if one was."""
    choice = self.chosen(cell)
    return dataclasses.replace(config, learning_rate=choice.rate) if choice else config

  def keep(self, cell: Cell, made_from: Mapping[str, str], choice: Choice) -> None:
    """Writes a choice down, for this run and when it goes on."""
    write_json(self._file(cell), {'provenance': dict(made_from), **choice.record()})

  def _file(self, cell: Cell) -> Path:
    name = dataclasses.replace(cell, seed=0).name.removesuffix('-seed0')
    return self._run.path / 'rates' / f'{name}.json'


def choose(
  trainer: Trainer, jobs: Sequence[TrainJob], rates: Sequence[float], shape: BatchShape, what: str
) -> Iterator[tuple[TrainJob, Choice, Outcome | None]]:
  """Trains each job at each rate.

  Args:
    trainer: trains them, together where they fit.
    jobs: cells of one shape of batches, each with rows that watch its loss. Their logs are
      given what the best trial logged, once it is known.
    rates: peak rates of A.
    shape: that of the batches.
    what: name of the work for the progress display.

  Yields:
    Each job, which rate is best, and what it trained; None where all diverged.
  """
  at = lambda job, rate: dataclasses.replace(job.optim, learning_rate=rate)
  # All trials of a job would write to one file, so what each logs waits until one is chosen.
  logged: list[list[Mapping[str, float]]] = [[] for _ in jobs for _ in rates]
  trials = [
    dataclasses.replace(job, optim=at(job, rate), log=entries.append)
    for (job, rate), entries in zip(itertools.product(jobs, rates), logged, strict=True)
  ]
  found: dict[int, Outcome | DivergedError] = {}
  for wave, outcomes in trainer.train(trials, shape, what):
    found |= {trials.index(job): out for job, out in zip(wave.jobs, outcomes, strict=True)}
    done = [i for i in range(len(jobs)) if all(t in found for t in _trials(i, rates))]
    for i in done:
      own = [found.pop(t) for t in _trials(i, rates)]
      losses = [_loss(outcome) for outcome in own]
      choice = Choice(tuple(zip(rates, losses, strict=True)), jobs[i].seed)
      chosen = [*rates].index(choice.rate)
      won = own[chosen]
      best = won if isinstance(won, Outcome) else None
      for entry in logged[_trials(i, rates)[chosen]] if best else ():
        jobs[i].log(entry)
      yield jobs[i], choice, best


def _trials(job: int, rates: Sequence[float]) -> range:
  return range(job * len(rates), (job + 1) * len(rates))


def _loss(outcome: Outcome | DivergedError) -> float | None:
  """On the rows kept out, of the adapter that came of it."""
  if isinstance(outcome, DivergedError):
    return None
  losses = dict(outcome.eval_losses)
  loss = losses.get(outcome.kept_step, outcome.eval_losses[-1][1])
  return loss if math.isfinite(loss) else None

"""Trains adapters on one frozen base: one, or many cells of a grid together.

The base is an argument of the step, never part of its state: it is not
differentiated, optimised, donated or saved.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import lora_family, packs
from lora_jax.config import LoraConfig, OptimConfig, TrainConfig
from lora_jax.data.pipeline import Batch, counts
from lora_jax.progress import Progress
from lora_jax.step import (
  TrainState,
  init_state,
  make_evaluation,
  make_step,
  place,
  stack_batches,
)
from lora_jax.tracking import Log, finite
from lora_jax.transformer import Transformer

Params = Mapping[str, Any]

# Bad updates in a row after which a cell is given up.
_MAX_BAD_STEPS = 5


class DivergedError(Exception):
  """Loss or gradient stayed NaN or infinite; the text says at which step."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainJob:
  """A cell to train; equal to itself alone.

  Attributes:
    paths: the modules to adapt, from `lora.resolve`.
    lora: which of the LoRA family the adapter is.
    optim: hyperparameters.
    seed: of the initialisation and of dropout.
    batches: makes an endless stream, the same each time.
    eval_batches: what to watch the loss on; may be empty.
    log: receives {'step', 'loss', 'grad_norm'} of each step and {'step', 'eval_loss'}.
  """

  paths: Sequence[str]
  lora: LoraConfig
  optim: OptimConfig
  seed: int
  batches: Callable[[], Iterator[Batch]]
  eval_batches: Sequence[Batch] = ()
  log: Log = lambda metrics: None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A trained adapter and how it came about.

  Attributes:
    adapters: the adapter tree, as it was after `kept_step` updates.
    losses: mean completion loss of each step, nats a token.
    eval_losses: (step, loss) on the rows kept out; step 0 is the base.
    tokens: tokens of the rows seen, a prefix that they share counted for each; no padding.
    completion_tokens: those of them with a loss.
    examples: rows seen, counted each time.
    cells: how many cells trained together.
    seconds: this cell's share of the time of its wave, compilation included.
    compile_seconds: its share of the time until the first step had ended.
    eval_seconds: its share of the time spent on the rows kept out.
    bad_steps: updates left out because they were not finite.
    kept_step: updates that `adapters` has seen.
    stopped: 'finished', 'patience', 'interrupted' or 'diverged'.
  """

  adapters: Any
  losses: list[float]
  eval_losses: list[tuple[int, float]]
  tokens: int
  completion_tokens: int
  examples: int
  cells: int
  seconds: float
  compile_seconds: float
  eval_seconds: float
  bad_steps: int
  kept_step: int
  stopped: str

  def record(self) -> dict[str, Any]:
    """All but the adapter, as plain JSON values."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    del fields['adapters']
    fields['losses'] = [finite(loss) for loss in self.losses]
    fields['eval_losses'] = [[step, finite(loss)] for step, loss in self.eval_losses]
    return fields


@dataclasses.dataclass(frozen=True)
class Wave:
  """Cells that train together, before their first update.

  Attributes:
    jobs: the cells.
    fresh: the adapter of each, as it was initialised.
    states: their states, stacked; there may be more of them than jobs, which stand still.
  """

  jobs: Sequence[TrainJob]
  fresh: Sequence[Params]
  states: TrainState

  @property
  def cells(self) -> int:
    """C."""
    return self.states.step.shape[0]

  def pack(self, outcomes: Mapping[int, 'Outcome']) -> packs.Pack:
    """What came of some of the jobs, by their place, as a pack of C or fewer with them in front.

    C is halved while they fit: a few programs score any number, and the most that are there
    for nothing are half.
    """
    shapes = {path: leaf.shape[1:] for path, leaf in packs.flat(self.states.adapters).items()}
    whole = [
      packs.Pack(
        packs.embed(outcome.adapters, shapes),
        packs.scales(self.fresh[i], self.jobs[i].lora, shapes),
      )
      for i, outcome in outcomes.items()
    ]
    places = self.cells
    while (fewer := -(-places // 2)) >= len(whole) and fewer < places:
      places = fewer
    return packs.stack([*whole, *[whole[0]] * (places - len(whole))])


def prepare(
  base: Params,
  jobs: Sequence[TrainJob],
  steps: int,
  cells: int | None = None,
  shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Wave:
  """Initialises adapters and stacks them.

  Args:
    base: the frozen parameters.
    jobs: the cells, of one `packs.kind`.
    steps: updates in the whole run.
    cells: C; None: as many as there are jobs.
    shapes: those of the union tree; None: the smallest that holds these.
  """
  fresh = [lora_family.init(jax.random.key(job.seed), base, job.paths, job.lora) for job in jobs]
  shapes = packs.union(fresh) if shapes is None else shapes
  states = [
    init_state(adapters, job.lora, job.optim, steps, job.seed, shapes)
    for adapters, job in zip(fresh, jobs, strict=True)
  ]
  filled = [*states, *[states[0]] * ((cells or len(jobs)) - len(jobs))]
  return Wave(jobs, fresh, place(packs.stack(filled), base))


def train(
  model: Transformer,
  base: Params,
  job: TrainJob,
  config: TrainConfig,
  what: str = 'train',
  stop: Callable[[], bool] = lambda: False,
) -> Outcome:
  """Trains one adapter from its initialisation.

  Args:
    model: the Transformer, in the dtype and with the remat to train with.
    base: its frozen parameters.
    job: what to train, on what.
    config: length of the run, and which adapter it gives back.
    what: name of the run for the progress display.
    stop: asked before each step; where it says so, the run ends there.

  Returns:
    The outcome.

  Raises:
    DivergedError: several updates in a row, or all of them, were not finite, and there is
      no best adapter to give back.
  """
  (outcome,) = train_wave(model, base, prepare(base, [job], config.steps), config, what, stop)
  if isinstance(outcome, DivergedError):
    raise outcome
  return outcome


def train_wave(
  model: Transformer,
  base: Params,
  wave: Wave,
  config: TrainConfig,
  what: str = 'train',
  stop: Callable[[], bool] = lambda: False,
  step: Callable | None = None,
  evaluate: Callable | None = None,
  start: float | None = None,
) -> list[Outcome | DivergedError]:
  """Trains cells together, each as it would train alone.

  The learning rate falls over all of `config.steps`, whether or not a cell stops before.
  A cell that diverges or stops early stands still while the others go on.

  Args:
    model: the Transformer, in the dtype and with the remat to train with.
    base: its frozen parameters.
    wave: the cells, from `prepare`; its states are used up.
    config: length of the run, and which adapter it gives back.
    what: name of the run for the progress display.
    stop: asked before each step; where it says so, all end there.
    step: from `make_step`, compiled or not; None: made here.
    evaluate: from `make_evaluation`; None: made here.
    start: when work on the wave began, by `time.perf_counter`; None: now. Until the first step
      has ended it counts as compilation.

  Returns:
    For each job its outcome, or why there is none.
  """
  jobs, states = wave.jobs, wave.states
  if step is None:
    step = make_step(model, wave.cells, jobs[0].lora.dropout, states)
  evaluate = make_evaluation(model, wave.cells) if evaluate is None else evaluate
  tracks = [_Track(job, config) for job in jobs]
  streams = [job.batches() for job in jobs]
  watched = _watched(jobs, wave.cells, config.positions)
  latest: list[Batch] = [{}] * len(jobs)
  start = time.perf_counter() if start is None else start
  compile_seconds, eval_seconds = 0.0, 0.0

  still_running = lambda: [cell for cell, track in enumerate(tracks) if track.stopped is None]

  def record(number, metrics, running):
    """Reads a step's metrics, one step late, so that the device never waits for us."""
    metrics = {name: np.asarray(values) for name, values in metrics.items()}
    for cell in running:
      tracks[cell].record(number, {name: values[cell] for name, values in metrics.items()})
    losses = metrics['loss'][: len(jobs)]
    progress.advance(loss=float(np.mean(losses)))

  def watch(number):
    """The loss on the rows kept out."""
    nonlocal eval_seconds
    running = still_running()
    if not running:
      return
    eval_start = time.perf_counter()
    losses = evaluate(states.pack, base, watched)
    eval_seconds += time.perf_counter() - eval_start
    # Whole, once: cut on the device, every place and shape would be a program.
    host = functools.cache(lambda: jax.tree.map(np.asarray, states.adapters))
    for cell in running:
      tracks[cell].watch(number, float(losses[cell]), lambda cell=cell: packs.take(host(), cell))

  with Progress(what, config.steps) as progress:
    if watched and config.keep_best:
      # What the base has: to see whether any of it was of use, never itself the best.
      watch(0)
    pending = None
    for number in range(1, config.steps + 1):
      running = still_running()
      if running and stop():
        for cell in running:
          tracks[cell].stopped = 'interrupted'
        running = []
      if not running:
        break
      for cell in running:
        latest[cell] = next(streams[cell])
        tracks[cell].count(latest[cell])
      # Those that stand still see what they saw last, or what the first sees.
      batches = [batch or latest[running[0]] for batch in latest]
      batches += [batches[0]] * (wave.cells - len(batches))
      active_C = np.isin(np.arange(wave.cells), running)
      states, metrics = step(states, base, stack_batches(batches, config.positions), active_C)
      if pending is not None:
        record(*pending)
      else:
        jax.block_until_ready(metrics)
        compile_seconds = time.perf_counter() - start - eval_seconds
      pending = (number, metrics, running)
      if watched and (number % config.eval_every == 0 or number == config.steps):
        jax.block_until_ready(metrics)
        watch(number)
    if pending is not None:
      record(*pending)

  share = lambda seconds: seconds / len(jobs)
  seconds = {
    'cells': len(jobs),
    'seconds': share(time.perf_counter() - start),
    'compile_seconds': share(compile_seconds),
    'eval_seconds': share(eval_seconds),
  }
  last = jax.tree.map(np.asarray, states.adapters)
  return [
    track.outcome(lambda cell=cell: packs.take(last, cell), wave.fresh[cell], seconds)
    for cell, track in enumerate(tracks)
  ]


def _watched(jobs: Sequence[TrainJob], cells: int, positions: int) -> list[dict[str, Any]]:
  """The rows kept out of all cells, stacked; who has fewer batches sees some of weight 0."""
  most = max(len(job.eval_batches) for job in jobs)
  any_batch = next((job.eval_batches[0] for job in jobs if job.eval_batches), None)
  if any_batch is None:
    return []
  empty = {**any_batch, 'weights': np.zeros_like(any_batch['weights'])}
  filled = [[*job.eval_batches, *[empty] * (most - len(job.eval_batches))] for job in jobs]
  filled += [[empty] * most] * (cells - len(jobs))
  return [stack_batches([own[i] for own in filled], positions) for i in range(most)]


class _Track:
  """What is known of one cell while it trains."""

  def __init__(self, job: TrainJob, config: TrainConfig):
    self._job, self._config = job, config
    self.stopped: str | None = None
    self._why: DivergedError | None = None
    self._losses, self._eval_losses = [], []
    self._tokens = self._completion_tokens = self._examples = 0
    self._steps = self._bad_steps = self._waited = 0
    self._lowest, self._kept = math.inf, None

  def count(self, batch: Batch) -> None:
    """A batch that the cell is about to see."""
    seen = counts(batch)
    self._steps += 1
    self._tokens += seen.tokens
    self._completion_tokens += seen.completion_tokens
    self._examples += seen.examples

  def record(self, number: int, metrics: Mapping[str, np.ndarray]) -> None:
    """A step that was made; known one step late, so a cell that is over may hear of one more."""
    if self._why is not None:
      return
    loss, self._bad_steps = float(metrics['loss']), int(metrics['bad_steps'])
    self._losses.append(loss)
    self._job.log({'step': number, 'loss': loss, 'grad_norm': float(metrics['grad_norm'])})
    if int(metrics['bad_in_a_row']) >= _MAX_BAD_STEPS:
      self._diverge(f'{_MAX_BAD_STEPS} updates in a row were not finite, up to step {number}')

  def watch(self, number: int, loss: float, adapters: Callable[[], Any]) -> None:
    """The loss on the rows kept out, and how to get the adapters that have it."""
    if not self._job.eval_batches:
      return
    self._eval_losses.append((number, loss))
    self._job.log({'step': number, 'eval_loss': loss})
    if number == 0:
      return
    self._waited += 1
    if loss < self._lowest:
      self._lowest, self._waited = loss, 0
      if self._config.keep_best:
        self._kept = (number, adapters())
    if self._waited == self._config.patience > 0 and number < self._config.steps:
      self.stopped = 'patience'

  def outcome(
    self, last: Callable[[], Any], own: Params, seconds: Mapping[str, Any]
  ) -> 'Outcome | DivergedError':
    """How the cell ended, given the adapters that it has now and those that it began with."""
    if self._why is None and self._steps and self._bad_steps == self._steps:
      self._diverge(f'none of the {self._steps} updates was finite')
    if self._why is not None and self._kept is None:
      return self._why
    kept_step, whole = self._kept or (self._steps, last())
    return Outcome(
      adapters=packs.extract(whole, own),
      losses=self._losses,
      eval_losses=self._eval_losses,
      tokens=self._tokens,
      completion_tokens=self._completion_tokens,
      examples=self._examples,
      bad_steps=self._bad_steps,
      kept_step=kept_step,
      stopped=self.stopped or 'finished',
      **seconds,
    )

  def _diverge(self, why: str) -> None:
    self._why, self.stopped = DivergedError(why), 'diverged'

"""Trains any number of cells over one base, in waves, with few programs for all of them.

  trainer = Trainer(model, base, config)
  for wave, outcomes in trainer.train(jobs, shape): ...

A wave is as many cells as the device's memory holds, by what their compiled program
says that it takes; on a CPU, where more would take no less time, at most as many as fill
`CPU_POSITIONS`.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import lora_family, packs, sharding
from lora_jax.config import TrainConfig
from lora_jax.data.pipeline import BatchShape, empty_batch
from lora_jax.parts import CPU_POSITIONS
from lora_jax.step import for_batches, make_evaluation, make_step, stack_batches
from lora_jax.train import DivergedError, Outcome, TrainJob, Wave, prepare, train_wave
from lora_jax.transformer import Transformer

Params = Mapping[str, Any]


class Trainer:
  """Trains cells of a grid; programs are kept from one call to the next."""

  def __init__(self, model: Transformer, base: Params, config: TrainConfig, cells: int = 0):
    """Compiles nothing yet.

    Args:
      model: the Transformer, in the dtype and with the remat to train with.
      base: its frozen parameters.
      config: length of the runs, and which adapter each gives back.
      cells: at most so many train together; 0: as many as there is use and memory for.
    """
    self._model, self._base, self._config, self._most = model, base, config, cells
    self._resident = sharding.resident_bytes(base)
    self._steps: dict[tuple, jax.stages.Compiled] = {}
    self._evaluations: dict[tuple, Any] = {}

  def train(
    self, jobs: Sequence[TrainJob], shape: BatchShape, what: str = 'train'
  ) -> Iterator[tuple[Wave, list[Outcome | DivergedError]]]:
    """Trains all jobs, each as it would train alone.

    Args:
      jobs: the cells; their batches are all of one shape.
      shape: that of the batches.
      what: name of the work for the progress display.

    Yields:
      A wave and what came of its jobs, as soon as it has ended.
    """
    for group in self._kinds(jobs):
      union = packs.union([self._shapes(job) for job in group])
      waiting, done, start = [*group], 0, time.perf_counter()
      cells = self._cells(waiting, shape, union)
      while waiting:
        chosen = waiting[:cells]
        wave = prepare(self._base, chosen, self._config.steps, cells, union)
        try:
          outcomes = train_wave(
            self._model,
            self._base,
            wave,
            self._config,
            what if len(group) == 1 else f'{what}, {_place(done, chosen)} of {len(group)}',
            step=self._step(wave, shape),
            evaluate=self._evaluation(cells, shape),
            # What was compiled to see how many cells fit, or ran out of memory, is its cost too.
            start=start,
          )
        except jax.errors.JaxRuntimeError as error:
          if 'RESOURCE_EXHAUSTED' not in str(error) or cells == 1:
            raise
          cells = _even(len(waiting), cells // 2)
          print(f'{what}: out of memory; {cells} cells at a time from here', file=sys.stderr)
          continue
        waiting, done = waiting[cells:], done + len(chosen)
        yield wave, outcomes
        start = time.perf_counter()

  def _kinds(self, jobs: Sequence[TrainJob]) -> list[list[TrainJob]]:
    """Jobs that can share a union tree, together."""
    groups: dict[tuple, list[TrainJob]] = {}
    for job in jobs:
      groups.setdefault(packs.kind(self._shapes(job), job.lora), []).append(job)
    return [*groups.values()]

  def _shapes(self, job: TrainJob) -> Params:
    fresh = lambda: lora_family.init(jax.random.key(0), self._base, job.paths, job.lora)
    return jax.eval_shape(fresh)

  def _cells(self, jobs: Sequence[TrainJob], shape: BatchShape, union: Mapping[str, Any]) -> int:
    """How many of them to train together."""
    wanted = self._most or len(jobs)
    if not self._most and jax.default_backend() == 'cpu':
      # More at a time would take memory and no less time.
      wanted = max(1, CPU_POSITIONS // (shape.rows * shape.length))
    wanted = _even(len(jobs), min(wanted, len(jobs)))
    available = packs.free_bytes()
    if available is None or wanted == 1:
      return wanted

    def need(cells: int) -> int:
      wave = prepare(self._base, jobs[:cells], self._config.steps, cells, union)
      try:
        return packs.program_bytes(self._step(wave, shape), self._resident)
      except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
          raise
        return 2 * available

    fitting = packs.largest(wanted, need, available)
    if fitting < wanted:
      print(f'{fitting} of {wanted} cells fit in memory', file=sys.stderr)
    return _even(len(jobs), fitting)

  def _step(self, wave: Wave, shape: BatchShape) -> jax.stages.Compiled:
    """The compiled step of such waves."""
    dropout = wave.jobs[0].lora.dropout
    key = (shape, dropout, jax.tree.structure(wave.states), *_avals(wave.states))
    if key not in self._steps:
      batch = empty_batch(shape, self._model.config.model_dim, self._model.dtype)
      batches, active_C = (
        stack_batches([batch] * wave.cells, self._config.positions),
        np.ones(wave.cells, bool),
      )
      step = make_step(for_batches(self._model, shape), wave.cells, dropout, wave.states)
      self._steps[key] = step.lower(wave.states, self._base, batches, active_C).compile()
    return self._steps[key]

  def _evaluation(self, cells: int, shape: BatchShape) -> Any:
    key = (cells, shape)
    if key not in self._evaluations:
      self._evaluations[key] = make_evaluation(for_batches(self._model, shape), cells)
    return self._evaluations[key]


def _even(jobs: int, cells: int) -> int:
  """No more cells than `cells`, and waves as even as they come: fewer places stay empty."""
  waves = -(-jobs // max(1, cells))
  return -(-jobs // waves)


def _place(done: int, chosen: Sequence[TrainJob]) -> str:
  return f'cell {done + 1}' if len(chosen) == 1 else f'cells {done + 1}-{done + len(chosen)}'


def _avals(tree: Any) -> tuple:
  return tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree))

"""Runs a grid of cells: for each dataset the base, and each target set with each seed.

A cell that has a record is skipped, so a run that was stopped goes on where it was,
and a longer grid keeps what a shorter one computed.
"""

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checkpoint, latency, lora, lora_family, quantize
from lora_jax.data import builder
from lora_jax.data.encode import budget, encode_prompt
from lora_jax.data.pipeline import (
  batch_shape,
  encode_split,
  evaluation_batches,
  training_batches,
)
from lora_jax.data.sources import Source
from lora_jax.data.task import Task
from lora_jax.errors import UserError
from lora_jax.evaluate import Scores, score_task
from lora_jax.hub.bases import Base
from lora_jax.presets import EQUAL_RANK, Settings
from lora_jax.records import Cell, RunDirectory, versions
from lora_jax.tracking import json_lines
from lora_jax.train import DivergedError, train
from lora_jax.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Grid:
  """Which cells to run.

  Attributes:
    tasks: the datasets.
    targets: comma-joined target sets; each is one configuration.
    seeds: a cell of each target set for each seed.
  """

  tasks: tuple[Task, ...]
  targets: tuple[str, ...]
  seeds: tuple[int, ...]


class Study:
  """A grid over one base, written to one directory."""

  def __init__(
    self, settings: Settings, base: Base, source: Source, run: RunDirectory, cache_dir: Path
  ):
    """Puts the base on the device.

    Args:
      settings: what all cells share.
      base: the frozen model.
      source: where rows come from.
      run: where records go.
      cache_dir: where prepared rows are kept.
    """
    self._settings = settings
    self._base = base
    self._source = source
    self._run = run
    self._cache_dir = cache_dir
    dtype = jnp.dtype(settings.train.dtype)
    kind = settings.train.quantize
    self._params = quantize.store(base.params, dtype, kind)
    if kind != 'none':
      print(f'{kind}: {quantize.footprint(self._params)}', file=sys.stderr)
    self._model = Transformer(base.config, dtype=dtype)
    self._train_model = Transformer(base.config, dtype=dtype, remat=settings.train.remat)

  def run(self, grid: Grid) -> None:
    """Runs every cell that has no record, then times the target sets.

    Raises:
      UserError: rows that cannot be used, before anything is trained.
    """
    lora_family.check(self._settings.lora, grid.targets, self._params)
    for targets in grid.targets:
      print(f'{targets}: {self._summary(targets)}', file=sys.stderr)
    unfinished = {task.name: self._unfinished(task, grid) for task in grid.tasks}
    # All rows are read before the first cell, so that a bad one does not end a long run.
    rows = {
      task.name: _Rows(task, self._source, self._base, self._settings, self._cache_dir)
      for task in grid.tasks
      if unfinished[task.name] and not task.needs_vision
    }
    for task in grid.tasks:
      for cell in unfinished[task.name]:
        if task.needs_vision:
          record = {'status': 'needs vision', **self._provenance(task, None)}
          self._run.write_cell(cell, record)
        else:
          self._run_cell(task, cell, rows[task.name])
    self._time_targets(grid)

  def _summary(self, targets: str) -> lora.Summary:
    """What an adapter on `targets` holds, from its shapes alone."""
    paths = lora.resolve(targets, self._params)
    fresh = lambda: lora_family.init(jax.random.key(0), self._params, paths, self._settings.lora)
    shapes = jax.eval_shape(fresh)
    return lora.summarise(shapes, lora_family.plan(self._settings.lora, shapes).ranks)

  def _unfinished(self, task: Task, grid: Grid) -> list[Cell]:
    cells = [Cell(self._base.name, task.name, 'base', '', 0)]
    cells += [
      Cell(self._base.name, task.name, targets, EQUAL_RANK, seed)
      for targets in grid.targets
      for seed in grid.seeds
    ]
    made_from = self._made_from(task)
    return [cell for cell in cells if not self._run.finished(cell, made_from)]

  def _made_from(self, task: Task) -> dict[str, str]:
    """What a task's scores depend on beside the settings, in short."""
    rows = hashlib.sha256(self._source.fingerprint(task).encode()).hexdigest()
    return {'rows': rows, 'base': self._base.record['sha256']}

  def _run_cell(self, task: Task, cell: Cell, rows: '_Rows') -> None:
    record: dict[str, Any] = self._provenance(task, rows)
    label = f'{task.name} {cell.targets}' + ('' if cell.targets == 'base' else f' seed {cell.seed}')
    params = self._params
    if cell.targets != 'base':
      paths = lora.resolve(cell.targets, self._params)
      with self._run.open_metrics(cell) as metrics:
        try:
          outcome = train(
            self._train_model,
            self._params,
            paths,
            training_batches(rows.train, rows.shape, cell.seed),
            rows.eval_batches,
            self._settings.train,
            self._settings.lora,
            self._settings.optim,
            cell.seed,
            log=json_lines(metrics),
            what=f'train {label}',
          )
        except DivergedError as error:
          print(f'{label}: {error}', file=sys.stderr)
          self._run.write_cell(cell, {**record, 'status': 'diverged', 'why': str(error)})
          return
      checkpoint.save(self._run.cell_file(cell).with_suffix('.adapter'), outcome.adapters)
      plan = lora_family.plan(self._settings.lora, outcome.adapters)
      record['lora'] = dataclasses.asdict(lora.summarise(outcome.adapters, plan.ranks))
      record['train'] = outcome.record()
      params = lora.attach(self._params, outcome.adapters, plan.scales())
    scores = score_task(
      self._model,
      params,
      task,
      rows.test,
      self._base.tokenizer,
      rows.prompts,
      rows.limits.completion,
      self._settings.eval.batch_rows,
      what=f'score {label}',
    )
    record |= {'status': 'done', 'scores': _scores_record(scores)}
    said = [{'id': row.id, 'prediction': row.prediction, **row.scores} for row in scores.rows]
    self._run.write_cell(cell, record, said)
    print(f'{label}: {scores.headline} {scores.means[scores.headline]:.1f}', file=sys.stderr)

  def _provenance(self, task: Task, rows: '_Rows | None') -> dict[str, Any]:
    return {
      'settings': dataclasses.asdict(self._settings),
      'base': self._base.record,
      'provenance': self._made_from(task),
      'rows': {
        'source': self._source.kind,
        'description': self._source.describe(task),
        'note': task.note,
        **({} if rows is None else rows.counts()),
      },
      'versions': versions(),
    }

  def _time_targets(self, grid: Grid) -> None:
    """Times the base and all target sets together, unless that was done before."""
    held = (self._run.latency() or {'targets': {}})['targets']
    if set(grid.targets) <= set(held):
      return
    names = dict.fromkeys([*grid.targets, *(name for name in held if name != 'base')])
    paths = {targets: lora.resolve(targets, self._params) for targets in names}
    settings = self._settings
    times = latency.measure(self._model, self._params, paths, settings.lora, settings.latency_turns)
    device = jax.devices()[0].device_kind
    self._run.write_latency({'targets': times, 'device': device, 'dtype': settings.train.dtype})


class _Rows:
  """A dataset's rows as this base sees them: encoded, split and shaped."""

  def __init__(self, task: Task, source: Source, base: Base, settings: Settings, cache_dir: Path):
    config = settings.train
    splits = builder.prepare(task, source, cache_dir)
    max_length = min(config.max_length, base.config.max_length)
    self.limits = budget(task, max_length, settings.eval.max_new_tokens)
    self.test = splits['test'][: settings.eval.test_rows or None]
    self.prompts = [
      encode_prompt(task, example, base.tokenizer, self.limits.prompt) for example in self.test
    ]
    examples = splits['train'][: config.train_rows or None]
    encoded = encode_split(task, examples, base.tokenizer, self.limits)
    # The last rows watch the loss; too few rows to share all train.
    kept_out = config.eval_rows if len(encoded) >= 2 * config.eval_rows else 0
    self.train = encoded[: len(encoded) - kept_out]
    watched = encoded[len(encoded) - kept_out :]
    if not self.train:
      raise UserError(f'{task.name}: no train row fits in {max_length} tokens; raise --max_length')
    self.shape = batch_shape(encoded, config.tokens_per_batch)
    self.eval_batches = evaluation_batches(watched, self.shape) if watched else []
    self._counts = {
      'train': len(self.train),
      'eval': len(watched),
      'test': len(self.test),
      'left_out': len(examples) - len(encoded),
      'cut_completions': sum(row.cut for row in encoded),
      'batch_rows': self.shape.rows,
      'row_length': self.shape.length,
      'prompt_limit': self.limits.prompt,
    }
    if self._counts['cut_completions'] > len(encoded) / 2:
      print(
        f'{task.name}: {self._counts["cut_completions"]} of {len(encoded)} answers to learn are '
        f'longer than {self.limits.completion} tokens and are cut; raise --max_new_tokens',
        file=sys.stderr,
      )

  def counts(self) -> dict[str, int]:
    """For the record: how many rows, and in what shape."""
    return self._counts


def _scores_record(scores: Scores) -> dict[str, Any]:
  return {
    'headline': scores.headline,
    'means': scores.means,
    'rows': [{'id': row.id, **row.scores} for row in scores.rows],
    'generated_tokens': scores.generated_tokens,
    'unfinished': scores.unfinished,
    'seconds': scores.seconds,
  }

"""Runs a grid of cells: for each dataset the base, and each target set with each seed.

Cells whose batches have one shape train and are scored together, in waves (see `grid`).
A cell that has a record is skipped, so a run that was stopped goes on where it was,
and a longer grid keeps what a shorter one computed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checkpoint, latency, lora, lora_family, quantize
from lora_jax.data import builder
from lora_jax.data.encode import budget, encode_prompt
from lora_jax.data.pipeline import (
  BatchShape,
  batch_shape,
  encode_split,
  evaluation_batches,
  training_batches,
)
from lora_jax.data.sources import Source
from lora_jax.data.task import Task
from lora_jax.errors import UserError
from lora_jax.evaluate import Questions, Scores, score_pack, score_task
from lora_jax.grid import Trainer
from lora_jax.hub.bases import Base
from lora_jax.presets import EQUAL_RANK, Settings
from lora_jax.programs import Programs
from lora_jax.records import Cell, RunDirectory, read_json, versions, write_json
from lora_jax.tracking import Log, json_lines
from lora_jax.train import DivergedError, Outcome, TrainJob, Wave
from lora_jax.transformer import Transformer

# Beside an adapter that is trained and not yet scored: how it came about.
_TRAINED = '.trained'


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
    self,
    settings: Settings,
    base: Base,
    source: Source,
    run: RunDirectory,
    cache_dir: Path,
    cells: int = 0,
  ):
    """Puts the base on the device.

    Args:
      settings: what all cells share.
      base: the frozen model.
      source: where rows come from.
      run: where records go.
      cache_dir: where prepared rows are kept.
      cells: at most so many train together; 0: as many as there is use and memory for.
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
    to_train = Transformer(base.config, dtype=dtype, remat=settings.train.remat)
    self._trainer = Trainer(to_train, self._params, settings.train, cells)

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
    with Programs() as programs:
      for task in grid.tasks:
        for cell in unfinished[task.name]:
          if task.needs_vision:
            record = {'status': 'needs vision', **self._provenance(task, None)}
            self._run.write_cell(cell, record)
          elif cell.targets == 'base':
            self._score_base(task, cell, rows[task.name])
      for shape in dict.fromkeys(own.shape for own in rows.values()):
        cells = [
          _GridCell(cell, own)
          for name, own in rows.items()
          for cell in unfinished[name]
          if own.shape == shape and cell.targets != 'base'
        ]
        if cells:
          self._train_and_score(cells, shape)
    if rows:
      print(f'training and scoring: {programs}', file=sys.stderr)
    with Programs() as programs:
      self._time_targets(grid)
    if programs.count:
      print(f'timing: {programs}', file=sys.stderr)

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

  def _score_base(self, task: Task, cell: Cell, rows: '_Rows') -> None:
    scores = score_task(
      self._model,
      self._params,
      rows.questions,
      self._settings.eval.batch_rows,
      what=f'score {task.name} base',
    )
    self._write_scores(cell, f'{task.name} base', self._provenance(task, rows), scores)

  def _train_and_score(self, cells: Sequence['_GridCell'], shape: BatchShape) -> None:
    """Runs cells of one shape of batches; records are written as soon as a wave is scored."""
    # A run that was stopped while it scored has adapters that are not to be trained again.
    cells = [cell for cell in cells if not self._score_trained(cell)]
    datasets = '+'.join(dict.fromkeys(cell.cell.dataset for cell in cells))
    with contextlib.ExitStack() as files:
      jobs = [self._job(cell, files) for cell in cells]
      for wave, outcomes in self._trainer.train(jobs, shape, f'train {datasets}'):
        trained: dict[str, dict[int, tuple[_GridCell, Outcome]]] = {}
        for place, outcome in enumerate(outcomes):
          cell = cells[jobs.index(wave.jobs[place])]
          if isinstance(outcome, DivergedError):
            print(f'{cell.label}: {outcome}', file=sys.stderr)
            record = self._provenance(cell.rows.task, cell.rows)
            self._run.write_cell(cell.cell, {**record, 'status': 'diverged', 'why': str(outcome)})
          else:
            self._keep_trained(cell, outcome)
            trained.setdefault(cell.cell.dataset, {})[place] = (cell, outcome)
        for of_dataset in trained.values():
          self._score_wave(wave, of_dataset)

  def _score_wave(self, wave: Wave, trained: Mapping[int, tuple['_GridCell', Outcome]]) -> None:
    """Scores and records what came of one dataset's cells, by their place in a wave."""
    cells = [cell for cell, _ in trained.values()]
    rows = cells[0].rows
    what = cells[0].label if len(cells) == 1 else f'{rows.task.name}, {len(cells)} cells'
    scores = score_pack(
      self._model,
      self._params,
      wave.pack({place: outcome for place, (_, outcome) in trained.items()}),
      len(cells),
      rows.questions,
      self._settings.eval.batch_rows,
      what=f'score {what}',
    )
    for (cell, outcome), own in zip(trained.values(), scores, strict=True):
      self._write_trained(cell, outcome.adapters, outcome.record(), own)

  def _write_trained(
    self, cell: '_GridCell', adapters: Any, how: Mapping[str, Any], scores: Scores
  ) -> None:
    record = self._provenance(cell.rows.task, cell.rows)
    plan = lora_family.plan(self._settings.lora, adapters)
    record['lora'] = dataclasses.asdict(lora.summarise(adapters, plan.ranks))
    record['train'] = how
    self._write_scores(cell.cell, cell.label, record, scores)
    self._run.cell_file(cell.cell).with_suffix(_TRAINED).unlink(missing_ok=True)

  def _keep_trained(self, cell: '_GridCell', outcome: Outcome) -> None:
    """Puts an adapter on disk, and how it came about, until its record says so."""
    file = self._run.cell_file(cell.cell)
    checkpoint.save(file.with_suffix('.adapter'), outcome.adapters)
    held = {'provenance': self._made_from(cell.rows.task), 'train': outcome.record()}
    write_json(file.with_suffix(_TRAINED), held)

  def _score_trained(self, cell: '_GridCell') -> bool:
    """Scores a cell whose adapter an earlier run has left; False where there is none."""
    file = self._run.cell_file(cell.cell)
    try:
      held = read_json(file.with_suffix(_TRAINED))
      adapters = checkpoint.load(file.with_suffix('.adapter'))
    except UserError:
      return False
    if held['provenance'] != self._made_from(cell.rows.task):
      return False
    scales = lora_family.plan(self._settings.lora, adapters).scales()
    scores = score_task(
      self._model,
      lora.attach(self._params, adapters, scales),
      cell.rows.questions,
      self._settings.eval.batch_rows,
      what=f'score {cell.label}',
    )
    self._write_trained(cell, adapters, held['train'], scores)
    return True

  def _job(self, cell: '_GridCell', files: contextlib.ExitStack) -> TrainJob:
    """What the trainer needs of a cell; its file of metrics is opened once there are some."""

    @functools.cache
    def lines() -> Log:
      return json_lines(files.enter_context(self._run.open_metrics(cell.cell)))

    rows, seed = cell.rows, cell.cell.seed
    return TrainJob(
      lora.resolve(cell.cell.targets, self._params),
      self._settings.lora,
      self._settings.optim,
      seed,
      lambda: training_batches(rows.train, rows.shape, seed),
      rows.eval_batches,
      lambda metrics: lines()(metrics),
    )

  def _write_scores(self, cell: Cell, label: str, record: dict[str, Any], scores: Scores) -> None:
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


@dataclasses.dataclass(frozen=True)
class _GridCell:
  """A cell to train, with what it is trained and scored on."""

  cell: Cell
  rows: '_Rows'

  @property
  def label(self) -> str:
    """For people."""
    return f'{self.cell.dataset} {self.cell.targets} seed {self.cell.seed}'


class _Rows:
  """A dataset's rows as this base sees them: encoded, split and shaped."""

  def __init__(self, task: Task, source: Source, base: Base, settings: Settings, cache_dir: Path):
    self.task, config = task, settings.train
    splits = builder.prepare(task, source, cache_dir)
    max_length = min(config.max_length, base.config.max_length)
    limits = budget(task, max_length, settings.eval.max_new_tokens)
    test = splits['test'][: settings.eval.test_rows or None]
    prompts = [encode_prompt(task, example, base.tokenizer, limits.prompt) for example in test]
    self.questions = Questions(task, test, prompts, base.tokenizer, limits.completion)
    examples = splits['train'][: config.train_rows or None]
    encoded = encode_split(task, examples, base.tokenizer, limits)
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
      'test': len(test),
      'left_out': len(examples) - len(encoded),
      'cut_completions': sum(row.cut for row in encoded),
      'batch_rows': self.shape.rows,
      'row_length': self.shape.length,
      'shared_prefix': len(self.shape.prefix),
      'prompt_limit': limits.prompt,
    }
    if self._counts['cut_completions'] > len(encoded) / 2:
      print(
        f'{task.name}: {self._counts["cut_completions"]} of {len(encoded)} answers to learn are '
        f'longer than {limits.completion} tokens and are cut; raise --max_new_tokens',
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

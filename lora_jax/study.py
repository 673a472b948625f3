"""Runs a grid of cells: for each dataset the base, and each target set with each seed.

Cells whose batches have one shape train and are scored together, in waves (see `grid`).
A cell that has a record is skipped, so a run that was stopped goes on where it was,
and a longer grid keeps what a shorter one computed.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lora_jax import arms, checkpoint, latency, lora, lora_family, quantize, sweep
from lora_jax.data.eyes import Eyes
from lora_jax.data.pipeline import BatchShape, training_batches
from lora_jax.data.sources import Source
from lora_jax.data.task import Task
from lora_jax.errors import UserError
from lora_jax.evaluate import Scores, score_pack, score_task
from lora_jax.grid import Trainer
from lora_jax.hub.base import Base
from lora_jax.presets import EQUAL_RANK, Settings
from lora_jax.programs import Programs
from lora_jax.provenance import Provenance, once
from lora_jax.records import Cell, RunDirectory, read_json, write_json
from lora_jax.sight import Sight
from lora_jax.targets import is_sight
from lora_jax.task_rows import TaskRows
from lora_jax.tracking import Log, json_lines
from lora_jax.train import DivergedError, Outcome, TrainJob, Wave
from lora_jax.transformer import Transformer
from lora_jax.versions import device

# Beside an adapter that is trained and not yet scored: how it came about.
_TRAINED = '.trained'


@dataclasses.dataclass(frozen=True)
class Grid:
  """Which cells to run.

  Attributes:
    tasks: the datasets.
    targets: comma-joined target sets; each is one configuration.
    seeds: a cell of each target set for each seed.
    arms: how the sets compare in size, of `presets.ARMS`; cells of each.
    rates: learning rates to choose from; none: the settings' own.
  """

  tasks: tuple[Task, ...]
  targets: tuple[str, ...]
  seeds: tuple[int, ...]
  arms: tuple[str, ...] = (EQUAL_RANK,)
  rates: tuple[float, ...] = ()


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
      cache_dir: where prepared rows, and features of their images, are kept.
      cells: at most so many train together; 0: as many as there is use and memory for.

    Raises:
      UserError: the settings are about images, and the base does not see.
    """
    self._settings = settings
    self._base = base
    self._source = once(source)
    self._provenance = Provenance(base, self._source)
    self._run = run
    self._cache_dir = cache_dir
    dtype = jnp.dtype(settings.train.dtype)
    kind = settings.train.quantize
    self._params = quantize.store(base.params, dtype, kind)
    self._sizes: dict[tuple[str, str], arms.Sized] = {}
    self._rates = sweep.Rates((), run)
    if kind != 'none':
      print(f'{kind}: {quantize.footprint(self._params)}', file=sys.stderr)
    self._model = Transformer(base.config, dtype=dtype)
    self._sight = self._open_eyes()
    to_train = Transformer(base.config, dtype=dtype, remat=settings.train.remat)
    self._trainer = Trainer(to_train, self._params, settings.train, cells)

  def run(self, grid: Grid) -> None:
    """Runs every cell that has no record, then times the target sets.

    Raises:
      UserError: rows that cannot be used, before anything is trained.
    """
    self._rates = sweep.Rates(grid.rates, self._run)
    lora_family.check(self._settings.lora, grid.targets, self._params)
    for arm in grid.arms:
      for targets in grid.targets:
        print(f'{targets}: {self._sized(targets, arm)}', file=sys.stderr)
    self._check_frozen_sight(grid)
    unfinished = {task.name: self._unfinished(task, grid) for task in grid.tasks}
    # All rows are read before the first cell, so that a bad one does not end a long run.
    rows = {
      task.name: self._rows(task)
      for task in grid.tasks
      if unfinished[task.name] and self._posed(task) is not None
    }
    for name, own in rows.items():
      if grid.rates and not own.counts()['eval']:
        raise UserError(f'{name}: no rows are kept out to choose a learning rate by; see above')
    # And all images are looked at.
    for own in rows.values():
      own.look()
    if self._sight is not None and any(own.sight for own in rows.values()):
      print(self._sight, file=sys.stderr)
    with Programs() as programs:
      for task in grid.tasks:
        for cell in unfinished[task.name]:
          if task.name not in rows:
            self._run.write_cell(cell, {'status': 'needs vision', **self._about(task, None)})
          elif cell.targets == 'base':
            self._score_base(task, cell, rows[task.name])
      # Arms apart: in a union tree every cell pays for the highest rank of each module.
      shapes = dict.fromkeys(own.shape for own in rows.values())
      for arm, shape in itertools.product(grid.arms, shapes):
        cells = [
          _GridCell(cell, own)
          for name, own in rows.items()
          for cell in unfinished[name]
          if own.shape == shape and cell.arm == arm
        ]
        if cells:
          self._choose_rates(cells, shape)
          self._train_and_score(cells, shape)
    if rows:
      print(f'training and scoring: {programs}', file=sys.stderr)
    with Programs() as programs:
      self._time_targets(grid)
    if programs.count:
      print(f'timing: {programs}', file=sys.stderr)

  def _open_eyes(self) -> Sight | None:
    """The base's sight as the settings have it, or None where it does not see."""
    config, images, vision = self._settings.sight, self._base.images, self._base.config.vision
    if images is None or vision is None:
      for flag, value in dataclasses.asdict(config).items():
        if value:
          raise UserError(f'--{flag}: {self._base.name} does not see; leave it out')
      return None
    images = dataclasses.replace(images, longest_edge=config.image_edge or images.longest_edge)
    eyes = Eyes(vision, images, config.blank_images)
    return Sight(self._model, self._params, eyes, self._cache_dir / 'features')

  def _posed(self, task: Task) -> Task | None:
    return task.posed(sees=self._sight is not None)

  def _note(self, task: Task) -> str:
    """For the report: how the task is posed."""
    note = (self._posed(task) or task).note
    if task.by_image and self._settings.sight.blank_images:
      note += ' A grey image of the same size stands in the place of each.'
    return note

  def _rows(self, task: Task) -> TaskRows:
    settings, sight = self._settings, self._sight
    return TaskRows(task, self._source, self._base, settings, self._cache_dir, sight)

  def _check_frozen_sight(self, grid: Grid) -> None:
    """Raises `UserError` where features would change while an adapter trains."""
    if self._sight is None or not any(task.by_image for task in grid.tasks):
      return
    for targets in grid.targets:
      for path in lora.resolve(targets, self._params):
        if is_sight(path):
          raise UserError(
            f'{targets} adapts {path}, and images are seen once, before training; give targets '
            'of the language model, or --datasets without images'
          )

  def _sized(self, targets: str, arm: str) -> arms.Sized:
    if (targets, arm) not in self._sizes:
      sized = arms.size(targets, arm, self._settings.lora, self._params)
      self._sizes[targets, arm] = sized
    return self._sizes[targets, arm]

  def _unfinished(self, task: Task, grid: Grid) -> list[Cell]:
    cells = [Cell(self._base.name, task.name, 'base', '', 0)]
    cells += [
      Cell(self._base.name, task.name, targets, arm, seed)
      for arm in grid.arms
      for targets in grid.targets
      for seed in grid.seeds
    ]
    made_from = self._provenance.made_from(task)
    return [cell for cell in cells if not self._run.finished(cell, made_from)]

  def _score_base(self, task: Task, cell: Cell, rows: TaskRows) -> None:
    scores = score_task(
      self._model,
      self._params,
      rows.questions,
      self._settings.eval.batch_rows,
      what=f'score {task.name} base',
    )
    self._write_scores(cell, f'{task.name} base', self._about(task, rows), scores)

  def _choose_rates(self, cells: Sequence['_GridCell'], shape: BatchShape) -> None:
    """Tries the learning rates where none was chosen; what the best one trained is kept."""
    first: dict[Cell, _GridCell] = {}
    for cell in cells if self._rates.rates else ():
      if self._rates.chosen(cell.cell, self._provenance.made_from(cell.rows.task)) is None:
        first.setdefault(dataclasses.replace(cell.cell, seed=0), cell)
    with contextlib.ExitStack() as files:
      by_job = {self._job(cell, files): cell for cell in first.values()}
      rates, what = self._rates.rates, f'rates, {len(first)} x {len(self._rates.rates)} cells'
      for job, choice, outcome in sweep.choose(self._trainer, [*by_job], rates, shape, what):
        cell = by_job[job]
        print(f'{cell.label}: {choice}', file=sys.stderr)
        if outcome is not None:
          self._keep_trained(cell, outcome)
        self._rates.keep(cell.cell, self._provenance.made_from(cell.rows.task), choice)

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
            record = self._about(cell.rows.task, cell.rows, cell.cell)
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
    record = self._about(cell.rows.task, cell.rows, cell.cell)
    sized = self._sized(cell.cell.targets, cell.cell.arm)
    plan = lora_family.plan(sized.config, adapters)
    summary = lora.summarise(adapters, plan.ranks)
    record['lora'] = {**dataclasses.asdict(summary), **sized.record()}
    record['train'] = how
    self._write_scores(cell.cell, cell.label, record, scores)
    self._run.cell_file(cell.cell).with_suffix(_TRAINED).unlink(missing_ok=True)

  def _keep_trained(self, cell: '_GridCell', outcome: Outcome) -> None:
    """Puts an adapter on disk, and how it came about, until its record says so."""
    file = self._run.cell_file(cell.cell)
    checkpoint.save(file.with_suffix('.adapter'), outcome.adapters)
    held = {'provenance': self._provenance.made_from(cell.rows.task), 'train': outcome.record()}
    write_json(file.with_suffix(_TRAINED), held)

  def _score_trained(self, cell: '_GridCell') -> bool:
    """Scores a cell whose adapter an earlier run has left; False where there is none."""
    file = self._run.cell_file(cell.cell)
    try:
      held = read_json(file.with_suffix(_TRAINED))
      adapters = checkpoint.load(file.with_suffix('.adapter'))
    except UserError:
      return False
    if held['provenance'] != self._provenance.made_from(cell.rows.task):
      return False
    config = self._sized(cell.cell.targets, cell.cell.arm).config
    scales = lora_family.plan(config, adapters).scales()
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
      self._sized(cell.cell.targets, cell.cell.arm).config,
      self._rates.optim(cell.cell, self._settings.optim),
      seed,
      lambda: training_batches(rows.train, rows.shape, seed, rows.features),
      rows.eval_batches,
      lambda metrics: lines()(metrics),
    )

  def _write_scores(self, cell: Cell, label: str, record: dict[str, Any], scores: Scores) -> None:
    record |= {'status': 'done', 'scores': scores.record()}
    said = [{'id': row.id, 'prediction': row.prediction, **row.scores} for row in scores.rows]
    self._run.write_cell(cell, record, said)
    print(f'{label}: {scores.headline} {scores.means[scores.headline]:.1f}', file=sys.stderr)

  def _about(self, task: Task, rows: TaskRows | None, cell: Cell | None = None) -> dict[str, Any]:
    """What a record says of how it came about; with a cell, of that cell's own adapter."""
    settings, choice = self._settings, None
    if cell is not None:
      choice, adapter = self._rates.chosen(cell), self._sized(cell.targets, cell.arm).config
      optim = self._rates.optim(cell, settings.optim)
      settings = dataclasses.replace(settings, lora=adapter, optim=optim)
    return {
      **({'rates': choice.record()} if choice else {}),
      'settings': dataclasses.asdict(settings),
      **self._provenance.record(task, self._note(task), {} if rows is None else rows.counts()),
    }

  def _time_targets(self, grid: Grid) -> None:
    """Times the base and all target sets together, unless that was done before."""
    held = latency.timed(self._run.latency())
    asked = [(targets, arm) for arm in grid.arms for targets in grid.targets]
    if {*asked} <= {*held}:
      return
    sets = {
      of: (lora.resolve(of[0], self._params), self._sized(*of).config)
      for of in dict.fromkeys([*asked, *held])
    }
    settings = self._settings
    times = latency.measure(self._model, self._params, sets, settings.latency_turns)
    self._run.write_latency({**times, **device(), 'dtype': settings.train.dtype})


@dataclasses.dataclass(frozen=True)
class _GridCell:
  """A cell to train, with what it is trained and scored on."""

  cell: Cell
  rows: TaskRows

  @property
  def label(self) -> str:
    """For people."""
    arm = '' if self.cell.arm == EQUAL_RANK else f' {self.cell.arm}'
    return f'{self.cell.dataset} {self.cell.targets}{arm} seed {self.cell.seed}'

"""Trains one adapter on a user's own conversations and leaves a directory of it.

  OUT/adapter/        the adapter in PEFT's format: the best, or the last where no rows watch
  OUT/metrics.jsonl   loss of every step and of the rows kept out
  OUT/run.json        configuration, rows, base, versions, and how it ended

job = Job(base='smollm2-135m-instruct', targets='o_proj,fc2', data='my.jsonl')
rows = prepare(job, read(Path(job.data)), [], base)
result = run(job, base, model, params, rows, Path('out'))
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_jax import lora, lora_family
from lora_jax.config import FileConfig, LoraConfig, OptimConfig, TrainConfig
from lora_jax.data import messages
from lora_jax.data.encode import Encoded
from lora_jax.data.messages import Conversation
from lora_jax.data.pipeline import (
  BatchShape,
  batch_shape,
  batches_per_epoch,
  evaluation_batches,
  training_batches,
)
from lora_jax.errors import UserError
from lora_jax.hub import peft
from lora_jax.hub.adapters import ADAPTER
from lora_jax.hub.base import Base
from lora_jax.presets import OWN_ROWS
from lora_jax.records import FORMAT, RunDirectory, check_new, new_directory, write_json
from lora_jax.step import for_batches
from lora_jax.tracking import open_trackers
from lora_jax.train import DivergedError, Outcome, TrainJob, train
from lora_jax.transformer import Transformer
from lora_jax.versions import versions


@dataclasses.dataclass(frozen=True)
class Job:
  """All that decides a run, saved beside its adapter.

  Attributes:
    base: name of the base.
    targets: comma-joined modules to adapt.
    data: the user's file.
    eval_data: a file of rows that watch the loss, or '' for a share of `data`.
    seed: of initialisation, dropout, order of rows and which are kept out.
    lora: shape of the adapter.
    optim: hyperparameters.
    train: length of training; 0 steps: as many as `file.epochs` take.
    file: how the rows are used.
  """

  base: str
  targets: str
  data: str
  eval_data: str = ''
  seed: int = 0
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  train: TrainConfig = OWN_ROWS.train
  file: FileConfig = dataclasses.field(default_factory=FileConfig)


@dataclasses.dataclass(frozen=True)
class Rows:
  """A file's rows as a base sees them.

  Attributes:
    train: rows to learn.
    watched: rows to watch the loss on; may be none.
    shape: of batches that hold both.
    steps: updates in the whole run.
    notes: what a user should know of them, a sentence each.
  """

  train: list[Encoded]
  watched: list[Encoded]
  shape: BatchShape
  steps: int
  notes: list[str]


def prepare(
  job: Job, data: Sequence[Conversation], eval_data: Sequence[Conversation], base: Base
) -> Rows:
  """Encodes conversations and decides how long the run is.

  Args:
    job: the run.
    data: the conversations of `job.data`.
    eval_data: those of `job.eval_data`; none: a share of `data` is kept out.
    base: whose tokenizer and context are used.

  Raises:
    UserError: the chat template refuses a conversation, or none fits.
  """
  config = job.file
  if not eval_data:
    data, eval_data = messages.keep_out(data, config.eval_share, config.most_eval_rows, job.seed)
  length = min(job.train.max_length, base.config.max_length)
  encode = lambda rows: messages.encode(rows, base.tokenizer, length, config.last_only)
  learned, watched = encode(data), encode(eval_data)
  if not learned.rows:
    remedy = 'raise --max_length' if length < base.config.max_length else 'shorten the rows'
    raise UserError(f'{job.data}: no row fits in {length} tokens; {remedy}')
  shape = batch_shape([*learned.rows, *watched.rows], job.train.tokens_per_batch)
  steps = job.train.steps or max(1, round(config.epochs * batches_per_epoch(learned.rows, shape)))
  return Rows(learned.rows, watched.rows, shape, steps, learned.notes(length))


def run(
  job: Job,
  base: Base,
  model: Transformer,
  params: Any,
  rows: Rows,
  out: Path,
  trackers: Sequence[str] = (),
  stop: Callable[[], bool] = lambda: False,
) -> Outcome:
  """Trains, and writes the adapter and how it came about.

  Args:
    job: the run.
    base: the frozen model.
    model: its Transformer, in the dtype and with the remat to train with.
    params: its parameters on the device.
    rows: from `prepare`.
    out: the directory; the adapter appears in it whole or not at all.
    trackers: where metrics go beside the file, by name.
    stop: asked before each step; where it says so, what is best so far is kept.

  Returns:
    The outcome. Without one step, nothing is kept.

  Raises:
    DivergedError: as `train`; `run.json` says so too.
    UserError: the directory cannot be written to, is in use, or has an adapter; the
      configuration names what the base does not have.
  """
  lora_family.check(job.lora, [job.targets], params)
  check_new(out / ADAPTER)
  held = RunDirectory(out)
  held.lock()
  job = dataclasses.replace(job, train=dataclasses.replace(job.train, steps=rows.steps))
  record: dict[str, Any] = {
    'format': FORMAT,
    'job': dataclasses.asdict(job),
    'base': base.record,
    'rows': {
      'train': len(rows.train),
      'eval': len(rows.watched),
      'batch_rows': rows.shape.rows,
      'row_length': rows.shape.length,
      'notes': rows.notes,
    },
    'versions': versions(),
  }
  write_json(out / 'run.json', {**record, 'status': 'running'})
  watched = evaluation_batches(rows.watched, rows.shape) if rows.watched else []
  with open_trackers(out, trackers, out.resolve().name, record['job']) as log:
    try:
      to_train = TrainJob(
        lora.resolve(job.targets, params),
        job.lora,
        job.optim,
        job.seed,
        lambda: training_batches(rows.train, rows.shape, job.seed),
        watched,
        log,
      )
      outcome = train(for_batches(model, rows.shape), params, to_train, job.train, stop=stop)
    except DivergedError as error:
      write_json(out / 'run.json', {**record, 'status': 'diverged', 'why': str(error)})
      raise
  if outcome.kept_step:
    adapter = peft.of(
      outcome.adapters,
      job.lora,
      base=base.record.get('hub_id', ''),
      base_sha256=base.record['sha256'],
      targets=job.targets,
      sees=base.config.vision is not None,
    )
    with new_directory(out / ADAPTER) as directory:
      peft.save(directory, adapter)
    record['lora'] = dataclasses.asdict(lora.summarise(outcome.adapters, adapter.ranks))
  write_json(out / 'run.json', {**record, 'status': outcome.stopped, 'train': outcome.record()})
  return outcome

"""Training on quantised bases beside the same base as it is, on this machine.

  python -m benchmarks.quantized                     generated rows
  python -m benchmarks.quantized --data=DIR          the rows of DIR/cocohd
  python -m benchmarks.quantized --targets=o_proj,fc2 --targets=all --steps=40

Every kind trains from the same adapter on the same batches, and they take turns within
one process, step by step, so that a machine that drifts slows all of them alike. The loss
is that of completion tokens on rows that nobody trained on. `--json=FILE` keeps the records.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.table
from absl import app, flags, logging
from flax.traverse_util import flatten_dict
from rich.console import Console

from benchmarks import side
from experiments import _launcher
from lora_jax import lora
from lora_jax.config import QUANTIZE, LoraConfig, OptimConfig
from lora_jax.data import builder, encode, pipeline, sources, tasks
from lora_jax.errors import UserError, exit_on_user_error
from lora_jax.hub import bases
from lora_jax.progress import Progress
from lora_jax.quantize import footprint, store
from lora_jax.step import make_evaluation, make_step, stack_batches
from lora_jax.train import TrainJob, prepare
from lora_jax.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Options:
  """What to compare; see the flags."""

  base: str
  data: str | None
  dataset: str
  targets: tuple[str, ...]
  rank: int
  steps: int
  dtype: str
  tokens_per_batch: int
  max_length: int
  train_rows: int
  eval_rows: int


@dataclasses.dataclass(frozen=True)
class Run:
  """One kind of kernels with one set of targets.

  Attributes:
    targets: the adapted modules.
    kind: one of `QUANTIZE`.
    kernel_bytes: size of the blocks' kernels.
    weights: how many numbers these stand for.
    loss_before: on the rows kept out, without an adapter, nats a token.
    loss_after: after training.
    step_seconds: of each step; the first compiles.
  """

  targets: str
  kind: str
  kernel_bytes: int
  weights: int
  loss_before: float
  loss_after: float
  step_seconds: list[float]


@dataclasses.dataclass(frozen=True)
class Rows:
  """Encoded rows to train on and rows kept out, in batches of one shape."""

  train: list[encode.Encoded]
  shape: pipeline.BatchShape
  kept_out: list[pipeline.Batch]


def read_rows(options: Options, base: bases.Base) -> Rows:
  """The dataset's train split, its last rows kept out.

  Raises:
    UserError: there are not twice as many rows as are to be kept out.
  """
  (task,) = tasks.by_names([options.dataset])
  source = (
    sources.Directory(Path(options.data).expanduser())
    if options.data
    else sources.Synthetic(seed=0, train=options.train_rows + options.eval_rows, test=1)
  )
  with tempfile.TemporaryDirectory() as folder:
    examples = builder.prepare(task, source, folder)['train']
    examples = examples[: options.train_rows + options.eval_rows]
    limits = encode.budget(task, options.max_length, task.max_new_tokens)
    rows = pipeline.encode_split(task, examples, base.tokenizer, limits)
  if len(rows) < 2 * options.eval_rows:
    raise UserError(f'{len(rows)} rows are too few to keep {options.eval_rows} out')
  shape = pipeline.batch_shape(rows, options.tokens_per_batch)
  train, watched = rows[: -options.eval_rows], rows[-options.eval_rows :]
  return Rows(train, shape, pipeline.evaluation_batches(watched, shape))


def compare(options: Options) -> list[Run]:
  """Trains each set of targets on each kind of base."""
  base = bases.load(options.base)
  rows = read_rows(options, base)
  dtype = jnp.dtype(options.dtype)
  stored = {kind: store(base.params, dtype, kind) for kind in QUANTIZE}
  model = Transformer(base.config, dtype=dtype)
  runs = []
  for targets in options.targets:
    runs += train_in_turns(options, model, stored, rows, targets)
  return runs


def train_in_turns(
  options: Options, model: Transformer, stored: dict[str, Any], rows: Rows, targets: str
) -> list[Run]:
  """Trains one set of targets on all bases, a step of each at a time."""
  step, evaluate = make_step(model, 1), make_evaluation(model, 1)
  kept_out = [stack_batches([batch]) for batch in rows.kept_out]
  states, before = {}, {}
  for kind, base in stored.items():
    job = TrainJob(
      lora.resolve(targets, base),
      LoraConfig(rank=options.rank, alpha=2.0 * options.rank),
      OptimConfig(),
      0,
      lambda: pipeline.training_batches(rows.train, rows.shape, seed=0),
    )
    states[kind] = prepare(base, [job], options.steps).states
    before[kind] = float(evaluate(states[kind].pack, base, kept_out)[0])
  batches = pipeline.training_batches(rows.train, rows.shape, seed=0)
  seconds = {kind: [] for kind in stored}
  with Progress(f'train {targets}', options.steps) as progress:
    for _ in range(options.steps):
      batch = stack_batches([next(batches)])
      for kind, base in stored.items():
        start = time.perf_counter()
        states[kind], metrics = step(states[kind], base, batch, np.asarray([True]))
        loss = float(metrics['loss'][0])
        seconds[kind].append(time.perf_counter() - start)
      progress.advance(loss=loss)
  return [
    Run(
      targets=targets,
      kind=kind,
      kernel_bytes=_kernel_bytes(base),
      weights=footprint(stored['nf4']).weights,
      loss_before=before[kind],
      loss_after=float(evaluate(states[kind].pack, base, kept_out)[0]),
      step_seconds=seconds[kind],
    )
    for kind, base in stored.items()
  ]


def _kernel_bytes(params: Any) -> int:
  flat: dict[str, Any] = dict(flatten_dict(params, sep='/'))
  kernels = [flat[f'{path}/kernel'] for path in lora.targetable(params)]
  return sum(array.nbytes for array in jax.tree.leaves(kernels))


def table(runs: Sequence[Run], title: str) -> rich.table.Table:
  """One line a run: bytes, losses before and after, times; ratios to the plain base."""
  out = rich.table.Table(title=title, box=rich.box.SIMPLE)
  for column in ('targets', 'kernels'):
    out.add_column(column, no_wrap=True)
  for column in ('MiB', '/float16', 'before', 'after', 'ratio', 's/step', 'ratio'):
    out.add_column(column, no_wrap=True, justify='right')
  plain = {run.targets: run for run in runs if run.kind == 'none'}
  for run in runs:
    beside = plain[run.targets]
    # The first step compiles.
    own, of_plain = np.asarray(run.step_seconds[1:]), np.asarray(beside.step_seconds[1:])
    out.add_row(
      run.targets,
      run.kind,
      f'{run.kernel_bytes / 2**20:.1f}',
      f'{run.kernel_bytes / (2 * run.weights):.2f}',
      f'{run.loss_before:.4f}',
      f'{run.loss_after:.4f}',
      f'{run.loss_after / beside.loss_after:.4f}',
      f'{np.median(own):.2f}',
      f'{np.median(own / of_plain):.2f}',
    )
  return out


if __name__ == '__main__':
  _FLAGS = {
    'base': flags.DEFINE_string('base', 'smollm2-135m-instruct', 'Name or path of the base.'),
    'data': flags.DEFINE_string('data', None, 'Folder with the dataset; none: generated rows.'),
    'dataset': flags.DEFINE_string('dataset', 'cocohd', 'Whose rows.'),
    'targets': flags.DEFINE_multi_string(
      'targets', ['o_proj,fc2', 'all'], 'A set of targets; repeat the flag for more.'
    ),
    'rank': flags.DEFINE_integer('rank', 8, 'Rank.', lower_bound=1),
    'steps': flags.DEFINE_integer('steps', 40, 'Steps of each run.', lower_bound=2),
    'dtype': flags.DEFINE_enum(
      'dtype', 'float32', ['float32', 'bfloat16'], 'Of products, and of what is not quantised.'
    ),
    'tokens_per_batch': flags.DEFINE_integer('tokens_per_batch', 1024, 'Tokens of a step.'),
    'max_length': flags.DEFINE_integer('max_length', 512, 'Longest row, in tokens.'),
    'train_rows': flags.DEFINE_integer('train_rows', 512, 'Rows to train on.', lower_bound=1),
    'eval_rows': flags.DEFINE_integer('eval_rows', 32, 'Validation rows.', lower_bound=1),
  }
  _JSON = flags.DEFINE_string('json', None, 'Where to keep the records.')

  def _main(_):
    logging.set_verbosity(logging.WARNING)
    with exit_on_user_error():
      side.check_json(_JSON.value)
      values: dict[str, Any] = {name: flag.value for name, flag in _FLAGS.items()}
      values['targets'] = tuple(dict.fromkeys(map(lora.canonical, values['targets'])))
      options = Options(**values)
      runs = compare(options)
      if _JSON.value:
        record = {
          'options': dataclasses.asdict(options),
          'runs': [dataclasses.asdict(r) for r in runs],
        }
        Path(_JSON.value).write_text(json.dumps(record, indent=2))
      origin = 'generated rows' if options.data is None else f'rows of {Path(options.data).name}'
      title = f'{options.steps} steps of {options.dataset}, {origin}, {options.dtype}'
      # In a file, rich would cut columns to fit 80.
      Console(width=max(Console().width, 100)).print(table(runs, title))
      print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}', file=sys.stderr)

  _launcher.prefer_huge_pages()
  _launcher.prefer_wide_vectors()
  app.run(_main)

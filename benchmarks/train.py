"""Training speed and memory beside PEFT + transformers, and other peers, on this machine.

  python -m benchmarks.train                        random tokens, and generated rows
  python -m benchmarks.train --data=DIR             the same with the rows of DIR/medmcqa
  python -m benchmarks.train --peers=peft,tunix --peer_compile

Two settings, on the same weights:
  equal  batches of 4 x 256 random tokens, nothing to pad, a loss at every position
  rows   MedMCQA rows, each side batching its own way: PEFT 8 rows padded to the
         longest, ours packed

Tokens per second count tokens of rows, not padding. PEFT runs in float32 and bfloat16, with
--peer_compile under torch.compile too, and is judged by the fastest of these. Tunix, which
compiles anew for each shape of batch, runs in `equal` alone; it is installed on first use.
What is compiled is compiled before the timed steps: `compile` is what the steps before
them took beyond a step's own time.

`of peak` is the share of this machine's matrix peak (large square products in the same
dtype and process) that the FLOPs of the step come to, counted by `benchmarks.flops`.
Each run is a process of its own; its peak memory is that process's, or on a GPU what its
arrays took there. Both sides have their memory in large pages, as our launchers ask for it
and a run of PEFT only if told (BUILD_NOTES.md, Speed). On a CPU without bfloat16
instructions the bfloat16 runs take many minutes: `--peer_dtypes=float32` leaves PEFT's out.
`--json=FILE` keeps the records.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import rich.box
import rich.table
from absl import app, flags, logging
from rich.console import Console

from benchmarks import batches as batching
from benchmarks import flops, peer, side
from experiments import _launcher
from lora_jax import lora
from lora_jax.config import ModelConfig
from lora_jax.data import builder, encode, medmcqa, pipeline, sources
from lora_jax.errors import UserError, exit_on_user_error
from lora_jax.hub import bases, huggingface

DTYPES = ('float32', 'bfloat16')
PEERS = ('peft', 'tunix')
EQUAL_SHAPE = (4, 256)
PEER_ROWS = 8
# Steps of every run that are not timed.
WARMUP = 2


@dataclasses.dataclass(frozen=True)
class Sides:
  """Who trains.

  Attributes:
    dtype: of our side.
    peers: of `PEERS`.
    peer_dtypes: a run of each peer in each.
    peer_compile: whether PEFT runs under torch.compile too.
  """

  dtype: str
  peers: tuple[str, ...]
  peer_dtypes: tuple[str, ...]
  peer_compile: bool = False


@dataclasses.dataclass(frozen=True)
class Options:
  """What to compare; see the flags."""

  base: str
  data: str | None
  targets: str
  rank: int
  steps: int
  sides: Sides
  train_rows: int
  tokens_per_batch: int
  max_length: int


@dataclasses.dataclass(frozen=True)
class Work:
  """What both sides train: the model's shape, the adapted modules and their rank."""

  config: ModelConfig
  paths: tuple[str, ...]
  rank: int
  steps: int

  @property
  def modules(self) -> list[str]:
    """Names of the adapted modules, as peers know them."""
    return [path.rsplit('/', 1)[-1] for path in self.paths]


def our_run(
  work: Work,
  batches: Sequence[pipeline.Batch],
  dtype: str,
  source: Sequence[str],
  python: str = sys.executable,
) -> dict[str, Any]:
  """Trains on our side in a process of its own and returns its record, with rates.

  Args:
    work: what to train.
    batches: gone round as often as the steps need.
    dtype: of the base.
    source: where the weights come from and how they are run, as flags of `benchmarks.jax_side`.
    python: the interpreter.
  """
  with tempfile.TemporaryDirectory() as folder:
    file, out = Path(folder) / 'batches.npz', Path(folder) / 'record.json'
    batching.write(file, batches)
    command = [
      *(python, '-m', 'benchmarks.jax_side', *source),
      f'--dtype={dtype}',
      f'--targets={",".join(work.modules)}',
      f'--rank={work.rank}',
      f'--batches={file}',
      f'--steps={work.steps}',
      f'--warmup={WARMUP}',
      f'--out={out}',
    ]
    record = side.run(command, out, 'our side of the benchmark')
  counts = [
    flops.training_step(
      work.config,
      work.paths,
      work.rank,
      batching.computed_positions(batch),
      int((batch['weights'] > 0).sum()),
    )
    for batch in batches
  ]
  return with_rates(record, counts)


def their_counts(work: Work, batches: Sequence[batching.PaddedBatch]) -> list[int]:
  """FLOPs of a step on each of a peer's batches, whose labels are shifted by the peer."""
  return [
    flops.training_step(
      work.config,
      work.paths,
      work.rank,
      (batch.mask_BT.cumsum(axis=1) - 1)[batch.mask_BT > 0],
      int((batch.labels_BT[:, 1:] != batching.IGNORED).sum()),
    )
    for batch in batches
  ]


def with_rates(record: dict[str, Any], counts: Sequence[int]) -> dict[str, Any]:
  """A side's record with what follows from it.

  Args:
    record: what the side wrote.
    counts: FLOPs of a step on each of its batches.
  """
  seconds = sum(record['step_seconds'])
  rate = flops.total(counts, len(record['step_seconds']), WARMUP) / seconds
  warm, own = record['warm_seconds'], statistics.median(record['step_seconds'])
  return record | {
    'real_tokens_per_second': record['real_tokens'] / seconds,
    'padding': 1 - record['computed_tokens'] / record['padded_tokens'],
    'compile_seconds': max(0.0, sum(warm) - len(warm) * own),
    'flops_per_second': rate,
    'of_peak': rate / record['matrix_peak'],
  }


def compare_setting(
  work: Work, setting: batching.Setting, sides: Sides, weights: Path, python: str
) -> dict[str, dict[str, Any]]:
  """Runs all sides on one setting: name of a side -> its record."""
  runs = {}

  def keep(name: str, record: dict[str, Any]) -> None:
    # Runs take minutes; what one of them measured is not lost if a later one fails.
    rate = record['real_tokens_per_second']
    print(f'{setting.name}: {name} {rate:.0f} tokens/s', file=sys.stderr)
    runs[name] = record
    side.check_alike(next(iter(runs.values())), record, name)

  ours = our_run(work, setting.ours, sides.dtype, [f'--weights={weights}'], python)
  keep(f'lora_jax {sides.dtype}', ours)
  counts = their_counts(work, setting.theirs)
  shared = (weights, setting.theirs)
  for dtype in sides.peer_dtypes:
    rest = (dtype, work.modules, work.rank, work.steps)
    if 'peft' in sides.peers:
      for compiled in (False, True)[: 1 + sides.peer_compile]:
        name = f'PEFT {dtype}' + (' compile' if compiled else '')
        keep(name, with_rates(peer.run_peft(*shared, *rest, compiled), counts))
    if 'tunix' in sides.peers and setting.one_shape:
      keep(f'Tunix {dtype}', with_rates(peer.run_tunix(*shared, *rest), counts))
  return runs


def compare(options: Options, python: str = sys.executable) -> dict[str, dict[str, dict[str, Any]]]:
  """Runs both settings: setting -> name of a side -> its record; ours come first.

  Raises:
    UserError: a peer cannot be installed or run, before anything is trained; or a side failed.
  """
  peer.check_targets((options.targets,))
  prepare(options.sides)
  base = bases.load(options.base)
  paths = lora.resolve(options.targets, base.params)
  work = Work(base.config, paths, options.rank, options.steps)
  count = options.steps + WARMUP
  rows = read_rows(options, base)
  settings = [
    batching.equal_setting(base.config.vocab_size, EQUAL_SHAPE, count),
    batching.rows_setting(rows, options.tokens_per_batch, count, PEER_ROWS),
  ]
  with tempfile.TemporaryDirectory() as folder:
    weights = Path(folder)
    huggingface.save(weights, base.config, base.params, dtype='float32')
    del base
    found = {s.name: compare_setting(work, s, options.sides, weights, python) for s in settings}
  return of_the_machines_peak(found)


def of_the_machines_peak(
  records: dict[str, dict[str, dict[str, Any]]],
) -> dict[str, dict[str, dict[str, Any]]]:
  """Records whose 'of_peak' is of the most that any side reached with products of its dtype.

  Of its own library's peak, a side whose products are slower would look better.
  """
  runs = [run for setting in records.values() for run in setting.values()]
  peak = lambda dtype: max(run['matrix_peak'] for run in runs if run['dtype'] == dtype)
  shared = lambda run: {**run, 'of_peak': run['flops_per_second'] / peak(run['dtype'])}
  return {
    name: {side_name: shared(run) for side_name, run in setting.items()}
    for name, setting in records.items()
  }


def prepare(sides: Sides) -> None:
  """Makes the environments of peers, so that a missing Python shows before any download."""
  unknown = sorted({*sides.peers} - {*PEERS})
  if unknown or not sides.peers:
    raise UserError(f'--peers={",".join(sides.peers)}: give one or more of {", ".join(PEERS)}')
  if sides.peer_compile:
    peer.check_compiler()
  for name in sides.peers:
    (peer.python if name == 'peft' else peer.tunix_python)()


def read_rows(options: Options, base: bases.Base) -> list[encode.Encoded]:
  """MedMCQA's training rows, encoded."""
  source = (
    sources.Directory(Path(options.data).expanduser())
    if options.data
    else sources.Synthetic(seed=0, train=options.train_rows, test=1)
  )
  with tempfile.TemporaryDirectory() as folder:
    examples = builder.prepare(medmcqa.TASK, source, folder)['train'][: options.train_rows]
    limits = encode.budget(medmcqa.TASK, options.max_length, medmcqa.TASK.max_new_tokens)
    return pipeline.encode_split(medmcqa.TASK, examples, base.tokenizer, limits)


def table(records: dict[str, dict[str, dict[str, Any]]], title: str) -> rich.table.Table:
  """One line a run; the ratios are to the fastest PEFT, or peer where there is no PEFT."""
  out = rich.table.Table(title=title, box=rich.box.SIMPLE)
  for column in ('batches', 'side'):
    out.add_column(column, no_wrap=True)
  columns = ('tokens/s', 'ratio', 'padding', 'GFLOP/s', 'of peak', 'compile s', 'peak GiB', 'ratio')
  for column in columns:
    out.add_column(column, no_wrap=True, justify='right')
  for name, runs in records.items():
    peers = [run for side, run in runs.items() if not side.startswith('lora_jax')]
    peft = [run for side, run in runs.items() if side.startswith('PEFT')]
    best = max(peft or peers or [*runs.values()], key=lambda run: run['real_tokens_per_second'])
    for side_name, run in runs.items():
      rate = run['real_tokens_per_second']
      out.add_row(
        name,
        side_name,
        f'{rate:.0f}',
        f'{rate / best["real_tokens_per_second"]:.2f}x',
        f'{run["padding"]:.0%}',
        f'{run["flops_per_second"] / 1e9:.1f}',
        f'{run["of_peak"]:.0%}',
        f'{run["compile_seconds"]:.1f}',
        f'{run["peak_bytes"] / 2**30:.2f}',
        f'{run["peak_bytes"] / best["peak_bytes"]:.2f}x',
      )
  return out


def show(records: dict[str, dict[str, dict[str, Any]]], title: str) -> None:
  """Prints the table and what it was measured with."""
  # In a file, rich would cut columns to fit 80.
  Console(width=max(Console().width, 130)).print(table(records, title))
  runs = {name: run for setting in records.values() for name, run in setting.items()}
  for name, run in runs.items():
    programs = f'; {run["programs"]} programs compiled' if 'programs' in run else ''
    versions = ', '.join(f'{package} {version}' for package, version in run['versions'].items())
    print(f'{name}: matrix peak {run["matrix_peak"] / 1e9:.0f} GFLOP/s; {versions}{programs}')


if __name__ == '__main__':
  _FLAGS = {
    'base': flags.DEFINE_string('base', 'smollm2-135m-instruct', 'Name or path of the base.'),
    'data': flags.DEFINE_string('data', None, 'Folder with medmcqa/; none: generated rows.'),
    'targets': flags.DEFINE_string('targets', 'o_proj', 'One set of targets.'),
    'rank': flags.DEFINE_integer('rank', 8, 'Rank.', lower_bound=1),
    'steps': flags.DEFINE_integer('steps', 8, 'Timed steps of each run.', lower_bound=1),
    'dtype': flags.DEFINE_enum('dtype', 'bfloat16', DTYPES, 'Of our side.'),
    'peers': flags.DEFINE_list('peers', ['peft'], f'Of {", ".join(PEERS)}.'),
    'peer_dtypes': flags.DEFINE_multi_enum(
      'peer_dtypes', list(DTYPES), DTYPES, "Of the peers' side; repeat for more."
    ),
    'peer_compile': flags.DEFINE_bool('peer_compile', False, 'PEFT under torch.compile too.'),
    'train_rows': flags.DEFINE_integer(
      'train_rows', 400, 'Rows to draw batches from.', lower_bound=1
    ),
    'tokens_per_batch': flags.DEFINE_integer('tokens_per_batch', 2048, 'Of our packed batches.'),
    'max_length': flags.DEFINE_integer('max_length', 1024, 'Longest row, in tokens.'),
  }
  _JSON = flags.DEFINE_string('json', None, 'Where to keep the records.')

  def _main(_):
    logging.set_verbosity(logging.WARNING)
    # This process trains nothing; an accelerator's memory is for those that do.
    jax.config.update('jax_platforms', 'cpu')
    with exit_on_user_error():
      side.check_json(_JSON.value)
      values: dict[str, Any] = {name: flag.value for name, flag in _FLAGS.items()}
      of_sides = {name: values.pop(name) for name in ('dtype', 'peer_compile')}
      for name in ('peers', 'peer_dtypes'):
        of_sides[name] = tuple(dict.fromkeys(values.pop(name)))
      values['sides'] = Sides(**of_sides)
      records = compare(Options(**values))
      if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(records, indent=2))
      show(records, 'LoRA training; ratios to the fastest PEFT')

  # Inherited by every side.
  _launcher.prefer_huge_pages()
  app.run(_main)

"""Training speed and memory beside PEFT + transformers, on this machine.

  python -m benchmarks.train                        random tokens, and generated rows
  python -m benchmarks.train --data=DIR             the same with the rows of DIR/medmcqa

Two settings, on the same weights:
  equal  batches of 4 x 256 random tokens, nothing to pad, a loss at every position
  rows   MedMCQA rows, each side batching its own way: PEFT 8 rows padded to the
         longest, ours packed

Tokens per second count real tokens, not padding. PEFT runs in float32 and bfloat16
and is judged by the faster. Each run is a process of its own; its peak memory is that
process's. Both sides have their memory in large pages, as our launchers ask for it and a
run of PEFT only if told (BUILD_NOTES.md, Speed). On a CPU without bfloat16 instructions
the bfloat16 runs take many minutes: `--peer_dtypes=float32` leaves PEFT's out.
`--json=FILE` keeps the records.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
from absl import app, flags, logging
from rich.console import Console

from benchmarks import peer
from experiments import _launcher
from lora_jax import lora
from lora_jax.data import builder, encode, medmcqa, pipeline, sources
from lora_jax.errors import UserError, exit_on_user_error
from lora_jax.hub import bases

_DTYPES = ('float32', 'bfloat16')
_EQUAL_SHAPE = (4, 256)
_PEER_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Options:
  """What to compare; see the flags."""

  base: str
  data: str | None
  targets: str
  rank: int
  steps: int
  dtype: str
  peer_dtypes: tuple[str, ...]
  train_rows: int
  tokens_per_batch: int
  max_length: int


@dataclasses.dataclass(frozen=True)
class Setting:
  """The same rows, batched by each side."""

  name: str
  ours: list[pipeline.Batch]
  theirs: list[peer.PaddedBatch]


def equal_setting(vocab_size: int, count: int) -> Setting:
  """Random tokens in unpadded batches, a loss at every position."""
  rng = np.random.default_rng(0)
  rows, length = _EQUAL_SHAPE
  ours, theirs = [], []
  for _ in range(count):
    ids = rng.integers(0, vocab_size, (rows, length + 1), dtype=np.int32)
    ours.append(
      {
        'tokens': ids[:, :-1],
        'targets': ids[:, 1:],
        'weights': np.ones(_EQUAL_SHAPE, np.float32),
        'positions': np.broadcast_to(np.arange(length, dtype=np.int32), _EQUAL_SHAPE),
        'segments': np.ones(_EQUAL_SHAPE, np.int32),
      }
    )
    learned = np.ones(length, bool)
    theirs += peer.pad([(row, learned) for row in ids[:, :-1]], rows, pad_id=0)
  return Setting('equal', ours, theirs)


def rows_setting(rows: Sequence[encode.Encoded], tokens_per_batch: int, count: int) -> Setting:
  """Encoded rows, packed on our side and padded to the longest of 8 on theirs."""
  shape = pipeline.batch_shape(rows, tokens_per_batch)
  stream = pipeline.training_batches(rows, shape, seed=0)
  whole = []
  for row in rows:
    ids = [*row.arrays['tokens'], row.arrays['targets'][-1]]
    whole.append((ids, [False, *(row.arrays['weights'] > 0)]))
  order = np.random.default_rng(0).permutation(len(whole))
  theirs = peer.pad([whole[i] for i in order], _PEER_ROWS, pad_id=0)
  return Setting('rows', [next(stream) for _ in range(count)], theirs)


def run_ours(options: Options, batches: Sequence[pipeline.Batch]) -> dict[str, Any]:
  """Trains on our side in a process of its own and returns its record."""
  with tempfile.TemporaryDirectory() as folder:
    work = Path(folder)
    arrays: dict[str, Any] = {
      f'{name}_{i}': array for i, batch in enumerate(batches) for name, array in batch.items()
    }
    np.savez(work / 'batches.npz', **arrays)
    command = [
      *(sys.executable, '-m', 'benchmarks.jax_side'),
      f'--base={options.base}',
      f'--dtype={options.dtype}',
      f'--targets={options.targets}',
      f'--rank={options.rank}',
      f'--batches={work / "batches.npz"}',
      f'--steps={options.steps}',
      f'--out={work / "record.json"}',
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
      print(done.stderr, file=sys.stderr)
      raise UserError(f'our side of the benchmark ended with exit code {done.returncode}')
    return json.loads((work / 'record.json').read_text())


def compare(options: Options) -> dict[str, dict[str, Any]]:
  """Runs both settings: setting -> {'ours': record, 'float32': record, 'bfloat16': record}."""
  # First, so that a missing Python shows before any download.
  peer.python()
  base = bases.load(options.base)
  modules = [path.rsplit('/', 1)[-1] for path in lora.resolve(options.targets, base.params)]
  source = (
    sources.Directory(Path(options.data).expanduser())
    if options.data
    else sources.Synthetic(seed=0, train=options.train_rows, test=1)
  )
  with tempfile.TemporaryDirectory() as folder:
    examples = builder.prepare(medmcqa.TASK, source, folder)['train'][: options.train_rows]
    limits = encode.budget(medmcqa.TASK, options.max_length, medmcqa.TASK.max_new_tokens)
    rows = pipeline.encode_split(medmcqa.TASK, examples, base.tokenizer, limits)
  count = options.steps + 2
  settings = [
    equal_setting(base.config.vocab_size, count),
    rows_setting(rows, options.tokens_per_batch, count),
  ]
  records = {}
  for setting in settings:
    runs = {'ours': run_ours(options, setting.ours)}
    _tell(setting.name, f'lora_jax {options.dtype}', runs['ours'])
    for dtype in options.peer_dtypes:
      runs[dtype] = peer.run(
        base.config, base.params, setting.theirs, dtype, modules, options.rank, options.steps
      )
      _tell(setting.name, f'PEFT {dtype}', runs[dtype])
    records[setting.name] = runs
  return records


def _tell(setting: str, side: str, run: dict[str, Any]) -> None:
  # Runs take minutes; what one of them measured is not lost if a later one fails.
  print(f'{setting}: {side} {run["real_tokens_per_second"]:.0f} tokens/s', file=sys.stderr)


def table(records: dict[str, dict[str, Any]]) -> rich.table.Table:
  """One line a run; the ratios are to the faster peer."""
  out = rich.table.Table(title='LoRA training; ratios to the faster PEFT')
  for column in ('batches', 'side'):
    out.add_column(column, no_wrap=True)
  for column in ('tokens/s', 'ratio', 'padding', 'peak GiB', 'ratio'):
    out.add_column(column, no_wrap=True, justify='right')
  for name, runs in records.items():
    peers = [run for side, run in runs.items() if side != 'ours']
    best = max(peers, key=lambda run: run['real_tokens_per_second'])
    for side, run in runs.items():
      rate, padded = run['real_tokens_per_second'], run['padded_tokens_per_second']
      out.add_row(
        name,
        f'{"lora_jax" if side == "ours" else "PEFT"} {run["dtype"]}',
        f'{rate:.0f}',
        f'{rate / best["real_tokens_per_second"]:.2f}x',
        f'{1 - rate / padded:.0%}',
        f'{run["peak_bytes"] / 2**30:.2f}',
        f'{run["peak_bytes"] / best["peak_bytes"]:.2f}x',
      )
  return out


if __name__ == '__main__':
  _FLAGS = {
    'base': flags.DEFINE_string('base', 'smollm2-135m-instruct', 'Name or path of the base.'),
    'data': flags.DEFINE_string('data', None, 'Folder with medmcqa/; none: generated rows.'),
    'targets': flags.DEFINE_string('targets', 'o_proj', 'One set of targets.'),
    'rank': flags.DEFINE_integer('rank', 8, 'Rank.', lower_bound=1),
    'steps': flags.DEFINE_integer('steps', 8, 'Timed steps of each run.', lower_bound=1),
    'dtype': flags.DEFINE_enum('dtype', 'bfloat16', _DTYPES, 'Of our side.'),
    'peer_dtypes': flags.DEFINE_multi_enum(
      'peer_dtypes', list(_DTYPES), _DTYPES, "Of PEFT's side; repeat for more."
    ),
    'train_rows': flags.DEFINE_integer('train_rows', 400, 'Rows to draw batches from.'),
    'tokens_per_batch': flags.DEFINE_integer('tokens_per_batch', 2048, 'Of our packed batches.'),
    'max_length': flags.DEFINE_integer('max_length', 1024, 'Longest row, in tokens.'),
  }
  _JSON = flags.DEFINE_string('json', None, 'Where to keep the records.')

  def _main(_):
    logging.set_verbosity(logging.WARNING)
    with exit_on_user_error():
      values: dict[str, Any] = {name: flag.value for name, flag in _FLAGS.items()}
      values['peer_dtypes'] = tuple(dict.fromkeys(values['peer_dtypes']))
      options = Options(**values)
      records = compare(options)
      if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(records, indent=2))
      console = Console()
      console.print(table(records))
      for side in ('ours', options.peer_dtypes[0]):
        versions = records['equal'][side]['versions'].items()
        console.print(', '.join(f'{name} {version}' for name, version in versions))

  # Inherited by every side.
  _launcher.prefer_huge_pages()
  app.run(_main)

"""The serving engine: adapters beside none, many slots beside few, and PEFT's mixed batches.

  python -m benchmarks.serve                               o_proj and o_proj,fc2 on this machine
  python -m benchmarks.serve --rows=16 --slots=4,256 --peer_dtypes=float32,bfloat16

A batch of --rows requests, each with an adapter of its own, is answered to its last token by
the engine and by PEFT (`generate(adapter_names=...)`), greedily, on the same weights,
adapters and prompts. Within the engine, requests with adapters and without take turns, and
so do engines with different numbers of slots. `--json=FILE` keeps the records.
"""

import copy
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
from rich.console import Console

from benchmarks import measure, peer, side
from benchmarks.train import DTYPES
from experiments import _launcher
from lora_jax import lora, quantize
from lora_jax.errors import UserError, exit_on_user_error
from lora_jax.hub import bases, huggingface, peft
from lora_jax.hub.base import Base
from lora_jax.progress import Progress
from lora_jax.serve.answer import Request
from lora_jax.serve.config import ServeConfig
from lora_jax.serve.engine import Engine
from lora_jax.transformer import Transformer

# As an adapter's first steps leave it: what it adds is small, and its rows differ.
_NOISE = 0.02
# Times the tokens of a request that a row has room for.
_ROOM = 4


@dataclasses.dataclass(frozen=True)
class Options:
  """What to compare; see the flags."""

  base: str
  targets: tuple[str, ...]
  rank: int
  rows: int
  slots: tuple[int, ...]
  prompt_tokens: int
  new_tokens: int
  turns: int
  dtype: str
  peer_dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Work:
  """Rows to answer: prompts of one length, and the adapter of each."""

  ids: list[list[int]]
  adapters: list[str]

  @classmethod
  def of(cls, options: Options, vocabulary: int) -> 'Work':
    """Random tokens, and as many adapters as rows."""
    shape = (options.rows, options.prompt_tokens)
    ids = np.random.default_rng(0).integers(0, vocabulary, shape).tolist()
    return cls(ids, [f'adapter{i}' for i in range(options.rows)])


def write_adapters(directory: Path, base: Base, work: Work, targets: str, options: Options) -> None:
  """One for each name, in PEFT's format; A and B are random."""
  paths = lora.resolve(targets, base.params)
  for seed, name in enumerate(dict.fromkeys(work.adapters)):
    fresh = lora.init(jax.random.key(seed), base.params, paths, options.rank)
    rng = np.random.default_rng(seed)
    noisy = lambda leaf, rng=rng: (
      np.asarray(leaf) + rng.normal(0, _NOISE, leaf.shape).astype(np.float32)
    )
    made = peft.uniform(jax.tree.map(noisy, fresh), options.rank, 2.0 * options.rank, base.name)
    peft.save(directory / name, made)


def start(
  base: Base, params: Any, directory: Path, targets: str, slots: int, options: Options
) -> Engine:
  """An engine that has compiled all it needs."""
  tokenizer = copy.copy(base.tokenizer)
  # Answers go on to their last token on both sides.
  tokenizer.eos_id = -1
  length = options.prompt_tokens + options.new_tokens
  config = ServeConfig(
    rows=options.rows,
    # As in a server, there is room for more, so that short prompts are read together.
    length=_ROOM * length,
    shortest=options.prompt_tokens,
    slots=slots,
    rank=options.rank,
    targets=targets,
  )
  model = Transformer(base.config, dtype=jnp.dtype(options.dtype))
  engine = Engine(model, params, tokenizer, config, directory)
  engine.warm_up()
  return engine


def answer(
  engine: Engine, work: Work, adapters: Sequence[str], new_tokens: int
) -> tuple[dict[str, float], list[list[int]]]:
  """Answers all rows at once: seconds in all and of the steps that only decode, and tokens."""
  begin = time.perf_counter()
  answers = [
    engine.submit(Request(ids, adapter, new_tokens))
    for ids, adapter in zip(work.ids, adapters, strict=True)
  ]
  decoding, steps = 0.0, 0
  while engine.busy:
    waited, at = engine.counts.waiting, time.perf_counter()
    engine.step()
    if not waited:
      decoding, steps = decoding + time.perf_counter() - at, steps + 1
  taken = time.perf_counter() - begin
  said = [list(answer.ids) for answer in answers]
  return {'seconds': taken, 'step_seconds': decoding / max(steps, 1)}, said


def run_ours(base: Base, params: Any, directory: Path, targets: str, options: Options, work: Work):
  """Takes turns: with adapters, without, and with adapters in each other number of slots."""
  engines = {
    slots: start(base, params, directory, targets, slots, options)
    for slots in dict.fromkeys((options.rows, *options.slots))
  }
  contests: dict[str, tuple[Engine, list[str]]] = {
    'mixed': (engines[options.rows], work.adapters),
    'base': (engines[options.rows], [''] * options.rows),
  }
  for slots in options.slots:
    # As many different ones as the fewest slots hold, or some would wait for others.
    few = [work.adapters[i % min(options.slots)] for i in range(options.rows)]
    contests[f'{slots} slots'] = (engines[slots], few)
  times: dict[str, list[dict[str, float]]] = {name: [] for name in contests}
  said: list[list[int]] = []
  with Progress(f'{targets}: engine', (options.turns + 1) * len(contests), unit='run') as progress:
    for turn in range(options.turns + 1):
      for name, (engine, adapters) in contests.items():
        taken, out = answer(engine, work, adapters, options.new_tokens)
        if name == 'mixed':
          said = out
        # The first turn reads adapters from disk.
        if turn:
          times[name].append(taken)
        progress.advance()
  return times, said


def run_theirs(folder: Path, base: Base, dtype: str, options: Options, work: Work):
  """PEFT's record of the same work."""
  prompts = folder / 'prompts.json'
  prompts.write_text(json.dumps(dataclasses.asdict(work)))
  command = [
    *(str(peer.python()), '-m', 'benchmarks.peft_serve'),
    f'--weights={folder / "base"}',
    f'--adapters={folder / "adapters"}',
    f'--dtype={dtype}',
    f'--prompts={prompts}',
    f'--new_tokens={options.new_tokens}',
    f'--turns={options.turns}',
    f'--out={folder / "record.json"}',
  ]
  return side.run(command, folder / 'record.json', "PEFT's mixed batches")


def compare(options: Options) -> list[dict[str, Any]]:
  """Runs all target sets, on both sides.

  Raises:
    UserError: the base or the peer is not to be had.
  """
  base = bases.load(options.base)
  work = Work.of(options, base.config.vocab_size)
  params = quantize.store(base.params, options.dtype)
  records = []
  for targets in options.targets:
    with tempfile.TemporaryDirectory() as name:
      folder = Path(name)
      write_adapters(folder / 'adapters', base, work, targets, options)
      times, said = run_ours(base, params, folder / 'adapters', targets, options, work)
      record = {'targets': targets, 'ours': times, **measure.memory(), 'peers': {}}
      if options.peer_dtypes:
        huggingface.save(folder / 'base', base.config, base.params, dtype='float32')
      for dtype in options.peer_dtypes:
        theirs = run_theirs(folder, base, dtype, options, work)
        pairs = zip(said, theirs.pop('said'), strict=True)
        record['peers'][dtype] = {**theirs, 'rows_equal': sum(a == b for a, b in pairs)}
      records.append(record)
  return records


def table(records: Sequence[dict[str, Any]], options: Options) -> rich.table.Table:
  """Ratios of medians within turns, and tokens a second."""
  made = rich.table.Table(box=rich.box.SIMPLE)
  for title in ('targets', 'what', 'median', 'quartiles'):
    made.add_column(title, justify='left' if title in ('targets', 'what') else 'right')
  tokens = options.rows * options.new_tokens
  for record in records:
    ours = record['ours']
    of = lambda name, key='step_seconds', ours=ours: np.asarray([one[key] for one in ours[name]])
    lines = [
      ('a decoding step, over none with adapters', of('mixed') / of('base')),
      ('all of it, over none with adapters', of('mixed', 'seconds') / of('base', 'seconds')),
    ]
    for slots in options.slots[1:]:
      few = options.slots[0]
      ratio = of(f'{slots} slots') / of(f'{few} slots')
      lines.append((f'a decoding step, {slots} slots over {few}', ratio))
    lines.append(('engine, tokens/s', tokens / of('mixed', 'seconds')))
    for dtype, theirs in record['peers'].items():
      speed = tokens / np.asarray(theirs['seconds']['mixed'])
      same = f'{theirs["rows_equal"]} of {options.rows} rows equal'
      lines.append((f'PEFT {dtype}, tokens/s ({same})', speed))
      lines.append(
        (f'engine over PEFT {dtype}', np.median(tokens / of('mixed', 'seconds')) / speed)
      )
    for what, values in lines:
      low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
      made.add_row(record['targets'], what, f'{middle:.3g}', f'{low:.3g} to {high:.3g}')
  return made


def options_from_flags(values: dict[str, Any]) -> Options:
  """Raises `UserError` for values that make no sense."""
  slots, peer_dtypes = values['slots'], values['peer_dtypes']
  if not slots or not all(number.isdigit() and int(number) for number in slots):
    raise UserError(f'--slots={",".join(slots)}: give whole numbers above zero, as 4,256')
  if {*peer_dtypes} - {*DTYPES}:
    raise UserError(f'--peer_dtypes={",".join(peer_dtypes)}: give of {", ".join(DTYPES)}')
  targets = tuple(dict.fromkeys(map(lora.canonical, values['targets'])))
  peer.check_targets(targets)
  counts = tuple(sorted(map(int, slots)))
  return Options(**{**values, 'targets': targets, 'slots': counts, 'peer_dtypes': (*peer_dtypes,)})


if __name__ == '__main__':
  _FLAGS = {
    'base': flags.DEFINE_string('base', 'smollm2-135m-instruct', 'As in experiments.'),
    'targets': flags.DEFINE_multi_string('targets', ['o_proj', 'o_proj,fc2'], 'Sets to serve.'),
    'rank': flags.DEFINE_integer('rank', 16, 'Of the adapters.', lower_bound=1),
    'rows': flags.DEFINE_integer('rows', 16, 'Requests, each with its own adapter.', lower_bound=1),
    'slots': flags.DEFINE_list('slots', ['4', '256'], 'Slots of engines beside each other.'),
    'prompt_tokens': flags.DEFINE_integer('prompt_tokens', 32, 'Of each request.', lower_bound=1),
    'new_tokens': flags.DEFINE_integer('new_tokens', 32, 'Of each answer.', lower_bound=1),
    'turns': flags.DEFINE_integer('turns', 5, 'Runs of each, after one to warm up.', lower_bound=1),
    'dtype': flags.DEFINE_enum('dtype', 'float32', DTYPES, 'Of our side.'),
    'peer_dtypes': flags.DEFINE_list('peer_dtypes', ['float32'], 'Of PEFT; none: it is left out.'),
  }
  _JSON = flags.DEFINE_string('json', None, 'Where to keep the records.')

  def _main(_):
    logging.set_verbosity(logging.WARNING)
    with exit_on_user_error():
      side.check_json(_JSON.value)
      options = options_from_flags({name: flag.value for name, flag in _FLAGS.items()})
      bases.check_name(options.base)
      if options.peer_dtypes:
        peer.python()
      records = compare(options)
      if _JSON.value:
        kept = {'options': dataclasses.asdict(options), 'records': records}
        Path(_JSON.value).write_text(json.dumps(kept, indent=2))
      # In a file, rich would cut columns to fit 80.
      Console(width=max(Console().width, 100)).print(table(records, options))
      print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}', file=sys.stderr)

  _launcher.prefer_huge_pages()
  _launcher.prefer_wide_vectors()
  app.run(_main)

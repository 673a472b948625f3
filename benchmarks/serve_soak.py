"""A soak of the serving engine: thousands of steps, and all that they must leave as it was.

  python -m benchmarks.serve_soak                              256 adapters in 16 slots, 5,000 steps
  python -m benchmarks.serve_soak --steps=50000 --slots=4

Requests come at random to the base and to adapters of mixed targets and ranks, whole or in
part, greedy or drawn, with likelihoods or without; some are cancelled, and adapters are
unloaded and loaded again. A greedy answer must be the one that the adapter gives alone,
merged, and a drawn one the same each time. Nothing may be compiled, no row, slot or adapter
may stay in use, and the process may not grow.
"""

import collections
import copy
import dataclasses
import functools
import gc
import random
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
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console

from benchmarks import memory
from lora_jax import lora, quantize
from lora_jax.errors import UserError, exit_on_user_error
from lora_jax.generate import generate
from lora_jax.hub import bases, peft
from lora_jax.hub.base import Base
from lora_jax.programs import Programs
from lora_jax.progress import Progress
from lora_jax.sampling import Sampling
from lora_jax.serve.answer import Answer, Request
from lora_jax.serve.config import ServeConfig
from lora_jax.serve.engine import Engine
from lora_jax.transformer import Transformer

# What adapters adapt, and the ranks that they have.
SETS = ('o_proj', 'fc2', 'o_proj,fc2', 'qkv', 'fc1', 'qkv_proj,gate_up_proj', 'all')
RANKS = (1, 2, 3, 4, 8, 16)
# Of A and B; answers then differ from the base's and from each other's.
_NOISE = 0.2
_NEW, _LONGEST = 12, 24
# The likeliest token is so much likelier than the next that rounding does not choose it.
_CLEAR = 1e-3
# Ways to draw, of which each request has one, so that many come again.
_DRAWS = (Sampling(0.7, 0.9, seed=1), Sampling(1.5, top_k=40, seed=2), Sampling(1.0, seed=3))

# A greedy request, and the answer to it.
Known = tuple[Request, list[int]]


@dataclasses.dataclass
class Record:
  """What came of a soak.

  Attributes:
    steps: how many.
    seconds: that they took.
    finished: how many answers ended how.
    greedy: answers that were compared with what their adapter says alone.
    again: answers that were drawn, and compared with the same request's before.
    reloaded: adapters that were unloaded and loaded again while requests came.
    loads: adapters written to a slot.
    programs: compiled meanwhile.
    resident: bytes of the process after a quarter of the steps, and at the end.
    live: bytes of JAX's arrays, likewise.
    wrong: what should not have been.
  """

  steps: int = 0
  seconds: float = 0.0
  finished: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  greedy: int = 0
  again: int = 0
  reloaded: int = 0
  loads: int = 0
  programs: int = 0
  resident: list[int] = dataclasses.field(default_factory=list)
  live: list[int] = dataclasses.field(default_factory=list)
  wrong: list[str] = dataclasses.field(default_factory=list)

  @property
  def grown(self) -> int:
    """Bytes by which the process grew after the first quarter."""
    return self.resident[-1] - self.resident[0]


class Soak:
  """Asks a warm engine at random.

  It keeps nothing of answers that have ended, or it would grow itself.
  """

  def __init__(self, engine: Engine, known: Sequence[Known], seed: int = 0):
    """Asks nothing yet.

    Args:
      engine: warm and free.
      known: what may be asked, all by token ids and with a `max_tokens`.
      seed: of what is asked, and when.
    """
    self._engine, self._known = engine, known
    self._random = random.Random(seed)
    self._open: dict[Answer, tuple[list[int] | None, int | None]] = {}
    # Of each request that was drawn, the longest answer so far.
    self._drawn: dict[int | None, list[int]] = {}
    self.record = Record()

  def run(self, steps: int) -> Record:
    """Asks for so many steps, and then steps until all is answered."""
    engine, record, rng = self._engine, self.record, self._random
    before, begin = engine.counts, time.perf_counter()
    with Programs() as programs, Progress('soak', steps, unit='step') as progress:
      while record.steps < steps or engine.busy:
        if record.steps < steps:
          self._ask()
        if self._open and rng.random() < 0.08:
          self._cancel()
        if record.steps < steps and rng.random() < 0.04:
          self._reload()
        engine.step()
        self._compare()
        record.steps += 1
        if record.steps == steps // 4:
          self._weigh()
        progress.advance()
    record.seconds = time.perf_counter() - begin
    self._weigh()
    record.programs, record.loads = programs.count, engine.counts.loads - before.loads
    self._check(record.programs == 0, f'{record.programs} programs were compiled')
    self._check_free()
    return record

  def _ask(self) -> None:
    engine, rng, rows = self._engine, self._random, self._engine.config.rows
    if engine.counts.waiting > rows:
      return
    for _ in range(rng.choice((0, 0, 1, max(1, rows // 3)))):
      at = rng.randrange(len(self._known))
      request, ids = self._known[at]
      few = rng.randint(1, request.max_tokens or 1)
      likeliest = rng.choice((None, None, None, 3))
      changed = dataclasses.replace(
        request, max_tokens=few, likeliest=likeliest, echo=rng.random() < 0.3
      )
      key = None
      if rng.random() < 0.3:
        changed, key = dataclasses.replace(changed, sampling=_DRAWS[at % len(_DRAWS)]), at
      expected = ids[:few] if key is None else None
      self._open[engine.submit(changed)] = expected, key

  def _cancel(self) -> None:
    gone = self._random.choice([*self._open])
    self._engine.cancel(gone)
    self._check(gone.finish == 'cancelled', f'{gone.finish} after it was cancelled')

  def _reload(self) -> None:
    """Takes an adapter off the list and puts it back, whoever is being answered with it."""
    library = self._engine.library
    if library.names:
      name = self._random.choice(library.names)
      where = library.find(name).directory
      self._engine.unload(name)
      library.add(name, str(where))
      self.record.reloaded += 1

  def _compare(self) -> None:
    for answer in [one for one in self._open if one.finish is not None]:
      expected, key = self._open.pop(answer)
      finish, few, request = answer.finish, len(answer.ids), answer.request
      self.record.finished[finish] += 1
      self._check(finish in ('length', 'cancelled'), f'{finish}: {answer.error}')
      self._check(
        finish == 'cancelled' or few == request.max_tokens, f'{few} tokens of {request.max_tokens}'
      )
      told = few if request.likeliest is not None else 0
      self._check(len(answer.likelihoods) == told, f'{len(answer.likelihoods)} likelihoods')
      if expected is not None:
        self.record.greedy += 1
        self._check(
          answer.ids == expected[:few], f'{request.adapter or "the base"} said something else'
        )
        continue
      held = self._drawn.setdefault(key, [])
      self.record.again += bool(held)
      shorter = min(few, len(held))
      self._check(answer.ids[:shorter] == held[:shorter], f'{request.adapter} drew something else')
      self._drawn[key] = max(held, answer.ids, key=len)

  def _weigh(self) -> None:
    gc.collect()
    self.record.resident.append(memory.resident_bytes())
    self.record.live.append(sum(array.nbytes for array in jax.live_arrays()))

  def _check_free(self) -> None:
    """Nothing is in use, and what is unloaded leaves nothing."""
    engine, counts = self._engine, self._engine.counts
    at = (counts.waiting, counts.seated, counts.free_rows, counts.slots_in_use)
    self._check(at == (0, 0, engine.config.rows, 0), f'rows or slots are in use: {counts}')
    held = engine.library.nbytes
    self._check(held <= engine.config.host_bytes, f'{held} bytes of adapters in host memory')
    where = {name: engine.library.find(name).directory for name in engine.library.names}
    for name in where:
      engine.unload(name)
    self._check(not engine.on_device, f'{engine.on_device} are still in slots')
    self._check(not engine.library.nbytes, 'adapters are still in host memory')
    for name, directory in where.items():
      engine.library.add(name, str(directory))

  def _check(self, right: bool, wrong: str) -> None:
    # A few say it all.
    if not right and len(self.record.wrong) < 20:
      self.record.wrong.append(f'step {self.record.steps}: {wrong}')


def write_adapters(root: Path, base: Base, count: int) -> dict[str, peft.Adapter]:
  """Random adapters by name, of all sets and ranks in turn."""
  made = {}
  for i in range(count):
    rng = np.random.default_rng(i)
    paths, rank = lora.resolve(SETS[i % len(SETS)], base.params), RANKS[i % len(RANKS)]
    init = functools.partial(lora.init, paths=paths, rank=rank)
    fresh = jax.eval_shape(init, jax.random.key(0), base.params)
    noise = lambda leaf, rng=rng: rng.normal(0, _NOISE, leaf.shape).astype(np.float32)
    made[f'adapter-{i}'] = adapter = peft.uniform(jax.tree.map(noise, fresh), rank, float(rank))
    peft.save(root / f'adapter-{i}', adapter)
  return made


def merged(params: Any, adapter: peft.Adapter | None) -> Any:
  """The base with an adapter in its kernels, by numpy."""
  if adapter is None:
    return params
  flat, scales = dict(flatten_dict(params, sep='/')), adapter.scales()
  for path, module in lora.modules(adapter.params).items():
    update = module.leaves['a'] @ module.leaves['b']
    flat[f'{path}/kernel'] = flat[f'{path}/kernel'] + scales[module.owner][:, None, None] * update
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), unflatten_dict(flat, sep='/'))


@functools.partial(jax.jit, static_argnames='model')
def _margins(model: Transformer, params: Any, tokens_BT: jax.Array) -> jax.Array:
  """By how much the likeliest token after each is likelier than the next."""
  hidden_BTD: Any
  hidden_BTD, _ = model.apply({'params': params}, tokens_BT)
  logits_BTV: Any = model.apply({'params': params}, hidden_BTD, method='head')
  top_BT2 = jax.lax.top_k(logits_BTV, 2)[0]
  return top_BT2[..., 0] - top_BT2[..., 1]


def know(base: Base, adapters: dict[str, peft.Adapter], each: int, seed: int = 0) -> list[Known]:
  """A few greedy requests to the base and to each adapter, and the answers of those alone."""
  rng, model = np.random.default_rng(seed), Transformer(base.config)
  known: list[Known] = []
  with Progress('answers alone', len(adapters) + 1, unit='adapter') as progress:
    for name in ('', *adapters):
      lengths_B = rng.integers(1, _LONGEST + 1, each)
      prompts_BT = rng.integers(0, base.config.vocab_size, (each, _LONGEST)).astype(np.int32)
      prompts_BT *= np.arange(_LONGEST) < lengths_B[:, None]
      params = merged(base.params, adapters.get(name))
      said_BT = np.asarray(generate(model, params, prompts_BT, lengths_B, _NEW, -1))
      whole_BT = np.zeros((each, _LONGEST + _NEW), np.int32)
      for row, (prompt, length, said) in enumerate(
        zip(prompts_BT, lengths_B, said_BT, strict=True)
      ):
        whole_BT[row, : length + _NEW] = [*prompt[:length], *said]
      margins_BT = np.asarray(_margins(model, params, whole_BT))
      for row, length in enumerate(lengths_B):
        if margins_BT[row, length - 1 : length + _NEW - 1].min() > _CLEAR:
          ids = prompts_BT[row, :length].tolist()
          known.append((Request(ids, name, _NEW), said_BT[row].tolist()))
      progress.advance()
  return known


def soak(
  base: Base, adapters: int, slots: int, rows: int, steps: int, each: int, host_bytes: int
) -> tuple[Record, list[Known]]:
  """Makes adapters and an engine, and soaks it."""
  params, tokenizer = quantize.store(base.params, jnp.float32), copy.copy(base.tokenizer)
  # No answer ends before its last token.
  tokenizer.eos_id = -1
  config = ServeConfig(
    rows=rows, length=64, shortest=16, slots=slots, rank=max(RANKS), host_bytes=host_bytes
  )
  with tempfile.TemporaryDirectory() as folder:
    made = write_adapters(Path(folder), base, adapters)
    known = know(base, made, each)
    engine = Engine(Transformer(base.config), params, tokenizer, config, Path(folder))
    engine.warm_up()
    return Soak(engine, known).run(steps), known


def table(record: Record, known: Sequence[Known]) -> rich.table.Table:
  """What was done, and what it left."""
  made = rich.table.Table('what', 'figure', box=rich.box.SIMPLE)
  mib = lambda count: f'{count / 2**20:,.1f} MiB'
  said = len({tuple(ids) for _, ids in known})
  lines = {
    'requests known, and different answers to them': f'{len(known):,}, {said:,}',
    'steps': f'{record.steps:,} ({1000 * record.seconds / record.steps:.1f} ms each)',
    'answers': ', '.join(f'{count:,} {name}' for name, count in record.finished.items()),
    'greedy, equal to their adapter alone': f'{record.greedy:,}',
    'drawn again, equal to the first time': f'{record.again:,}',
    'adapters written to a slot': f'{record.loads:,}',
    'adapters unloaded and loaded again': f'{record.reloaded:,}',
    'programs compiled': f'{record.programs}',
    'memory of the process after a quarter, and at the end': ', '.join(map(mib, record.resident)),
    'arrays after a quarter, and at the end': ', '.join(map(mib, record.live)),
    'wrong': '; '.join(record.wrong) or 'nothing',
  }
  for line in lines.items():
    made.add_row(*line)
  return made


if __name__ == '__main__':
  _BASE = flags.DEFINE_string('base', 'tiny', 'As in experiments.')
  _ADAPTERS = flags.DEFINE_integer('adapters', 256, 'How many there are.', 1)
  _SLOTS = flags.DEFINE_integer('slots', 16, 'Of the engine.', 1)
  _ROWS = flags.DEFINE_integer('rows', 16, 'Of the engine.', 1)
  _STEPS = flags.DEFINE_integer('steps', 5000, 'In which requests come.', 4)
  _EACH = flags.DEFINE_integer('each', 2, 'Requests to each adapter.', 1)
  _HOST_MB = flags.DEFINE_integer('host_mb', 4, 'Of adapters in host memory.', 0)
  _GROWN_MB = flags.DEFINE_integer('grown_mb', 16, 'By which the process may grow.', 1)

  def _main(_):
    logging.set_verbosity(logging.WARNING)
    with exit_on_user_error():
      base = bases.load(_BASE.value)
      sizes = (_ADAPTERS.value, _SLOTS.value, _ROWS.value, _STEPS.value, _EACH.value)
      record, known = soak(base, *sizes, _HOST_MB.value * 2**20)
      if record.grown > _GROWN_MB.value * 2**20:
        record.wrong.append(f'the process grew by {record.grown / 2**20:.1f} MiB')
      Console(width=max(Console().width, 100)).print(table(record, known))
      print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}', file=sys.stderr)
      if record.wrong:
        raise UserError(record.wrong[0])

  app.run(_main)

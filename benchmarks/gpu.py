"""The benchmarks of a machine with an NVIDIA GPU, in one command.

  python3 launch/local.py python -m benchmarks.gpu
  python3 launch/local.py python -m benchmarks.gpu --data=DIR --json=FILE

Prints three tables, each from this run on this machine:
  single  training SmolLM2-135M with one adapter, bfloat16, at 4 x 256 and 16 x 1,024 tokens,
          a loss on each, beside PEFT eager: tokens a second, share of the measured matrix
          peak, compile seconds, peak memory on the device, ratios
  grid    the article's eight configurations as one run, beside PEFT's loop: seconds of
          training, of scoring and in all, memory, programs compiled, scores
  large   the shape of Qwen2.5-1.5B with random weights, bfloat16, 8 x 2,048 tokens, a loss on
          each: tokens a second and the share of the measured matrix peak

What each of them counts is said in `benchmarks.train`, `benchmarks.grid` and
`benchmarks.flops`. Where the JAX of this Python sees no GPU, an environment with one that
does is made first (`setup.py`, extra `cuda`).
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from benchmarks import batches as batching
from benchmarks import grid, peer, side, train
from experiments import _launcher
from launch import local
from lora_jax import lora
from lora_jax.config import ModelConfig
from lora_jax.errors import UserError, exit_on_user_error
from lora_jax.hub import bases, huggingface
from lora_jax.plan.shapes import SHAPES
from lora_jax.presets import ARTICLE_TARGETS
from lora_jax.transformer import abstract_params

QWEN_1_5B = SHAPES['qwen2.5-1.5b']


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure; see the flags.

  Attributes:
    shapes: rows and tokens of `single`'s batches.
    large: rows and tokens of `large`'s.
    dtype: of both sides.
  """

  base: str
  data: str | None
  targets: str
  rank: int
  steps: int
  train_rows: int
  test_rows: int
  grid_targets: tuple[str, ...] = ARTICLE_TARGETS
  grid_steps: int = 60
  grid_tokens: int = 16_384
  batch_rows: int = 128
  max_length: int = 1024
  remat: bool = False
  shapes: tuple[tuple[int, int], ...] = ((4, 256), (16, 1024))
  large: tuple[int, int] = (8, 2048)
  dtype: str = 'bfloat16'


def single(options: Options, python: str) -> dict[str, Any]:
  """One adapter beside PEFT eager at each shape: shape -> name of a side -> record."""
  sides = train.Sides(options.dtype, peers=('peft',), peer_dtypes=(options.dtype,))
  train.prepare(sides)
  base = bases.load(options.base)
  paths = lora.resolve(options.targets, base.params)
  work = train.Work(base.config, paths, options.rank, options.steps)
  records = {}
  with tempfile.TemporaryDirectory() as folder:
    weights = Path(folder)
    huggingface.save(weights, base.config, base.params, dtype='float32')
    for rows, length in options.shapes:
      name = f'{rows} x {length}'
      setting = batching.equal_setting(
        base.config.vocab_size, (rows, length), options.steps + train.WARMUP, name
      )
      records[name] = train.compare_setting(work, setting, sides, weights, python)
  return records


def whole_grid(options: Options, python: str) -> dict[str, Any]:
  """The grid beside PEFT's loop: what `grid.compare` returns."""
  compared = grid.Options(
    base=options.base,
    data=options.data,
    dataset='medmcqa',
    targets=options.grid_targets,
    rank=options.rank,
    steps=options.grid_steps,
    tokens_per_batch=options.grid_tokens,
    max_length=options.max_length,
    train_rows=options.train_rows,
    test_rows=options.test_rows,
    batch_rows=options.batch_rows,
    max_new_tokens=1,
    dtype=options.dtype,
    peer_dtypes=(options.dtype,),
    # Small batches would leave a GPU idle between kernels, and the ratio would say so alone.
    peer_rows=0,
  )
  return grid.compare(compared, python)


def large(options: Options, config: ModelConfig, python: str) -> dict[str, Any]:
  """Our side alone on a shape of random weights: shape -> name of the side -> record."""
  paths = lora.resolve(options.targets, abstract_params(config))
  work = train.Work(config, paths, options.rank, options.steps)
  rows, length = options.large
  name = f'{rows} x {length}'
  setting = batching.equal_setting(config.vocab_size, (rows, length), 2, name)
  with tempfile.TemporaryDirectory() as folder:
    shape = Path(folder) / 'shape.json'
    shape.write_text(json.dumps(dataclasses.asdict(config)))
    source = [f'--shape={shape}', f'--{"" if options.remat else "no"}remat']
    record = train.our_run(work, setting.ours, options.dtype, source, python)
  return {name: {f'lora_jax {options.dtype}': record}}


def check_gpu() -> str:
  """The first GPU's name, as the driver tells it.

  Raises:
    UserError: there is none.
  """
  tool = shutil.which('nvidia-smi')
  done = tool and subprocess.run([tool, '-L'], capture_output=True, text=True, check=False)
  if not done or done.returncode != 0 or not done.stdout.startswith('GPU '):
    raise UserError(
      'no NVIDIA GPU on this machine (nvidia-smi lists none); run benchmarks.gpu where there is '
      'one, and benchmarks.train and benchmarks.grid here'
    )
  return done.stdout.splitlines()[0].split(' (UUID')[0]


def gpu_python() -> str:
  """A Python whose JAX sees the GPU: this one, or one of an environment made for it.

  Raises:
    UserError: the environment cannot be made, or its JAX sees no GPU either.
  """
  if _backend(sys.executable) == 'gpu':
    return sys.executable
  try:
    python = str(local.environment(local.RUN_VERSIONS, ('cuda',)))
  except local.LaunchError as error:
    raise UserError(f'a JAX for this GPU: {error}') from error
  if _backend(python) != 'gpu':
    raise UserError(f'the JAX of {python} sees no GPU; its CUDA may be newer than this driver')
  return python


def _backend(python: str) -> str:
  command = [python, '-c', 'import jax; print(jax.default_backend())']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  return done.stdout.strip()


def main(options: Options, keep: str | None) -> None:
  """Checks the machine, measures, prints; records go to the file `keep` part by part."""
  side.check_json(keep)
  peer.check_targets((options.targets,))
  gpu = check_gpu()
  print(f'{gpu}: single adapter beside PEFT, the grid beside its loop, and a 1.5B shape')
  python = gpu_python()
  records: dict[str, Any] = {'gpu': gpu}

  def done(part: str, record: dict[str, Any]) -> dict[str, Any]:
    records[part] = record
    if keep:
      Path(keep).write_text(json.dumps(records, indent=2))
    return record

  train.show(done('single', single(options, python)), f'One adapter on {options.base}')
  grid.show(done('grid', whole_grid(options, python)))
  train.show(done('large', large(options, QWEN_1_5B, python)), "Qwen2.5-1.5B's shape")


if __name__ == '__main__':
  _FLAGS = {
    'base': flags.DEFINE_string('base', 'smollm2-135m-instruct', 'Of `single` and `grid`.'),
    'data': flags.DEFINE_string('data', None, 'Folder with medmcqa/; none: generated rows.'),
    'targets': flags.DEFINE_string('targets', 'o_proj,fc2', 'Of `single` and `large`.'),
    'rank': flags.DEFINE_integer('rank', 16, 'Rank.', lower_bound=1),
    'steps': flags.DEFINE_integer('steps', 30, 'Timed steps of each run.', lower_bound=1),
    'train_rows': flags.DEFINE_integer('train_rows', 2000, 'Of the grid.', lower_bound=1),
    'test_rows': flags.DEFINE_integer('test_rows', 200, 'Of the grid.', lower_bound=1),
    'remat': flags.DEFINE_bool('remat', False, 'In `large`: recompute blocks to save memory.'),
  }
  _JSON = flags.DEFINE_string('json', None, 'Where to keep the records.')

  def _main(_):
    logging.set_verbosity(logging.WARNING)
    # This process trains nothing; the GPU's memory is for those that do.
    jax.config.update('jax_platforms', 'cpu')
    with exit_on_user_error():
      main(Options(**{name: flag.value for name, flag in _FLAGS.items()}), _JSON.value)

  _launcher.prefer_huge_pages()
  app.run(_main)

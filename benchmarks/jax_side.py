"""Our side of the training benchmark: the trainer's own step, in a process of its own.

  python -m benchmarks.jax_side --base=smollm2-135m-instruct --dtype=bfloat16 \
    --targets=o_proj --rank=8 --batches=FILE.npz --steps=20 --out=FILE.json

The counterpart of `benchmarks/peft_peer.py`, whose record it shares. FILE.npz holds
`<name>_<i>` for each array of a `lora_jax.data.pipeline.Batch`, i = 0, 1, ...
"""

import dataclasses
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import _launcher
from lora_jax import lora
from lora_jax.config import LoraConfig, OptimConfig
from lora_jax.data.pipeline import Batch
from lora_jax.hub import bases
from lora_jax.optim import optimizer
from lora_jax.train import init_state, make_step
from lora_jax.transformer import Transformer

ARRAYS = ('tokens', 'targets', 'weights', 'positions', 'segments')


@dataclasses.dataclass(frozen=True)
class Options:
  """What to train, on what, for how long; see the flags."""

  base: str
  dtype: str
  targets: str
  rank: int
  batches: str
  steps: int
  warmup: int


def read_batches(path: str) -> list[Batch]:
  """The batches of an npz file, in order."""
  with np.load(path) as file:
    count = len(file.files) // len(ARRAYS)
    return [{name: file[f'{name}_{i}'] for name in ARRAYS} for i in range(count)]


def train(options: Options) -> dict[str, Any]:
  """Runs the steps and returns the record that `--out` holds."""
  batches = read_batches(options.batches)
  base = bases.load(options.base)
  paths = lora.resolve(options.targets, base.params)
  dtype = jnp.dtype(options.dtype)
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), base.params)
  config = base.config
  # The float32 original would count in our peak memory without being needed.
  del base
  lora_config = LoraConfig(rank=options.rank, alpha=2.0 * options.rank)
  tx = optimizer(OptimConfig(), options.warmup + options.steps)
  adapters = lora.init(jax.random.key(0), params, paths, options.rank)
  trainable = lora.summarise(adapters).trainable_params
  state = init_state(adapters, tx, seed=0)
  step = make_step(Transformer(config, dtype=dtype), tx, lora_config)
  losses, seconds, real, padded = [], [], 0, 0
  for number in range(options.warmup + options.steps):
    batch = batches[number % len(batches)]
    start = time.perf_counter()
    state, metrics = step(state, params, batch)
    losses.append(float(metrics['loss']))
    if number >= options.warmup:
      seconds.append(time.perf_counter() - start)
      real += int((batch['segments'] > 0).sum())
      padded += batch['tokens'].size
  # Linux counts in KiB, macOS in bytes.
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return {
    'dtype': options.dtype,
    'targets': options.targets,
    'rank': options.rank,
    'trainable_parameters': trainable,
    'losses': losses,
    'step_seconds': seconds,
    'real_tokens_per_second': real / sum(seconds),
    'padded_tokens_per_second': padded / sum(seconds),
    'peak_bytes': peak if sys.platform == 'darwin' else peak * 1024,
    'versions': {'python': platform.python_version(), 'jax': jax.__version__},
  }


if __name__ == '__main__':
  # As for a run of the main job; pages are the benchmark's to choose, for both sides.
  _launcher.prefer_wide_vectors()
  _FLAGS = {
    'base': flags.DEFINE_string('base', None, 'Name or path of the base.', required=True),
    'dtype': flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float32'], 'Of the base.'),
    'targets': flags.DEFINE_string('targets', None, 'One set of targets.', required=True),
    'rank': flags.DEFINE_integer('rank', None, 'Rank.', required=True),
    'batches': flags.DEFINE_string('batches', None, 'The npz file.', required=True),
    'steps': flags.DEFINE_integer('steps', None, 'Timed steps.', required=True),
    'warmup': flags.DEFINE_integer('warmup', 2, 'Steps before those, not timed.'),
  }
  _OUT = flags.DEFINE_string('out', None, 'Where the record goes.', required=True)

  def _main(_):
    options = Options(**{name: flag.value for name, flag in _FLAGS.items()})
    Path(_OUT.value).write_text(json.dumps(train(options), indent=2))

  app.run(_main)

"""Our side of the training benchmark: the trainer's own step, in a process of its own.

  python -m benchmarks.jax_side --weights=DIR --dtype=bfloat16 --targets=o_proj --rank=8 \
    --batches=FILE.npz --steps=20 --out=FILE.json

The counterpart of `benchmarks/peft_peer.py`, whose record it shares. DIR is in Hugging
Face's layout; --shape=FILE.json, a `ModelConfig` as JSON, has random weights instead.
FILE.npz is what `benchmarks.batches.write` writes.
"""

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import batches as batching
from benchmarks import measure
from experiments import _launcher
from lora_jax import lora, packs
from lora_jax.config import LoraConfig, ModelConfig, OptimConfig
from lora_jax.hub import huggingface
from lora_jax.programs import Programs
from lora_jax.step import init_state, make_step, stack_batches
from lora_jax.transformer import Transformer, init_params


@dataclasses.dataclass(frozen=True)
class Options:
  """What to train, on what, for how long; see the flags."""

  weights: str | None
  shape: str | None
  dtype: str
  targets: str
  rank: int
  batches: str
  steps: int
  warmup: int
  remat: bool


def read_shape(path: Path) -> ModelConfig:
  """A `ModelConfig` from the JSON of its fields; it has no scaling of rotary frequencies."""
  held: dict[str, Any] = json.loads(path.read_text())
  for name, value in held.items():
    held[name] = tuple(value) if isinstance(value, list) else value
  return ModelConfig(**held)


def base(options: Options, dtype: Any) -> tuple[ModelConfig, Any]:
  """The configuration and the frozen parameters, on the device in `dtype`."""
  if options.weights is not None:
    directory = Path(options.weights)
    config = huggingface.model_config(directory)
    return config, jax.tree.map(jnp.asarray, huggingface.load_params(directory, config, dtype))
  assert options.shape is not None
  config = read_shape(Path(options.shape))
  # In one program, so that no float32 original is left in the peak.
  random = lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype), init_params(config, key))
  return config, jax.jit(random)(jax.random.key(0))


def run(options: Options) -> dict[str, Any]:
  """Trains, measures the machine and returns the record that `--out` holds."""
  with Programs() as programs:
    record = train(options)
  return record | {
    'programs': programs.count,
    'compiler_seconds': programs.seconds,
    'matrix_peak': measure.matrix_peak(options.dtype),
  }


def train(options: Options) -> dict[str, Any]:
  """Runs the steps and returns what came of them."""
  batches = batching.read(Path(options.batches))
  dtype = jnp.dtype(options.dtype)
  config, params = base(options, dtype)
  paths = lora.resolve(options.targets, params)
  lora_config = LoraConfig(rank=options.rank, alpha=2.0 * options.rank)
  adapters = lora.init(jax.random.key(0), params, paths, options.rank)
  trainable = lora.summarise(adapters).trainable_params
  run_steps = options.warmup + options.steps
  state = packs.stack([init_state(adapters, lora_config, OptimConfig(), run_steps, seed=0)])
  step = make_step(Transformer(config, dtype=dtype, remat=options.remat), cells=1)
  used = [batches[number % len(batches)] for number in range(options.warmup + options.steps)]
  losses, warm_seconds, seconds = [], [], []
  for number, batch in enumerate(used):
    start = time.perf_counter()
    state, metrics = step(state, params, stack_batches([batch]), np.ones(1, bool))
    losses.append(float(metrics['loss'][0]))
    (seconds if number >= options.warmup else warm_seconds).append(time.perf_counter() - start)
  return {
    'dtype': options.dtype,
    'targets': options.targets,
    'rank': options.rank,
    'trainable_parameters': trainable,
    'losses': losses,
    'warm_seconds': warm_seconds,
    'step_seconds': seconds,
    'real_tokens': sum(batching.real_tokens(batch) for batch in used[options.warmup :]),
    'computed_tokens': sum(
      batching.computed_positions(batch).size for batch in used[options.warmup :]
    ),
    'padded_tokens': sum(batch['tokens'].size for batch in used[options.warmup :]),
    **measure.memory(),
    'versions': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'device': jax.devices()[0].device_kind,
    },
  }


if __name__ == '__main__':
  # As for a run of the main job; pages are the benchmark's to choose, for both sides.
  _launcher.prefer_wide_vectors()
  _FLAGS = {
    'weights': flags.DEFINE_string('weights', None, "A directory in Hugging Face's layout."),
    'shape': flags.DEFINE_string('shape', None, 'Or the shape of a model of random weights.'),
    'dtype': flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float32'], 'Of the base.'),
    'targets': flags.DEFINE_string('targets', None, 'One set of targets.', required=True),
    'rank': flags.DEFINE_integer('rank', None, 'Rank.', required=True),
    'batches': flags.DEFINE_string('batches', None, 'The npz file.', required=True),
    'steps': flags.DEFINE_integer('steps', None, 'Timed steps.', required=True),
    'warmup': flags.DEFINE_integer('warmup', 2, 'Steps before those, not timed.'),
    'remat': flags.DEFINE_bool('remat', False, 'Recompute blocks in the backward pass.'),
  }
  _OUT = flags.DEFINE_string('out', None, 'Where the record goes.', required=True)
  flags.mark_flags_as_mutual_exclusive(['weights', 'shape'], required=True)

  def _main(_):
    options = Options(**{name: flag.value for name, flag in _FLAGS.items()})
    Path(_OUT.value).write_text(json.dumps(run(options), indent=2))

  app.run(_main)

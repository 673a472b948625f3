"""A peer in JAX: LoRA training with Tunix's trainer and qwix's adapters.

  python -m benchmarks.tunix_peer --weights=DIR --dtype=float32 --targets=o_proj --rank=8 \
    --batches=FILE.npz --steps=20 --out=FILE.json

Flags, files and record are those of `benchmarks/peft_peer.py`; the Python is one of an
environment that has google-tunix and qwix. The step is the one that `PeftTrainer.train`
runs, compiled and with its graph cached as there, on Tunix's own Llama. That model
rotates by frequencies of base 1,000,000 whatever it is told, so where the base's are
others, as SmolLM2's, its losses are not ours; its times are not touched by it.
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import measure
from lora_jax.programs import Programs

# By name, since they are in no environment that the rest is checked in.
llama: Any = importlib.import_module('tunix.models.llama3.model')
llama_params: Any = importlib.import_module('tunix.models.llama3.params')
peft_trainer: Any = importlib.import_module('tunix.sft.peft_trainer')
utils: Any = importlib.import_module('tunix.sft.utils')
qwix: Any = importlib.import_module('qwix')


def load(weights: Path, dtype: str) -> Any:
  """Tunix's Llama with the weights of a directory in Hugging Face's layout."""
  held = json.loads((weights / 'config.json').read_text())
  config = llama.ModelConfig(
    num_layers=held['num_hidden_layers'],
    vocab_size=held['vocab_size'],
    embed_dim=held['hidden_size'],
    hidden_dim=held['intermediate_size'],
    num_heads=held['num_attention_heads'],
    head_dim=held['head_dim'],
    num_kv_heads=held['num_key_value_heads'],
    rope_theta=int(held['rope_theta']),
    norm_eps=held['rms_norm_eps'],
    weight_tying=held['tie_word_embeddings'],
  )
  return llama_params.create_model_from_safe_tensors(str(weights), config, dtype=jnp.dtype(dtype))


def adapt(model: Any, modules: list[str], rank: int) -> Any:
  """The model with fresh adapters on the modules of these names."""
  path = f'.*({"|".join(modules)})'
  provider = qwix.LoraProvider(module_path=path, rank=rank, alpha=2.0 * rank)
  return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())


def inputs(tokens: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> dict[str, jax.Array]:
  """What Tunix's default loss takes; it shifts the targets itself."""
  real = jnp.asarray(mask, bool)
  return {
    'input_tokens': jnp.asarray(tokens),
    'input_mask': jnp.asarray(labels >= 0),
    'positions': utils.build_positions_from_mask(real),
    'attention_mask': utils.make_causal_attn_mask(real),
  }


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Trains, measures the machine and returns the record that `--out` holds."""
  with Programs() as programs:
    record = train(options)
  return record | {
    'programs': programs.count,
    'compiler_seconds': programs.seconds,
    'matrix_peak': measure.matrix_peak(options.dtype),
  }


def train(options: argparse.Namespace) -> dict[str, Any]:
  """Runs the steps and returns what came of them."""
  with np.load(options.batches) as file:
    count = len(file.files) // 3
    batches = [
      tuple(file[f'{name}_{i}'] for name in ('tokens', 'labels', 'mask')) for i in range(count)
    ]
  model = adapt(load(options.weights, options.dtype), options.targets.split(','), options.rank)
  trainable = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
  config = peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
  trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-4, weight_decay=0.0), config)
  step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
  losses, warm_seconds, seconds = [], [], []
  used = [batches[number % len(batches)] for number in range(options.warmup + options.steps)]
  for number, batch in enumerate(used):
    start = time.perf_counter()
    loss, *_ = step(inputs(*batch))
    losses.append(float(loss))
    (seconds if number >= options.warmup else warm_seconds).append(time.perf_counter() - start)
  real = sum(int(mask.sum()) for _, _, mask in used[options.warmup :])
  return {
    'dtype': options.dtype,
    'targets': options.targets,
    'rank': options.rank,
    'trainable_parameters': sum(leaf.size for leaf in trainable),
    'adapter_dtype': str(trainable[0].dtype),
    'losses': losses,
    'warm_seconds': warm_seconds,
    'step_seconds': seconds,
    'real_tokens': real,
    'computed_tokens': real,
    'padded_tokens': sum(mask.size for _, _, mask in used[options.warmup :]),
    **measure.memory(),
    'versions': {
      'python': platform.python_version(),
      **{name: importlib.metadata.version(name) for name in ('jax', 'google-tunix', 'qwix')},
    },
  }


def main() -> None:
  """Reads the flags, trains, writes the record."""
  parser = argparse.ArgumentParser(description='LoRA training with Tunix and qwix.')
  parser.add_argument('--weights', type=Path, required=True, help='a Hugging Face directory')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), required=True)
  parser.add_argument('--targets', required=True, help='module names, comma between')
  parser.add_argument('--rank', type=int, required=True)
  parser.add_argument('--batches', type=Path, required=True)
  parser.add_argument('--steps', type=int, required=True, help='timed steps')
  parser.add_argument('--warmup', type=int, default=2, help='steps before those, not timed')
  parser.add_argument('--out', type=Path, required=True)
  options = parser.parse_args()
  options.out.write_text(json.dumps(run(options), indent=2))


if __name__ == '__main__':
  main()

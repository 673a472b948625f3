"""The peer: LoRA training with PEFT and transformers, in a process of its own.

  python benchmarks/peft_peer.py --weights=DIR --dtype=bfloat16 --targets=o_proj --rank=8 \
    --batches=FILE.npz --steps=20 --out=FILE.json

A process of its own, so that its peak memory is its own and JAX is never loaded; a
Python where torch installs (see setup.py). The loop is the one that PEFT's users
write: batches padded to their longest row, the model's own loss over labels with -100
where none is taken, AdamW on the adapters.

FILE.npz holds `tokens_<i>`, `labels_<i>` and `mask_<i>`, each (B, T), for the batches
i = 0, 1, ...; labels stand at the token they are of (the model shifts them), and the
mask is 1 on real tokens. Steps go round the batches.
"""

import argparse
import dataclasses
import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers


@dataclasses.dataclass(frozen=True)
class Batch:
  """One padded batch, (B, T) each."""

  tokens: torch.Tensor
  labels: torch.Tensor
  mask: torch.Tensor

  @property
  def real_tokens(self) -> int:
    """Tokens that are not padding."""
    return int(self.mask.sum())


def read_batches(path: Path) -> list[Batch]:
  """The batches of an npz file, in order."""
  with np.load(path) as file:
    count = sum(name.startswith('tokens_') for name in file.files)
    field = lambda name, i: torch.from_numpy(file[f'{name}_{i}'].astype(np.int64))
    return [Batch(field('tokens', i), field('labels', i), field('mask', i)) for i in range(count)]


def build(options: argparse.Namespace) -> peft.PeftModel:
  """The base with fresh adapters, in training mode."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    options.weights,
    dtype=getattr(torch, options.dtype),
    attn_implementation='sdpa',
    local_files_only=True,
  )
  model.config.use_cache = False
  config = peft.LoraConfig(
    r=options.rank,
    lora_alpha=2 * options.rank,
    target_modules=options.targets.split(','),
    task_type='CAUSAL_LM',
  )
  adapted = peft.get_peft_model(model, config)
  adapted.train()
  return adapted


def train(options: argparse.Namespace) -> dict:
  """Runs the steps and returns the record that `--out` holds."""
  torch.manual_seed(0)
  batches = read_batches(options.batches)
  model = build(options)
  trainable = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=0.0)
  forward = torch.compile(model) if options.compile else model
  losses, seconds, real, padded = [], [], 0, 0
  for step in range(options.warmup + options.steps):
    batch = batches[step % len(batches)]
    start = time.perf_counter()
    loss = forward(input_ids=batch.tokens, attention_mask=batch.mask, labels=batch.labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step >= options.warmup:
      seconds.append(time.perf_counter() - start)
      real += batch.real_tokens
      padded += batch.tokens.numel()
  # Linux counts in KiB, macOS in bytes.
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return {
    'dtype': options.dtype,
    'targets': options.targets,
    'rank': options.rank,
    'compiled': options.compile,
    'trainable_parameters': sum(p.numel() for p in trainable),
    'adapter_dtype': str(trainable[0].dtype).removeprefix('torch.'),
    'threads': torch.get_num_threads(),
    'losses': losses,
    'step_seconds': seconds,
    'median_step_seconds': statistics.median(seconds),
    'real_tokens_per_second': real / sum(seconds),
    'padded_tokens_per_second': padded / sum(seconds),
    'peak_bytes': peak if sys.platform == 'darwin' else peak * 1024,
    'versions': {
      'python': platform.python_version(),
      'torch': torch.__version__,
      'transformers': transformers.__version__,
      'peft': peft.__version__,
    },
  }


def main() -> None:
  """Reads the flags, trains, writes the record."""
  parser = argparse.ArgumentParser(description='LoRA training with PEFT and transformers.')
  parser.add_argument('--weights', type=Path, required=True, help='a Hugging Face directory')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), required=True)
  parser.add_argument('--targets', required=True, help='module names, comma between')
  parser.add_argument('--rank', type=int, required=True)
  parser.add_argument('--batches', type=Path, required=True)
  parser.add_argument('--steps', type=int, required=True, help='timed steps')
  parser.add_argument('--warmup', type=int, default=2, help='steps before those, not timed')
  parser.add_argument('--learning_rate', type=float, default=1e-4)
  parser.add_argument('--compile', action='store_true', help='torch.compile the model')
  parser.add_argument('--out', type=Path, required=True)
  options = parser.parse_args()
  options.out.write_text(json.dumps(train(options), indent=2))


if __name__ == '__main__':
  main()

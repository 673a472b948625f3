"""The peer: LoRA training with PEFT and transformers, in a process of its own.

  python -m benchmarks.peft_peer --weights=DIR --dtype=bfloat16 --targets=o_proj --rank=8 \
    --batches=FILE.npz --steps=20 --out=FILE.json

A process of its own, so that its peak memory is its own and JAX is never loaded; a
Python where torch installs (see setup.py). The loop is the one that PEFT's users
write: batches padded to their longest row, the model's own loss over labels with -100
where none is taken, AdamW on the adapters; on a GPU where there is one.

FILE.npz holds `tokens_<i>`, `labels_<i>` and `mask_<i>`, each (B, T), for the batches
i = 0, 1, ...; labels stand at the token they are of (the model shifts them), and the
mask is 1 on real tokens. Steps go round the batches. With --compile all of them are
gone through before the timed steps, so that no shape is new in those.
"""

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from benchmarks.memory import peak_bytes


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


def device() -> torch.device:
  """The first GPU, or the CPU."""
  return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def read_batches(path: Path) -> list[Batch]:
  """The batches of an npz file, in order."""
  with np.load(path) as file:
    count = sum(name.startswith('tokens_') for name in file.files)
    field = lambda name, i: torch.from_numpy(file[f'{name}_{i}'].astype(np.int64))
    return [Batch(field('tokens', i), field('labels', i), field('mask', i)) for i in range(count)]


def load(weights: Path, dtype: str) -> Any:
  """The base, with the attention that is fastest in transformers without more packages."""
  # Products of float32 on a GPU as JAX has them by default.
  torch.set_float32_matmul_precision('high')
  model: Any = transformers.AutoModelForCausalLM.from_pretrained(
    weights,
    dtype=getattr(torch, dtype),
    attn_implementation='sdpa',
    local_files_only=True,
  )
  return model.to(device())


def adapt(model: Any, modules: list[str], rank: int) -> Any:
  """The base with fresh adapters, in training mode."""
  config = peft.LoraConfig(
    r=rank, lora_alpha=2 * rank, target_modules=modules, task_type='CAUSAL_LM'
  )
  adapted = peft.get_peft_model(model, config)
  adapted.train()
  return adapted


def update(forward: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> torch.Tensor:
  """A step: the loss before it; to read it is to wait for a GPU."""
  held = [part.to(device()) for part in (batch.tokens, batch.mask, batch.labels)]
  tokens, mask, labels = held
  loss = forward(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss
  loss.backward()
  optimizer.step()
  optimizer.zero_grad()
  return loss.detach()


def matrix_peak(dtype: str, seconds: float = 2.0) -> float:
  """FLOPs a second of square products, the best of several: `benchmarks.measure`'s in torch."""
  on_gpu = device().type == 'cuda'
  size, count = (8192, 32) if on_gpu else (1024, 4)
  w = (torch.randn(size, size, device=device()) / size**0.5).to(getattr(torch, dtype))

  def chain() -> float:
    start, x = time.perf_counter(), w
    for _ in range(count):
      x = x @ w
    if on_gpu:
      torch.cuda.synchronize()
    return time.perf_counter() - start

  with torch.inference_mode():
    chain()
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
      best = max(best, 2 * size**3 * count / chain())
  return best


def memory() -> dict[str, Any]:
  """{'peak_bytes', 'where'}: of the GPU where there is one, else of the process."""
  if device().type == 'cuda':
    return {'peak_bytes': torch.cuda.max_memory_allocated(), 'where': 'device'}
  return {'peak_bytes': peak_bytes(), 'where': 'host'}


def versions() -> dict[str, str]:
  """Of what the times depend on."""
  return {
    'python': platform.python_version(),
    'torch': torch.__version__,
    'transformers': transformers.__version__,
    'peft': peft.__version__,
  }


def train(options: argparse.Namespace) -> dict:
  """Runs the steps and returns the record that `--out` holds."""
  torch.manual_seed(0)
  batches = read_batches(options.batches)
  model = adapt(load(options.weights, options.dtype), options.targets.split(','), options.rank)
  trainable = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=0.0)
  forward = torch.compile(model) if options.compile else model
  used = [batches[step % len(batches)] for step in range(options.warmup + options.steps)]
  losses, warm_seconds, seconds = [], [], []

  def timed(batch: Batch, into: list[float]) -> None:
    start = time.perf_counter()
    losses.append(update(forward, optimizer, batch).item())
    into.append(time.perf_counter() - start)

  for batch in used if options.compile else used[: options.warmup]:
    timed(batch, warm_seconds)
  for batch in used[options.warmup :]:
    timed(batch, seconds)
  held = memory()
  real = sum(batch.real_tokens for batch in used[options.warmup :])
  return {
    'dtype': options.dtype,
    'targets': options.targets,
    'rank': options.rank,
    'compiled': options.compile,
    'trainable_parameters': sum(p.numel() for p in trainable),
    'adapter_dtype': str(trainable[0].dtype).removeprefix('torch.'),
    'threads': torch.get_num_threads(),
    'losses': losses,
    'warm_seconds': warm_seconds,
    'step_seconds': seconds,
    'real_tokens': real,
    'computed_tokens': real,
    'padded_tokens': sum(batch.tokens.numel() for batch in used[options.warmup :]),
    **held,
    # Last, so that its matrices are not in the peak.
    'matrix_peak': matrix_peak(options.dtype),
    'versions': versions(),
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

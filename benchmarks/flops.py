"""How many FLOPs a LoRA training step needs, counted from the model's shape.

A product of (m, k) and (k, n) is 2 m k n. What counts is what the mathematics asks for:
nothing twice, so recomputation (remat, attention's backward pass) does not count, and no
padding. For each real token:

  frozen kernels   forward, and the gradient of their input             2 x 2 in out
  A and B          these, and their own gradients                       3 x 2 R (in + out)
  attention        scores and mixing over the keys that a token sees;
                   of the four products of the backward pass each
                   is as large                                          3 x 4 N H visible
  head             forward and the gradient of its input, only where
                   a loss is taken                                      2 x 2 D V

Norms, rotations, softmax and the optimiser are left out, as is usual for model FLOPs
utilisation (Chowdhery et al. 2022, PaLM, appendix B).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lora_jax.config import ModelConfig
from lora_jax.transformer import abstract_params

Shapes = dict[str, tuple[int, int]]


def kernel_shapes(config: ModelConfig) -> Shapes:
  """Path of a block's module, as 'layers/attn/o_proj' -> (in, out) of its kernel."""
  leaves: dict[str, Any] = dict(flatten_dict(abstract_params(config), sep='/'))
  return {
    path.removesuffix('/kernel'): leaf.shape[1:]
    for path, leaf in leaves.items()
    if path.startswith('layers/') and path.endswith('/kernel')
  }


def visible_keys(config: ModelConfig, positions: np.ndarray) -> int:
  """Keys that tokens at these positions see, their own included, over all layers."""
  seen = np.asarray(positions, np.int64) + 1
  windows = config.windows or (0,) * config.num_layers
  return sum(int(np.minimum(seen, window or seen).sum()) for window in windows)


def forward(config: ModelConfig, positions: np.ndarray) -> int:
  """FLOPs of the blocks alone, without adapters or head.

  Args:
    config: the model's shape.
    positions: each real token's position in its own sequence.
  """
  kernels = sum(a * b for a, b in kernel_shapes(config).values()) * config.num_layers
  heads = config.num_heads * config.head_dim
  return 2 * kernels * np.size(positions) + 4 * heads * visible_keys(config, positions)


def training_step(
  config: ModelConfig, paths: Iterable[str], rank: int, positions: np.ndarray, losses: int
) -> int:
  """FLOPs of a step.

  Args:
    config: the model's shape.
    paths: the adapted modules, in all layers, from `lora_jax.lora.resolve`; none fused.
    rank: of their adapters.
    positions: each real token's position in its own sequence.
    losses: how many of them a loss is taken on.
  """
  shapes = kernel_shapes(config)
  tokens = int(np.size(positions))
  heads = config.num_heads * config.head_dim
  adapters = sum(rank * sum(shapes[path]) for path in paths) * config.num_layers
  attention = 4 * heads * visible_keys(config, positions)
  return (
    2 * forward(config, positions)
    + attention
    + 6 * adapters * tokens
    + 4 * config.model_dim * config.vocab_size * losses
  )


def total(counts: Sequence[int], steps: int, skipped: int) -> int:
  """Sum over `steps` steps that go round batches of these counts, after `skipped` others."""
  return sum(counts[(skipped + step) % len(counts)] for step in range(steps))

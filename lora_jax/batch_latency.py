"""What unmerged adapters cost in batches: by rows, and by how many different adapters they have.

A server answers many requests at a time, each with an adapter of its own. The base, the base
with an adapter merged into it, and every target set take turns (`lora_jax.latency`), in batches
of some sizes. Rows that all have one adapter multiply by it as one; rows with different ones
take theirs from a bank of slots, as in `lora_jax.serve`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import lora, lora_family
from lora_jax.batch import BASE, MERGED, Batch
from lora_jax.config import LoraConfig
from lora_jax.latency import attached, interleaved
from lora_jax.serve.bank import AdapterBank, attach
from lora_jax.serve.config import ServeConfig
from lora_jax.transformer import Transformer

Params = Mapping[str, Any]


def measure(
  model: Transformer,
  base: Params,
  target_sets: Mapping[str, tuple[Sequence[str], LoraConfig]],
  batch: Batch,
  turns: int,
  prompt: int,
) -> dict[str, dict[str, Any]]:
  """Times a batch with the base, merged, and with each target set.

  Args:
    model: the Transformer.
    base: its parameters.
    target_sets: targets -> paths of the adapted modules, and the adapters' configuration.
    batch: rows and adapters.
    turns: how often each is timed.
    prompt: tokens of each row's prompt.

  Returns:
    'base', 'merged' (where the base is not quantised: then there is nothing to merge into) and
    targets -> times as in `latency.measure`, of the whole batch.
  """
  variants: dict[str, Params] = {}
  first = next(iter(target_sets.values()))
  if merged := _merged(base, *first):
    # One stands for all: merged, they are all kernels of the base's shapes.
    variants[MERGED] = merged
  for name, (paths, config) in target_sets.items():
    if batch.adapters == 1:
      variants[name] = attached(base, paths, config)
    else:
      variants[name] = _with_slots(base, name, paths, config, batch, model.dtype)
  label = f'latency, {batch.label}'
  times = interleaved(model, base, variants, turns, batch.rows, prompt, label)
  return {name or BASE: held for name, held in times.items()}


def _merged(base: Params, paths: Sequence[str], config: LoraConfig) -> Params | None:
  """The base with an adapter merged into it, or None: its kernels are quantised."""
  adapters = lora_family.init(jax.random.key(0), base, paths, config)
  merged = lora.merge(base, adapters, lora_family.plan(config, adapters).scales())
  if jax.tree.structure(merged) != jax.tree.structure(base):
    return None
  return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), merged, base)


def _with_slots(
  base: Params,
  targets: str,
  paths: Sequence[str],
  config: LoraConfig,
  batch: Batch,
  dtype: jax.typing.DTypeLike,
) -> Params:
  """The base with a bank under it, of which the rows take turns to name a slot."""
  adapters = lora_family.init(jax.random.key(0), base, paths, config)
  # PiSSA's hold where they began as well.
  rank = lambda leaves: sum(leaves[name].shape[-1] for name in ('a', 'a0') if name in leaves)
  room = ServeConfig(
    rows=batch.rows,
    slots=batch.adapters,
    rank=max(rank(module.leaves) for module in lora.modules(adapters).values()),
    targets=targets,
    dora=config.dora,
  )
  slots_B = jnp.asarray(1 + np.arange(batch.rows) % batch.adapters, jnp.int32)
  return attach(base, AdapterBank(base, room, dtype).held, slots_B)

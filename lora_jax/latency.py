"""Latency of unmerged adapters as a ratio to the base's, from interleaved runs.

Machines drift by more than an adapter costs, so the base and every target set take
turns within one process, and each ratio is taken within a turn.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import lora, lora_family
from lora_jax.config import LoraConfig
from lora_jax.kernels import Kernel
from lora_jax.presets import EQUAL_RANK
from lora_jax.progress import Progress
from lora_jax.transformer import NOWHERE, KeyValues, Transformer, head_kernel, logits

# A set of targets, and its arm.
Target = tuple[str, str]

# One prompt, as a user waiting for an answer has.
_PROMPT_TOKENS = 256
_DECODE_STEPS = 8


def measure(
  model: Transformer,
  base: Mapping[str, Any],
  target_sets: Mapping[Target, tuple[Sequence[str], LoraConfig]],
  turns: int,
) -> dict[str, Any]:
  """Times prefill and decoding of one row for the base and for each target set.

  Args:
    model: the Transformer.
    base: its parameters.
    target_sets: (targets, arm) -> paths of the adapted modules, and which of the LoRA family
      the adapter is; its values do not matter to time.
    turns: how often each is timed.

  Returns:
    'targets': name -> {'prefill_ms', 'decode_ms' (one token), 'prefill_ratio', 'decode_ratio',
    'prefill_ratio_low', 'prefill_ratio_high', 'decode_ratio_low', 'decode_ratio_high'},
    medians and quartiles over turns, 'base' included, at equal rank; 'arms': arm -> the same,
    where there are others.
  """
  variants: dict[Any, Any] = {None: base}
  for name, (paths, config) in target_sets.items():
    adapters = lora_family.init(jax.random.key(0), base, paths, config)
    scales = lora_family.plan(config, adapters).scales()
    variants[name] = lora.attach(base, adapters, scales)
  tokens = jnp.ones((1, _PROMPT_TOKENS), jnp.int32)
  room = KeyValues.empty(model.config, 1, _PROMPT_TOKENS + _DECODE_STEPS, model.dtype)
  # A server lays the head out once, so that is no part of a request's time.
  head = jax.jit(head_kernel, static_argnums=0)(model, base)
  works = {
    'prefill': lambda params: _prefill(model, params, head, tokens),
    'decode': lambda params: _decode(model, params, head, room),
  }
  seconds = {(name, work): [] for name in variants for work in works}
  with Progress('latency', (turns + 1) * len(variants), unit='run') as progress:
    for turn in range(turns + 1):
      # Everyone is first as often, so that no one always runs on the warmest cache.
      shift = turn % len(variants)
      for name, params in [*variants.items()][shift:] + [*variants.items()][:shift]:
        for work, run in works.items():
          taken = _seconds(run, params)
          # The first turn compiles and warms up.
          if turn:
            seconds[name, work].append(taken)
        progress.advance()
  found = {arm: {'base': _summary(seconds, None)} for _, arm in (('', EQUAL_RANK), *target_sets)}
  for targets, arm in target_sets:
    found[arm][targets] = _summary(seconds, (targets, arm))
  return {'targets': found.pop(EQUAL_RANK), **({'arms': found} if found else {})}


def timed(record: Mapping[str, Any] | None) -> list[Target]:
  """What a record of `measure` holds beside the base."""
  if record is None:
    return []
  by_arm = {EQUAL_RANK: record['targets'], **record.get('arms', {})}
  return [(name, arm) for arm, times in by_arm.items() for name in times if name != 'base']


def _seconds(run: Callable[[Any], jax.Array], params: Any) -> float:
  start = time.perf_counter()
  jax.block_until_ready(run(params))
  return time.perf_counter() - start


def _summary(seconds: Mapping[tuple[Any, str], list[float]], name: Any) -> dict[str, float]:
  summary = {}
  for work, per in (('prefill', 1), ('decode', _DECODE_STEPS)):
    own, of_base = np.asarray(seconds[name, work]), np.asarray(seconds[None, work])
    low, middle, high = np.quantile(own / of_base, (0.25, 0.5, 0.75))
    summary[f'{work}_ms'] = 1e3 * float(np.median(own)) / per
    summary[f'{work}_ratio'] = float(middle)
    summary[f'{work}_ratio_low'] = float(low)
    summary[f'{work}_ratio_high'] = float(high)
  return summary


@functools.partial(jax.jit, static_argnames='model')
def _prefill(
  model: Transformer, params: Mapping[str, Any], head: Kernel, tokens_BT: jax.Array
) -> jax.Array:
  hidden_BTD, _ = model.apply({'params': params}, tokens_BT)
  return logits(model, hidden_BTD[:, -1], head)


@functools.partial(jax.jit, static_argnames='model')
def _decode(
  model: Transformer, params: Mapping[str, Any], head: Kernel, kv: KeyValues
) -> jax.Array:
  """Decodes a few tokens after a full prompt."""

  def body(step, state):
    token_B, kv = state
    position = _PROMPT_TOKENS + step
    slots_S = jnp.arange(kv.k_LBKSH.shape[3])
    held_BS = jnp.where(slots_S < position, slots_S, NOWHERE)[None]
    positions_BT = jnp.full((1, 1), position)
    hidden_B1D, new = model.apply(
      {'params': params}, token_B[:, None], positions_BT, past=((kv, held_BS),)
    )
    logits_BV = logits(model, hidden_B1D[:, 0], head)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), kv.write(new, position)

  return jax.lax.fori_loop(0, _DECODE_STEPS, body, (jnp.ones(1, jnp.int32), kv))[0]

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
from lora_jax.head import head_kernel, logits
from lora_jax.kernels import Kernel
from lora_jax.presets import EQUAL_RANK
from lora_jax.progress import Progress
from lora_jax.transformer import NOWHERE, KeyValues, Transformer

# A set of targets, and its arm.
Target = tuple[str, str]
Params = Mapping[str, Any]

# The prompt of a user who waits for an answer.
PROMPT_TOKENS = 256
_DECODE_STEPS = 8


def measure(
  model: Transformer,
  base: Params,
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
    medians and quartiles over turns, and 'prefill_turns_ms' and 'decode_turns_ms', each turn's
    time, 'base' included, at equal rank; 'arms': arm -> the same, where there are others.
  """
  variants = {of: attached(base, *sets) for of, sets in target_sets.items()}
  times = interleaved(model, base, variants, turns)
  found = {arm: {'base': times[None]} for _, arm in (('', EQUAL_RANK), *target_sets)}
  for targets, arm in target_sets:
    found[arm][targets] = times[targets, arm]
  return {'targets': found.pop(EQUAL_RANK), **({'arms': found} if found else {})}


def attached(base: Params, paths: Sequence[str], config: LoraConfig) -> Params:
  """The base with a fresh adapter, unmerged."""
  adapters = lora_family.init(jax.random.key(0), base, paths, config)
  return lora.attach(base, adapters, lora_family.plan(config, adapters).scales())


def interleaved(
  model: Transformer,
  base: Params,
  variants: Mapping[Any, Params],
  turns: int,
  rows: int = 1,
  prompt: int = PROMPT_TOKENS,
  label: str = 'latency',
) -> dict[Any, dict[str, Any]]:
  """Times prefill and decoding of the base and of each variant, in turns.

  Args:
    model: the Transformer.
    base: its parameters.
    variants: name, never None -> parameters with adapters.
    turns: how often each is timed.
    rows: prompts in a batch.
    prompt: tokens of each.
    label: of the progress.

  Returns:
    name, None for the base -> times as in `measure`, of the whole batch.
  """
  entrants = {None: base, **variants}
  tokens = jnp.ones((rows, prompt), jnp.int32)
  room = KeyValues.empty(model.config, rows, prompt + _DECODE_STEPS, model.dtype)
  # A server lays the head out once, so that is no part of a request's time.
  head = jax.jit(head_kernel, static_argnums=(0, 2))(model, base, rows)
  works = {
    'prefill': lambda params: _prefill(model, params, head, tokens),
    'decode': lambda params: _decode(model, params, head, room, prompt),
  }
  seconds = {(name, work): [] for name in entrants for work in works}
  with Progress(label, (turns + 1) * len(entrants), unit='run') as progress:
    for turn in range(turns + 1):
      # Everyone is first as often, so that no one always runs on the warmest cache.
      shift = turn % len(entrants)
      for name, params in [*entrants.items()][shift:] + [*entrants.items()][:shift]:
        for work, run in works.items():
          taken = _seconds(run, params)
          # The first turn compiles and warms up.
          if turn:
            seconds[name, work].append(taken)
        progress.advance()
  return {name: _summary(seconds, name) for name in entrants}


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


def _summary(seconds: Mapping[tuple[Any, str], list[float]], name: Any) -> dict[str, Any]:
  summary: dict[str, Any] = {}
  for work, per in (('prefill', 1), ('decode', _DECODE_STEPS)):
    own, of_base = np.asarray(seconds[name, work]), np.asarray(seconds[None, work])
    low, middle, high = np.quantile(own / of_base, (0.25, 0.5, 0.75))
    summary[f'{work}_ms'] = 1e3 * float(np.median(own)) / per
    summary[f'{work}_turns_ms'] = (1e3 * own / per).tolist()
    summary[f'{work}_ratio'] = float(middle)
    summary[f'{work}_ratio_low'] = float(low)
    summary[f'{work}_ratio_high'] = float(high)
  return summary


@functools.partial(jax.jit, static_argnames='model')
def _prefill(model: Transformer, params: Params, head: Kernel, tokens_BT: jax.Array) -> jax.Array:
  hidden_BTD, _ = model.apply({'params': params}, tokens_BT)
  return logits(model, hidden_BTD[:, -1], head)


@functools.partial(jax.jit, static_argnames=('model', 'prompt'))
def _decode(
  model: Transformer, params: Params, head: Kernel, kv: KeyValues, prompt: int
) -> jax.Array:
  """Decodes a few tokens after full prompts."""
  rows = kv.k_LBKSH.shape[1]

  def body(step, state):
    token_B, kv = state
    position = prompt + step
    slots_S = jnp.arange(kv.k_LBKSH.shape[3])
    held_BS = jnp.tile(jnp.where(slots_S < position, slots_S, NOWHERE)[None], (rows, 1))
    positions_BT = jnp.full((rows, 1), position)
    hidden_B1D, new = model.apply(
      {'params': params}, token_B[:, None], positions_BT, past=((kv, held_BS),)
    )
    logits_BV = logits(model, hidden_B1D[:, 0], head)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), kv.write(new, position)

  return jax.lax.fori_loop(0, _DECODE_STEPS, body, (jnp.ones(rows, jnp.int32), kv))[0]

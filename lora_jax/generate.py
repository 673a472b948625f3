"""Greedy generation for a batch of prompts of different lengths.

Prompts are padded on the right and run once. Their keys and values are never written
again; generated tokens go to a stretch of their own, where every row writes the same
slot, so that a step updates one slice in place instead of scattering into rows.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.head import head_kernel, logits
from lora_jax.kernels import Kernel
from lora_jax.packs import Pack
from lora_jax.parts import part_rows
from lora_jax.transformer import NOWHERE, KeyValues, Transformer
from lora_jax.vision import Features

Params = Mapping[str, Any]

# Calls f(params, *arrays) for every cell, arrays and results with the cells' axis, if any.
_ForCells = Callable[..., Any]


def read_prompts(
  model: Transformer,
  params: Params,
  prompts_BT: jax.Array,
  lengths_B: jax.Array,
  cells: int = 1,
  features: Features | None = None,
) -> tuple[jax.Array, Any]:
  """Hidden states (B, D) of each prompt's last token, and `KeyValues` of all tokens.

  Args:
    model: the Transformer.
    params: its parameters, with adapters attached or without.
    prompts_BT: token ids, padded on the right.
    lengths_B: true lengths.
    cells: how many calls of this run as one under `vmap`.
    features: of the images in the prompts, if there are any.
  """

  def read(prompts_BT: jax.Array, lengths_B: jax.Array, features: Features | None):
    hidden_BTD, kv = model.apply({'params': params}, prompts_BT, features=features)
    last_B = jnp.maximum(lengths_B - 1, 0)
    return jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0], kv

  batch, time = prompts_BT.shape
  together = part_rows(batch, time, cells)
  if together == batch:
    return read(prompts_BT, lengths_B, features)
  parted = lambda x: x.reshape(-1, together, *x.shape[1:])
  parts = jax.tree.map(parted, (prompts_BT, lengths_B, features))
  hidden, kv = jax.lax.map(lambda part: read(*part), parts)
  joined = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], batch, *x.shape[3:])
  return hidden.reshape(batch, -1), jax.tree.map(joined, kv)


@functools.partial(jax.jit, static_argnames=('model', 'max_new_tokens', 'eos_id'))
def generate(
  model: Transformer,
  params: Params,
  prompts_BT: jax.Array,
  lengths_B: jax.Array,
  max_new_tokens: int,
  eos_id: int,
  features: Features | None = None,
) -> jax.Array:
  """Continues each prompt with its most likely tokens.

  Args:
    model: the Transformer.
    params: its parameters, with adapters attached or without.
    prompts_BT: token ids, padded on the right.
    lengths_B: true length of each prompt, at least 1; a row of length 0 is padding of
      the batch and ends at once.
    max_new_tokens: tokens to generate at most.
    eos_id: the token that ends a row.
    features: of the images in the prompts, if there are any.

  Returns:
    tokens_BT (T = `max_new_tokens`): the generated tokens; `eos_id` from a row's end
    on. Generation stops early once every row has ended.
  """
  for_cells = lambda f, *arrays: f(params, *arrays)
  head = head_kernel(model, params, prompts_BT.shape[0])
  prompts = (prompts_BT, lengths_B, features)
  return _continue(model, for_cells, head, 1, *prompts, max_new_tokens, eos_id)


@functools.partial(jax.jit, static_argnames=('model', 'max_new_tokens', 'eos_id'))
def generate_pack(
  model: Transformer,
  base: Params,
  pack: Pack,
  prompts_BT: jax.Array,
  lengths_B: jax.Array,
  max_new_tokens: int,
  eos_id: int,
  features: Features | None = None,
) -> jax.Array:
  """As `generate`, for all cells of a pack at once: tokens_CBT."""
  head = head_kernel(model, base, pack.cells * prompts_BT.shape[0])
  prompts = (prompts_BT, lengths_B, features)
  return _continue(model, pack.over_cells(base), head, pack.cells, *prompts, max_new_tokens, eos_id)


def _continue(
  model: Transformer,
  for_cells: _ForCells,
  head: Kernel,
  cells: int,
  prompts_BT: jax.Array,
  lengths_B: jax.Array,
  features: Features | None,
  max_new_tokens: int,
  eos_id: int,
) -> jax.Array:
  """The loop; in its arrays B follows the cells' axis, where there is one.

  The loop is not itself mapped over cells: it would then keep the caches of those that are
  done by copying them, at every step.
  """
  batch, time = prompts_BT.shape

  def next_token(hidden_BD):
    return jnp.argmax(logits(model, hidden_BD, head), axis=-1).astype(jnp.int32)

  def read(params):
    hidden_BD, kv = read_prompts(model, params, prompts_BT, lengths_B, cells, features)
    return next_token(hidden_BD), kv

  slots_T = jnp.arange(time)
  prompt_BT = jnp.where(slots_T[None] < lengths_B[:, None], slots_T[None], NOWHERE)
  own_BT = lengths_B[:, None] + jnp.arange(max_new_tokens)[None]

  def unfinished(state):
    step, _, _, done, _ = state
    return (step < max_new_tokens) & ~jnp.all(done)

  def body(state):
    step, token, own_kv, done, out = state
    token = jnp.where(done, eos_id, token)
    out = out.at[..., step].set(token)
    done |= token == eos_id
    written_BT = jnp.where(jnp.arange(max_new_tokens)[None] < step, own_BT, NOWHERE)

    def read_token(params, token_B, prompt_kv, own_kv):
      hidden_B1D, new_kv = model.apply(
        {'params': params},
        token_B[:, None],
        (lengths_B + step)[:, None],
        past=((prompt_kv, prompt_BT), (own_kv, written_BT)),
      )
      return next_token(hidden_B1D[:, 0]), new_kv

    token, new_kv = for_cells(read_token, token, prompt_kv, own_kv)
    return step + 1, token, own_kv.write(new_kv, step), done, out

  token, prompt_kv = for_cells(read)
  lead = token.shape[:-1]
  empty = KeyValues.empty(model.config, batch, max_new_tokens, model.dtype)
  own_kv = jax.tree.map(lambda leaf: jnp.zeros((*lead, *leaf.shape), leaf.dtype), empty)
  out = jnp.full((*token.shape, max_new_tokens), eos_id, jnp.int32)
  done = jnp.broadcast_to(lengths_B == 0, token.shape)
  return jax.lax.while_loop(unfinished, body, (jnp.int32(0), token, own_kv, done, out))[-1]

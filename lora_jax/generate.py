"""Greedy generation for a batch of prompts of different lengths.

Prompts are padded on the right and run once. Their keys and values are never written
again; generated tokens go to a stretch of their own, where every row writes the same
slot, so that a step updates one slice in place instead of scattering into rows.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.transformer import NOWHERE, KeyValues, Transformer, head_kernel, logits


@functools.partial(jax.jit, static_argnames=('model', 'max_new_tokens', 'eos_id'))
def generate(
  model: Transformer,
  params: Mapping[str, Any],
  prompts_BT: jax.Array,
  lengths_B: jax.Array,
  max_new_tokens: int,
  eos_id: int,
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

  Returns:
    tokens_BT (T = `max_new_tokens`): the generated tokens; `eos_id` from a row's end
    on. Generation stops early once every row has ended.
  """
  batch, time = prompts_BT.shape
  variables = {'params': params}

  head = head_kernel(model, params)

  def next_token(hidden_BD):
    return jnp.argmax(logits(model, hidden_BD, head), axis=-1).astype(jnp.int32)

  hidden_BTD, prompt_kv = model.apply(variables, prompts_BT)
  last_B = jnp.maximum(lengths_B - 1, 0)
  token_B = next_token(jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0])
  done_B = lengths_B == 0
  slots_T = jnp.arange(time)
  prompt_BT = jnp.where(slots_T[None] < lengths_B[:, None], slots_T[None], NOWHERE)
  own_BT = lengths_B[:, None] + jnp.arange(max_new_tokens)[None]

  def unfinished(state):
    step, _, _, done_B, _ = state
    return (step < max_new_tokens) & ~jnp.all(done_B)

  def body(state):
    step, token_B, own_kv, done_B, out_BT = state
    token_B = jnp.where(done_B, eos_id, token_B)
    out_BT = out_BT.at[:, step].set(token_B)
    done_B |= token_B == eos_id
    written_BT = jnp.where(jnp.arange(max_new_tokens)[None] < step, own_BT, NOWHERE)
    hidden_B1D, new_kv = model.apply(
      variables,
      token_B[:, None],
      (lengths_B + step)[:, None],
      past=((prompt_kv, prompt_BT), (own_kv, written_BT)),
    )
    own_kv = own_kv.write(new_kv, step)
    return step + 1, next_token(hidden_B1D[:, 0]), own_kv, done_B, out_BT

  own_kv = KeyValues.empty(model.config, batch, max_new_tokens, model.dtype)
  out_BT = jnp.full((batch, max_new_tokens), eos_id, jnp.int32)
  state = (jnp.int32(0), token_B, own_kv, done_B, out_BT)
  return jax.lax.while_loop(unfinished, body, state)[-1]

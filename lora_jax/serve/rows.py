"""Rows of requests on the device, and the two programs that advance them.

A row's keys and values lie where its tokens do, from its first slot on. Decoding reads all
rows as far as the longest of them reaches, which on a short chat is a small part of what
there is room for; it writes each row at its own length.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.bank_kernel import Bank
from lora_jax.config import ModelConfig
from lora_jax.head import logits
from lora_jax.kernels import Kernel
from lora_jax.sampling import Draw, Sampling, choose_rows
from lora_jax.serve.bank import attach
from lora_jax.transformer import NOWHERE, KeyValues, Transformer

Params = Mapping[str, Any]
# XLA's seeds are of 32 bits.
_SEEDS = 2**32


@flax.struct.dataclass
class Rows:
  """What the device knows of the rows, but for the token that each goes on from.

  A row that nobody sits in is computed too, and looked at by none.

  Attributes:
    kv: keys and values of each row's tokens, at the slots of their positions.
    positions_B: of the token that each row goes on from; what is from there on is not the
      row's.
    slots_B: of each row's adapter.
    draws: how each row's tokens are chosen.
  """

  kv: KeyValues
  positions_B: jax.Array
  slots_B: jax.Array
  draws: Draw

  @classmethod
  def empty(cls, config: ModelConfig, rows: int, length: int, dtype) -> 'Rows':
    """Rows without requests, with room for `length` tokens each."""
    zeros = lambda dtype: jnp.zeros(rows, dtype)
    keys = jax.random.split(jax.random.key(0), rows)
    return cls(
      KeyValues.empty(config, rows, length, dtype),
      zeros(jnp.int32),
      zeros(jnp.int32),
      Draw(keys, zeros(jnp.float32), zeros(jnp.float32), zeros(jnp.int32)),
    )


@flax.struct.dataclass
class Seat:
  """Where a request goes, and how it is answered: scalars, or (P,) of several requests.

  Attributes:
    row: of the request.
    slot: of its adapter.
    length: of its prompt, at least 1.
    seed: of its draws; the other fields are those of a `Draw`.
  """

  row: Any
  slot: Any
  length: Any
  seed: Any
  temperature: Any
  top_p: Any
  top_k: Any

  @classmethod
  def of(cls, row: int, slot: int, length: int, sampling: Sampling) -> 'Seat':
    """With every number in the one dtype that programs are compiled for."""
    return cls(
      np.int32(row),
      np.int32(slot),
      np.int32(length),
      np.uint32(sampling.seed % _SEEDS),
      np.float32(sampling.temperature),
      np.float32(sampling.top_p),
      np.int32(sampling.top_k),
    )


@functools.partial(jax.jit, static_argnames='model', donate_argnames='rows')
def read_prompts(
  model: Transformer,
  params: Params,
  banks: Mapping[str, Bank],
  head: Kernel,
  rows: Rows,
  tokens_B: jax.Array,
  prompts_PT: jax.Array,
  seats: Seat,
) -> tuple[Rows, jax.Array]:
  """Seats requests in rows and chooses their first tokens.

  Args:
    model: the Transformer.
    params: the base.
    banks: of an `AdapterBank`.
    head: from `head_kernel`.
    rows: all rows, which are given up.
    tokens_B: the token that each row goes on from.
    prompts_PT: token ids, padded on the right; T is at most what a row has room for.
    seats: where, and how, (P,); one that is there twice has the same prompt each time.

  Returns:
    All rows, and what they go on from.
  """
  kv: Any
  hidden_PTD, kv = model.apply({'params': attach(params, banks, seats.slot)}, prompts_PT)
  last_PD = hidden_PTD[jnp.arange(len(prompts_PT)), seats.length - 1]
  keys_P = jax.vmap(jax.random.key)(seats.seed)
  draws = Draw(keys_P, seats.temperature, seats.top_p, seats.top_k)
  tokens_P = choose_rows(logits(model, last_PD, head), seats.length, draws)
  put = lambda old_B, new_P: old_B.at[seats.row].set(new_P)

  def whole(old: jax.Array, new: jax.Array) -> jax.Array:
    layers, _, heads, length, dim = new.shape
    # What the row held before has weight 0, but if an adapter overflowed, 0 times infinity.
    nothing = jnp.zeros((layers, 1, heads, old.shape[3] - length, dim), old.dtype)
    # Slice by slice, which is done in place; they are few.
    for i, row in enumerate(seats.row):
      old = jax.lax.dynamic_update_slice(old, new[:, i : i + 1], (0, row, 0, 0, 0))
      old = jax.lax.dynamic_update_slice(old, nothing, (0, row, 0, length, 0))
    return old

  rows = Rows(
    jax.tree.map(whole, rows.kv, kv),
    put(rows.positions_B, seats.length),
    put(rows.slots_B, seats.slot),
    jax.tree.map(put, rows.draws, draws),
  )
  return rows, put(tokens_B, tokens_P)


@functools.partial(jax.jit, static_argnames=('model', 'reach'), donate_argnames='rows')
def decode(
  model: Transformer,
  params: Params,
  banks: Mapping[str, Bank],
  head: Kernel,
  rows: Rows,
  tokens_B: jax.Array,
  reach: int,
) -> tuple[Rows, jax.Array]:
  """Reads a token in every row and chooses the next.

  Args:
    model: the Transformer; the next five are as in `read_prompts`.
    params: the base.
    banks: of an `AdapterBank`.
    head: from `head_kernel`.
    rows: all rows, which are given up.
    tokens_B: the token that each row goes on from.
    reach: how many tokens come before it, at most, in a row that matters.

  Returns:
    All rows, and what they go on from.
  """
  slots_1S, positions_B1 = jnp.arange(reach)[None], rows.positions_B[:, None]
  held_BS = jnp.where(slots_1S < positions_B1, slots_1S, NOWHERE)
  kv: Any
  hidden_B1D, kv = model.apply(
    {'params': attach(params, banks, rows.slots_B)},
    tokens_B[:, None],
    positions_B1,
    past=((jax.tree.map(lambda leaf: leaf[:, :, :, :reach], rows.kv), held_BS),),
  )
  next_B = rows.positions_B + 1
  chosen_B = choose_rows(logits(model, hidden_B1D[:, 0], head), next_B, rows.draws)
  # Rows that nobody sits in go on for ever, and write nothing beyond their last slot.
  positions_B = jnp.minimum(next_B, rows.kv.k_LBKSH.shape[3])
  kv = rows.kv.write_each(kv, rows.positions_B)
  return dataclasses.replace(rows, kv=kv, positions_B=positions_B), chosen_B

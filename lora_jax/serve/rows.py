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
from lora_jax.serve.likelihood import Likelihoods
from lora_jax.transformer import NOWHERE, KeyValues, Transformer
from lora_jax.vision import Features

Params = Mapping[str, Any]
# XLA's seeds are of 32 bits.
_SEEDS = 2**32
# Tokens of prompts whose logits are there at the same time, where they are told of.
_TOLD = 64


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
class Chosen:
  """What each row goes on from. It outlives the step that makes the next.

  Attributes:
    tokens_B: the token.
    likelihoods_B: of it, in a step whose likelihoods are asked for.
  """

  tokens_B: jax.Array
  likelihoods_B: Likelihoods

  @classmethod
  def empty(cls, config: ModelConfig, rows: int) -> 'Chosen':
    """Of rows without requests."""
    return cls(jnp.zeros(rows, jnp.int32), Likelihoods.none(config.vocab_size, rows))


@flax.struct.dataclass
class Asked:
  """What is to be told of tokens beside their ids: scalars, whatever it is of whom.

  Attributes:
    chosen: likelihoods of what is chosen.
    read: likelihoods of what is read.
  """

  chosen: Any
  read: Any

  @classmethod
  def of(cls, chosen: bool, read: bool = False) -> 'Asked':
    """In the one dtype that programs are compiled for."""
    return cls(np.bool_(chosen), np.bool_(read))


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
  chosen: Chosen,
  prompts_PT: jax.Array,
  seats: Seat,
  asked: Asked,
  features: Features | None = None,
) -> tuple[Rows, Chosen, Likelihoods]:
  """Seats requests in rows and chooses their first tokens.

  Args:
    model: the Transformer.
    params: the base.
    banks: of an `AdapterBank`.
    head: from `head_kernel`.
    rows: all rows, which are given up.
    chosen: what each row goes on from.
    prompts_PT: token ids, padded on the right; T is at most what a row has room for.
    seats: where, and how, (P,); one that is there twice has the same prompt each time.
    asked: what is to be told.
    features: of the images in the prompts; None: there are none.

  Returns:
    All rows, what they go on from, and the likelihoods (P, T) of what comes after each token
    of a prompt, where they are asked for.
  """
  kv: Any
  attached = {'params': attach(params, banks, seats.slot)}
  hidden_PTD, kv = model.apply(attached, prompts_PT, features=features)
  last_PD = hidden_PTD[jnp.arange(len(prompts_PT)), seats.length - 1]
  keys_P = jax.vmap(jax.random.key)(seats.seed)
  draws = Draw(keys_P, seats.temperature, seats.top_p, seats.top_k)
  logits_PV = logits(model, last_PD, head)
  tokens_P = choose_rows(logits_PV, seats.length, draws)
  fresh = Chosen(tokens_P, _likelihoods(asked.chosen, logits_PV, tokens_P))
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
  read = lambda: _of_prompts(model, head, hidden_PTD, prompts_PT)
  nothing = lambda: Likelihoods.none(model.config.vocab_size, *prompts_PT.shape)
  return rows, jax.tree.map(put, chosen, fresh), jax.lax.cond(asked.read, read, nothing)


@functools.partial(jax.jit, static_argnames=('model', 'reach'), donate_argnames='rows')
def decode(
  model: Transformer,
  params: Params,
  banks: Mapping[str, Bank],
  head: Kernel,
  rows: Rows,
  chosen: Chosen,
  asked: Asked,
  reach: int,
) -> tuple[Rows, Chosen]:
  """Reads a token in every row and chooses the next.

  Args:
    model: the Transformer; the next five are as in `read_prompts`.
    params: the base.
    banks: of an `AdapterBank`.
    head: from `head_kernel`.
    rows: all rows, which are given up.
    chosen: what each row goes on from.
    asked: what is to be told.
    reach: how many tokens come before it, at most, in a row that matters.

  Returns:
    All rows, and what they go on from.
  """
  slots_1S, positions_B1 = jnp.arange(reach)[None], rows.positions_B[:, None]
  held_BS = jnp.where(slots_1S < positions_B1, slots_1S, NOWHERE)
  kv: Any
  hidden_B1D, kv = model.apply(
    {'params': attach(params, banks, rows.slots_B)},
    chosen.tokens_B[:, None],
    positions_B1,
    past=((jax.tree.map(lambda leaf: leaf[:, :, :, :reach], rows.kv), held_BS),),
  )
  next_B = rows.positions_B + 1
  logits_BV = logits(model, hidden_B1D[:, 0], head)
  tokens_B = choose_rows(logits_BV, next_B, rows.draws)
  chosen = Chosen(tokens_B, _likelihoods(asked.chosen, logits_BV, tokens_B))
  # Rows that nobody sits in go on for ever, and write nothing beyond their last slot.
  positions_B = jnp.minimum(next_B, rows.kv.k_LBKSH.shape[3])
  kv = rows.kv.write_each(kv, rows.positions_B)
  return dataclasses.replace(rows, kv=kv, positions_B=positions_B), chosen


def _likelihoods(asked: jax.Array, logits_NV: jax.Array, ids_N: jax.Array) -> Likelihoods:
  count, vocabulary = logits_NV.shape
  return jax.lax.cond(
    asked,
    lambda: Likelihoods.of(logits_NV, ids_N),
    lambda: Likelihoods.none(vocabulary, count),
  )


def _of_prompts(
  model: Transformer, head: Kernel, hidden_PTD: jax.Array, prompts_PT: jax.Array
) -> Likelihoods:
  """Of what comes after each token; that after a prompt's last one is not looked at."""
  shape, dim = prompts_PT.shape, hidden_PTD.shape[-1]
  # A few tokens at a time, since there are many in the vocabulary.
  count = prompts_PT.size
  more = -count % _TOLD
  hidden_ND = jnp.pad(hidden_PTD.reshape(count, dim), ((0, more), (0, 0)))
  next_N = jnp.pad(jnp.roll(prompts_PT, -1, axis=1).reshape(count), (0, more))
  parts = hidden_ND.reshape(-1, _TOLD, dim), next_N.reshape(-1, _TOLD)
  told = jax.lax.map(lambda part: Likelihoods.of(logits(model, part[0], head), part[1]), parts)
  return jax.tree.map(
    lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count].reshape(*shape, *leaf.shape[2:]), told
  )

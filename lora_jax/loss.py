"""Cross entropy on the positions that carry a target, and on no others.

A vocabulary of 49,152 is a third of a small model's work. Completions are a few
positions among many, so positions with a target are moved to the front and the
head runs over them a chunk at a time, for as many chunks as there are, and over part
of the last one where it holds few: the shapes, and with them the compiled program, are
the same whatever the batch holds. The head is frozen, so the gradient of a chunk's
hidden states is taken while its logits are at hand, and no logits outlive their chunk.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.sharding import by_rows

CHUNK = 256
# Of a chunk with few targets, the head runs over the first so many positions.
_FEW = (32, 64, 128)

# hidden (C, D) -> float32 logits (C, V)
Head = Callable[[jax.Array], jax.Array]


def token_losses(logits_CV: jax.Array, targets_C: jax.Array) -> jax.Array:
  """Negative log likelihood (C,) of each target, in nats."""
  picked_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
  return jax.nn.logsumexp(logits_CV, axis=-1) - picked_C


def with_target(weights_BT: np.ndarray) -> int:
  """How many positions have a target."""
  return int(np.count_nonzero(weights_BT))


def completion_loss(
  head: Head,
  hidden_BTD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  chunk: int = CHUNK,
  in_use: jax.Array | None = None,
) -> jax.Array:
  """Weighted sum of negative log likelihoods; divide by the sum of weights for the mean.

  Differentiable (reverse mode, once) with respect to `hidden_BTD` only: the head is
  taken as frozen.

  Args:
    head: hidden states to logits; it may close over frozen parameters.
    hidden_BTD: hidden states after the last norm.
    targets_BT: the token that each position should predict.
    weights_BT: float32 weight of each position; 0 where there is no target.
    chunk: positions per evaluation of the head.
    in_use: for how many positions it is evaluated, at least `with_target`; None: counted
      here. Under `vmap` a count of each one's own would make every one of them pay for all.

  Returns:
    A float32 scalar, in nats.
  """
  depth = hidden_BTD.shape[-1]
  count = targets_BT.size
  chunk = min(chunk, count)
  # Whole chunks only.
  padded = -(-count // chunk) * chunk
  pad = lambda flat: jnp.pad(flat, (0, padded - count))
  order_P = jnp.argsort(pad(weights_BT.reshape(-1)) == 0, stable=True)
  by_chunk = lambda x: x[order_P].reshape(padded // chunk, chunk, *x.shape[1:])
  targets_NC = by_chunk(pad(targets_BT.reshape(-1)))
  weights_NC = by_chunk(pad(weights_BT.reshape(-1)))
  if in_use is None:
    in_use = jnp.sum(weights_BT != 0)
  sizes = [0, *(few for few in _FEW if few < chunk), chunk]
  left_N = jnp.clip(in_use - chunk * jnp.arange(padded // chunk), 0, chunk)
  # The smallest that holds what is left.
  size_N = jnp.searchsorted(jnp.asarray(sizes), left_N)

  def walk(hidden_BTD, with_gradient):
    flat_PD = jnp.pad(hidden_BTD.reshape(-1, depth), ((0, padded - count), (0, 0)))

    def on_first(size, hidden_CD, targets_C, weights_C):
      if not size:
        return jnp.float32(0), jnp.zeros_like(hidden_CD) if with_gradient else None
      chunk_loss = lambda h: jnp.vdot(token_losses(head(h), targets_C[:size]), weights_C[:size])
      if not with_gradient:
        return chunk_loss(hidden_CD[:size]), None
      loss, gradient = jax.value_and_grad(chunk_loss)(hidden_CD[:size])
      return loss, jnp.pad(gradient, ((0, chunk - size), (0, 0)))

    branches = [functools.partial(on_first, size) for size in sizes]

    def body(total, one):
      size, *of_chunk = one
      loss, gradient_CD = jax.lax.switch(size, branches, *of_chunk)
      return total + loss, gradient_CD

    # Over a mesh, each device has the head of a part of every chunk.
    chunked = (size_N, by_rows(by_chunk(flat_PD), axis=1), targets_NC, weights_NC)
    total, gradient_NCD = jax.lax.scan(body, jnp.float32(0), chunked)
    if gradient_NCD is None:
      return total, None
    gradient_PD = gradient_NCD.reshape(padded, depth)
    restored_PD = jnp.zeros_like(gradient_PD).at[order_P].set(gradient_PD, unique_indices=True)
    return total, restored_PD[:count].reshape(hidden_BTD.shape)

  @jax.custom_vjp
  def loss(hidden_BTD):
    return walk(hidden_BTD, with_gradient=False)[0]

  loss.defvjp(
    lambda hidden_BTD: walk(hidden_BTD, with_gradient=True),
    lambda gradient_BTD, cotangent: ((gradient_BTD * cotangent).astype(gradient_BTD.dtype),),
  )
  return loss(hidden_BTD)

"""Cross entropy on the positions that carry a target, and on no others.

A vocabulary of 49,152 is a third of a small model's work. Completions are a few
positions among many, so positions with a target are moved to the front and the
head runs over them a chunk at a time, for as many chunks as there are: the shapes,
and with them the compiled program, are the same whatever the batch holds. The head
is frozen, so the gradient of a chunk's hidden states is taken while its logits are
at hand, and no logits outlive their chunk.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

CHUNK = 256

# hidden (C, D) -> float32 logits (C, V)
Head = Callable[[jax.Array], jax.Array]


def token_losses(logits_CV: jax.Array, targets_C: jax.Array) -> jax.Array:
  """Negative log likelihood (C,) of each target, in nats."""
  picked_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
  return jax.nn.logsumexp(logits_CV, axis=-1) - picked_C


def completion_loss(
  head: Head,
  hidden_BTD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  chunk: int = CHUNK,
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

  Returns:
    A float32 scalar, in nats.
  """
  depth = hidden_BTD.shape[-1]
  count = targets_BT.size
  chunk = min(chunk, count)
  # Whole chunks only: a slice at the end must not slide back over earlier positions.
  padded = -(-count // chunk) * chunk
  pad = lambda flat: jnp.pad(flat, (0, padded - count))
  order_P = jnp.argsort(pad(weights_BT.reshape(-1)) == 0, stable=True)
  targets_P = pad(targets_BT.reshape(-1))[order_P]
  weights_P = pad(weights_BT.reshape(-1))[order_P]
  chunks = -(-jnp.sum(weights_P != 0) // chunk)

  def walk(hidden_BTD, with_gradient):
    flat_PD = jnp.pad(hidden_BTD.reshape(-1, depth), ((0, padded - count), (0, 0)))
    hidden_PD = flat_PD[order_P]
    gradient_PD = jnp.zeros_like(hidden_PD) if with_gradient else None

    def body(i, carry):
      total, gradient_PD = carry
      part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk)
      chunk_loss = lambda h_CD: jnp.vdot(token_losses(head(h_CD), part(targets_P)), part(weights_P))
      if gradient_PD is None:
        return total + chunk_loss(part(hidden_PD)), None
      loss, gradient_CD = jax.value_and_grad(chunk_loss)(part(hidden_PD))
      gradient_PD = jax.lax.dynamic_update_slice_in_dim(gradient_PD, gradient_CD, i * chunk, 0)
      return total + loss, gradient_PD

    total, gradient_PD = jax.lax.fori_loop(0, chunks, body, (jnp.float32(0), gradient_PD))
    if gradient_PD is None:
      return total, None
    restored_PD = jnp.zeros_like(gradient_PD).at[order_P].set(gradient_PD)
    return total, restored_PD[:count].reshape(hidden_BTD.shape)

  @jax.custom_vjp
  def loss(hidden_BTD):
    return walk(hidden_BTD, with_gradient=False)[0]

  loss.defvjp(
    lambda hidden_BTD: walk(hidden_BTD, with_gradient=True),
    lambda gradient_BTD, cotangent: ((gradient_BTD * cotangent).astype(gradient_BTD.dtype),),
  )
  return loss(hidden_BTD)

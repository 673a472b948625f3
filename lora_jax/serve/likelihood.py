"""How likely tokens were, for those who ask: log probabilities, and the likeliest instead.

They are the model's own: before a temperature, and before what is drawn among is narrowed.
All tokens of all requests have room for the same number of likeliest, so that asking for
more compiles nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import SupportsFloat

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# The likeliest tokens that are told beside one: what OpenAI's interface gives at most.
MOST = 20
# JSON has no word for the logarithm of 0.
_LEAST = -9999.0


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Of one token.

  Attributes:
    token: its id.
    log_prob: its log probability.
    top: ids of the likeliest in its place and their log probabilities, from the likeliest on.
  """

  token: int
  log_prob: float
  top: Sequence[tuple[int, float]]


@flax.struct.dataclass
class Likelihoods:
  """Of some tokens, on the device.

  Attributes:
    log_probs: (...), float32.
    top_ids: (..., K), int32.
    top_log_probs: (..., K), float32.
  """

  log_probs: jax.Array
  top_ids: jax.Array
  top_log_probs: jax.Array

  @classmethod
  def none(cls, vocabulary: int, *shape: int) -> 'Likelihoods':
    """Room for those of tokens in this shape."""
    top = (*shape, min(MOST, vocabulary))
    return cls(jnp.zeros(shape), jnp.zeros(top, jnp.int32), jnp.zeros(top))

  @classmethod
  def of(cls, logits_NV: jax.Array, ids_N: jax.Array) -> 'Likelihoods':
    """Of tokens, by the logits in their places."""
    log_probs_NV = jax.nn.log_softmax(logits_NV)
    log_probs_N = jnp.take_along_axis(log_probs_NV, ids_N[:, None], axis=-1)[:, 0]
    top_NK, ids_NK = jax.lax.top_k(log_probs_NV, min(MOST, logits_NV.shape[-1]))
    return cls(log_probs_N, ids_NK.astype(jnp.int32), top_NK)

  def fetch(self) -> 'Likelihoods':
    """The same on the host."""
    return jax.tree.map(np.asarray, self)

  def at(self, place: int, token: int, count: int) -> Likelihood:
    """Of one token beside `count` of the likeliest; only where there is one axis of tokens.

    Args:
      place: of the token along the axis.
      token: its id.
      count: at most `MOST`.
    """
    top = zip(self.top_ids[place, :count], self.top_log_probs[place, :count], strict=True)
    return Likelihood(
      token, _finite(self.log_probs[place]), [(int(one), _finite(log)) for one, log in top]
    )


def _finite(log_prob: SupportsFloat) -> float:
  # Where an adapter overflowed it is no number at all.
  found = float(log_prob)
  return found if found > _LEAST else _LEAST

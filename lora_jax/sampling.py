"""How the next token is chosen from logits, on the device.

The likeliest at temperature 0; otherwise drawn among the `top_k` likeliest, and of those
among the likeliest that together have the probability `top_p` (nucleus sampling, Holtzman
et al. 2020).
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen.

  Attributes:
    temperature: what logits are divided by; 0: the most likely token, always.
    top_p: draw among the most likely tokens that together have this probability.
    top_k: draw among so many most likely tokens; 0: among all.
    seed: of the draws.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0
  seed: int = 0


GREEDY = Sampling()
# What is colder draws the same; devices may take the smallest numbers of float32 for 0.
_COLDEST = 1e-30


@flax.struct.dataclass
class Draw:
  """A `Sampling` on the device: scalars, or one for each row.

  Attributes:
    key: PRNG key; which token of a sequence is drawn is folded in.
    temperature: float32.
    top_p: float32.
    top_k: int32.
  """

  key: jax.Array
  temperature: jax.typing.ArrayLike
  top_p: jax.typing.ArrayLike
  top_k: jax.typing.ArrayLike


def choose(logits_V: jax.Array, step: jax.Array, draw: Draw) -> jax.Array:
  """A token, int32; `draw` and the step decide it alone.

  Args:
    logits_V: float32 logits.
    step: which token of its sequence it is.
    draw: how it is chosen.
  """
  sampled = lambda: _sampled(logits_V, step, draw)
  likeliest = lambda: jnp.argmax(logits_V).astype(jnp.int32)
  return jax.lax.cond(jnp.asarray(draw.temperature) > 0, sampled, likeliest)


def choose_rows(logits_BV: jax.Array, steps_B: jax.Array, draws: Draw) -> jax.Array:
  """`choose` for every row, tokens_B; the vocabulary is sorted only if some row draws."""
  drawn = lambda: jax.vmap(choose)(logits_BV, steps_B, draws)
  likeliest = lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  return jax.lax.cond(jnp.any(jnp.asarray(draws.temperature) > 0), drawn, likeliest)


def _sampled(logits_V: jax.Array, step: jax.Array, draw: Draw) -> jax.Array:
  # Under `vmap` rows of temperature 0 come here too, and are not looked at.
  temperature, top_k = jnp.asarray(draw.temperature), jnp.asarray(draw.top_k)
  # From the likeliest down, so that what overflows at next to no temperature is of one sign.
  scaled_V = (logits_V - logits_V.max()) / jnp.maximum(temperature, _COLDEST)
  order_V = jnp.argsort(-scaled_V)
  among = jnp.where(top_k > 0, top_k, logits_V.size)
  ordered_V = jnp.where(jnp.arange(logits_V.size) < among, scaled_V[order_V], -jnp.inf)
  probs_V = jax.nn.softmax(ordered_V)
  # The first is always among them.
  before_V = jnp.cumsum(probs_V) - probs_V
  kept_V = jnp.where(before_V < draw.top_p, ordered_V, -jnp.inf)
  key = jax.random.fold_in(draw.key, step)
  return order_V[jax.random.categorical(key, kept_V)].astype(jnp.int32)

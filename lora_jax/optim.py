"""The optimiser of adapters: clipped AdamW, B faster than A, warm-up and cosine."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.config import OptimConfig


@flax.struct.dataclass
class Hyper:
  """A configuration's numbers as leaves, so that one program trains with any of them.

  Attributes:
    rates_S: learning rate of A at each step of the whole run; like the rest, float32.
    lr_ratio: rate of B over rate of A.
    beta1: decay of Adam's first moment.
    beta2: decay of Adam's second moment.
    weight_decay: decoupled weight decay.
    clip_norm: largest global norm of the gradient.
  """

  rates_S: Any
  lr_ratio: Any
  beta1: Any
  beta2: Any
  weight_decay: Any
  clip_norm: Any

  @classmethod
  def of(cls, config: OptimConfig, steps: int) -> 'Hyper':
    """The numbers of a run of so many steps."""
    names = ('lr_ratio', 'beta1', 'beta2', 'weight_decay', 'clip_norm')
    numbers = {name: np.float32(getattr(config, name)) for name in names}
    return cls(np.asarray(schedule(config, steps)(np.arange(steps)), np.float32), **numbers)


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
  """Learning rate of A at each step: linear from 0 to the peak, then cosine."""
  warmup = min(max(1, round(config.warmup * steps)), max(1, steps - 1))
  return optax.warmup_cosine_decay_schedule(
    # Step 0 must already move, or a short run wastes one of its steps.
    init_value=config.learning_rate / (warmup + 1),
    peak_value=config.learning_rate,
    warmup_steps=warmup,
    decay_steps=max(steps, warmup + 1),
    end_value=config.final_rate * config.learning_rate,
  )


def optimizer(hyper: Hyper) -> optax.GradientTransformation:
  """AdamW over an adapter tree, with the rate of every `b` leaf times `lr_ratio`.

  LoRA+ (Hayou et al. 2024): B should learn faster than A. Weights decay in A and B
  alone: zero is no rest for magnitudes, norms and biases. A gradient with a NaN or
  an infinity is left out and counted (`optax.apply_if_finite`).

  Args:
    hyper: the hyperparameters, which may be traced; the state does not depend on them.

  Returns:
    The transformation, whose state holds `notfinite_count`, the run of bad updates
    that is going on.
  """

  def named(*names):
    named_so = lambda path, _: path[-1].key in names
    return functools.partial(jax.tree_util.tree_map_with_path, named_so)

  rates_S = jnp.asarray(hyper.rates_S)
  chain = optax.chain(
    optax.clip_by_global_norm(hyper.clip_norm),
    optax.scale_by_adam(b1=hyper.beta1, b2=hyper.beta2),
    optax.add_decayed_weights(hyper.weight_decay, mask=named('a', 'b')),
    optax.masked(optax.scale(hyper.lr_ratio), named('b')),
    optax.scale_by_learning_rate(lambda step: rates_S[jnp.minimum(step, rates_S.size - 1)]),
  )
  # The trainer stops long before so many: a bad gradient is never applied.
  return optax.apply_if_finite(chain, max_consecutive_errors=2**30)

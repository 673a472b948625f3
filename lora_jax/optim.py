"""The optimiser of adapters: clipped AdamW, B faster than A, warm-up and cosine."""

import functools

import jax
import optax

from lora_jax.config import OptimConfig


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


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
  """AdamW over an adapter tree, with the rate of every `b` leaf times `lr_ratio`.

  LoRA+ (Hayou et al. 2024): B should learn faster than A. Weights decay in A and B
  alone: zero is no rest for magnitudes, norms and biases. A gradient with a NaN or
  an infinity is left out and counted (`optax.apply_if_finite`).

  Args:
    config: the hyperparameters.
    steps: updates in the whole run, which the schedule spans.

  Returns:
    The transformation, whose state holds `notfinite_count`, the run of bad updates
    that is going on.
  """

  def named(*names):
    named_so = lambda path, _: path[-1].key in names
    return functools.partial(jax.tree_util.tree_map_with_path, named_so)

  chain = optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.scale_by_adam(b1=config.beta1, b2=config.beta2),
    optax.add_decayed_weights(config.weight_decay, mask=named('a', 'b')),
    optax.masked(optax.scale(config.lr_ratio), named('b')),
    optax.scale_by_learning_rate(schedule(config, steps)),
  )
  # The trainer stops long before so many: a bad gradient is never applied.
  return optax.apply_if_finite(chain, max_consecutive_errors=2**30)

"""Trains one adapter on one frozen base.

The base is an argument of the step, never part of its state: it is not
differentiated, optimised, donated or saved.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import lora, lora_family
from lora_jax.config import LoraConfig, OptimConfig, TrainConfig
from lora_jax.data.pipeline import Batch
from lora_jax.loss import completion_loss
from lora_jax.optim import optimizer
from lora_jax.progress import Progress
from lora_jax.tracking import Log, finite
from lora_jax.transformer import Transformer, head_kernel, logits

Params = Mapping[str, Any]

# Bad updates in a row after which a run is given up.
_MAX_BAD_STEPS = 5


class DivergedError(Exception):
  """Loss or gradient stayed NaN or infinite; the text says at which step."""


@flax.struct.dataclass
class TrainState:
  """All that an update changes.

  Attributes:
    step: updates so far, int32.
    adapters: the adapter tree, float32.
    opt_state: the optimiser's state.
    key: PRNG key of dropout, the same at every step; the step's number is folded in.
  """

  step: jax.Array
  adapters: Any
  opt_state: Any
  key: jax.Array


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A trained adapter and how it came about.

  Attributes:
    adapters: the adapter tree, as it was after `kept_step` updates.
    losses: mean completion loss of each step, nats a token.
    eval_losses: (step, loss) on the rows kept out; step 0 is the base.
    tokens: real tokens seen, padding not counted.
    completion_tokens: those of them with a loss.
    examples: rows seen, counted each time.
    seconds: time of the loop, compilation included.
    compile_seconds: time until the first step had ended.
    eval_seconds: time spent on the rows kept out.
    bad_steps: updates left out because they were not finite.
    kept_step: updates that `adapters` has seen.
    stopped: 'finished', 'patience', 'interrupted' or 'diverged'.
  """

  adapters: Any
  losses: list[float]
  eval_losses: list[tuple[int, float]]
  tokens: int
  completion_tokens: int
  examples: int
  seconds: float
  compile_seconds: float
  eval_seconds: float
  bad_steps: int
  kept_step: int
  stopped: str

  def record(self) -> dict[str, Any]:
    """All but the adapter, as plain JSON values."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    del fields['adapters']
    fields['losses'] = [finite(loss) for loss in self.losses]
    fields['eval_losses'] = [[step, finite(loss)] for step, loss in self.eval_losses]
    return fields


def batch_loss(
  model: Transformer,
  base: Params,
  adapters: Params,
  batch: Mapping[str, Any],
  scale: lora.Scale,
  dropout_key: jax.Array | None = None,
  dropout_rate: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Sum of the losses of a batch's completion tokens, in nats, and how many there are."""
  params = lora.attach(base, adapters, scale, dropout_key, dropout_rate)
  hidden_BTD, _ = model.apply(
    {'params': params}, batch['tokens'], batch['positions'], batch['segments']
  )
  # The head is no target, so the frozen parameters serve it. Its logits are rounded to the
  # model's dtype, as transformers' are: kept in float32 they cost a tenth of a step.
  kernel = head_kernel(model, base)
  head = lambda hidden_CD: logits(model, hidden_CD, kernel, model.dtype)
  total = completion_loss(head, hidden_BTD, batch['targets'], batch['weights'])
  return total, batch['weights'].sum()


def make_step(
  model: Transformer, tx: optax.GradientTransformation, lora_config: LoraConfig
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict]]:
  """Compiles an update: (state, base, batch) -> (state, metrics); the state is donated."""

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, base, batch):
    dropout_key = jax.random.fold_in(state.key, state.step)
    scales = lora_family.plan(lora_config, state.adapters).scales()

    def mean_loss(adapters):
      total, count = batch_loss(
        model, base, adapters, batch, scales, dropout_key, lora_config.dropout
      )
      return total / jnp.maximum(count, 1)

    loss, grads = jax.value_and_grad(mean_loss)(state.adapters)
    opt_state: Any
    updates, opt_state = tx.update(grads, state.opt_state, state.adapters)
    adapters = optax.apply_updates(state.adapters, updates)
    metrics = {
      'loss': loss,
      'grad_norm': optax.tree.norm(grads),
      'bad_in_a_row': opt_state.notfinite_count,
      'bad_steps': opt_state.total_notfinite,
    }
    return TrainState(state.step + 1, adapters, opt_state, state.key), metrics

  return step


def make_evaluation(
  model: Transformer, lora_config: LoraConfig
) -> Callable[[Params, Params, Sequence[Batch]], float]:
  """Compiles the mean completion loss over batches: (base, adapters, batches) -> nats."""

  @jax.jit
  def one(base, adapters, batch):
    scales = lora_family.plan(lora_config, adapters).scales()
    return batch_loss(model, base, adapters, batch, scales)

  def mean(base: Params, adapters: Params, batches: Sequence[Batch]) -> float:
    sums = [one(base, adapters, batch) for batch in batches]
    return float(sum(total for total, _ in sums) / sum(count for _, count in sums))

  return mean


def init_state(adapters: Params, tx: optax.GradientTransformation, seed: int) -> TrainState:
  """The state before the first update."""
  key = jax.random.fold_in(jax.random.key(seed), 1)
  return TrainState(jnp.int32(0), adapters, tx.init(adapters), key)


def train(
  model: Transformer,
  base: Params,
  paths: Sequence[str],
  batches: Iterator[Batch],
  eval_batches: Sequence[Batch],
  config: TrainConfig,
  lora_config: LoraConfig,
  optim_config: OptimConfig,
  seed: int,
  log: Log = lambda metrics: None,
  what: str = 'train',
  stop: Callable[[], bool] = lambda: False,
) -> Outcome:
  """Trains an adapter from its initialisation.

  The learning rate falls over all of `config.steps`, whether or not the run stops before.

  Args:
    model: the Transformer, in the dtype and with the remat to train with.
    base: its frozen parameters.
    paths: the modules to adapt, from `lora.resolve`.
    batches: an endless stream.
    eval_batches: what to watch the loss on; may be empty.
    config: length of the run, and which adapter it gives back.
    lora_config: which of the LoRA family the adapter is.
    optim_config: hyperparameters.
    seed: of the initialisation and of dropout.
    log: receives {'step', 'loss', 'grad_norm'} of each step and {'step', 'eval_loss'}.
    what: name of the run for the progress display.
    stop: asked before each step; where it says so, the run ends there.

  Returns:
    The outcome.

  Raises:
    DivergedError: several updates in a row, or all of them, were not finite, and there is
      no best adapter to give back.
  """
  tx = optimizer(optim_config, config.steps)
  adapters = lora_family.init(jax.random.key(seed), base, paths, lora_config)
  state = init_state(adapters, tx, seed)
  step = make_step(model, tx, lora_config)
  evaluate = make_evaluation(model, lora_config)
  losses, eval_losses = [], []
  tokens = completion_tokens = examples = bad_steps = done = waited = 0
  lowest, kept, stopped = math.inf, None, 'finished'
  start, compile_seconds, eval_seconds = time.perf_counter(), 0.0, 0.0

  def record(number, metrics):
    """Reads a step's metrics, one step late, so that the device never waits for us."""
    nonlocal bad_steps
    loss, bad_steps = float(metrics['loss']), int(metrics['bad_steps'])
    losses.append(loss)
    log({'step': number, 'loss': loss, 'grad_norm': float(metrics['grad_norm'])})
    progress.advance(loss=loss)
    if int(metrics['bad_in_a_row']) >= _MAX_BAD_STEPS:
      raise DivergedError(f'{_MAX_BAD_STEPS} updates in a row were not finite, up to step {number}')

  def watch(number):
    """The loss on the rows kept out."""
    nonlocal eval_seconds
    eval_start = time.perf_counter()
    eval_losses.append((number, evaluate(base, state.adapters, eval_batches)))
    eval_seconds += time.perf_counter() - eval_start
    log({'step': number, 'eval_loss': eval_losses[-1][1]})
    return eval_losses[-1][1]

  try:
    with Progress(what, config.steps) as progress:
      if eval_batches and config.keep_best:
        # What the base has: to see whether any of it was of use, never itself the best.
        watch(0)
      pending = None
      for number in range(1, config.steps + 1):
        if stop():
          stopped = 'interrupted'
          break
        batch = next(batches)
        tokens += int((batch['segments'] > 0).sum())
        completion_tokens += int(batch['weights'].sum())
        examples += int(np.max(batch['segments'], axis=1).sum())
        state, metrics = step(state, base, batch)
        done = number
        if pending is not None:
          record(*pending)
        else:
          jax.block_until_ready(metrics)
          compile_seconds = time.perf_counter() - start - eval_seconds
        pending = (number, metrics)
        if eval_batches and (number % config.eval_every == 0 or number == config.steps):
          jax.block_until_ready(metrics)
          loss = watch(number)
          waited += 1
          if loss < lowest:
            lowest, waited = loss, 0
            if config.keep_best:
              # The next step takes the buffers for its own.
              kept = (number, jax.tree.map(jnp.copy, state.adapters))
          if waited == config.patience > 0 and number < config.steps:
            stopped = 'patience'
            break
      if pending is not None:
        record(*pending)
    if done and bad_steps == done:
      raise DivergedError(f'none of the {done} updates was finite')
  except DivergedError:
    if kept is None:
      raise
    stopped = 'diverged'
  kept_step, adapters = kept or (done, state.adapters)
  return Outcome(
    adapters=adapters,
    losses=losses,
    eval_losses=eval_losses,
    tokens=tokens,
    completion_tokens=completion_tokens,
    examples=examples,
    seconds=time.perf_counter() - start,
    compile_seconds=compile_seconds,
    eval_seconds=eval_seconds,
    bad_steps=bad_steps,
    kept_step=kept_step,
    stopped=stopped,
  )

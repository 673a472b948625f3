"""One update, and the loss on rows kept out, of C adapters on one frozen base.

A cell of the grid is all that an update changes or reads beside the base and the batch:
adapters, optimiser, hyperparameters, scales. Cells are stacked on a leading axis C and
the step is mapped over it, the base unmapped: products with frozen kernels stay single
large ones, and one program serves every target set, rank, rate and seed. An adapter
trained alone is C = 1. A batch runs through the model in parts where that is faster or
spares memory; what is learned is the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax import lora, packs, sharding
from lora_jax.config import LoraConfig, OptimConfig
from lora_jax.data.pipeline import Batch, BatchShape
from lora_jax.head import head_kernel, logits
from lora_jax.loss import CHUNK, completion_loss, with_target
from lora_jax.optim import Hyper, optimizer
from lora_jax.parts import part_rows
from lora_jax.self_attention import SelfAttention
from lora_jax.transformer import Transformer
from lora_jax.vision import Features

Params = Mapping[str, Any]

# Positions that the head takes at a time, of each cell, at least.
_LEAST_CHUNK = 32


@flax.struct.dataclass
class TrainState:
  """A cell.

  Attributes:
    step: updates so far, int32.
    adapters: the adapter tree, float32.
    opt_state: the optimiser's state.
    key: PRNG key of dropout, the same at every step; the numbers of the step and of a
      row of its batch are folded in.
    scales: path of a module -> (L,), the factor on each layer's low-rank product.
    hyper: the hyperparameters.
  """

  step: jax.Array
  adapters: Any
  opt_state: Any
  key: jax.Array
  scales: Any
  hyper: Hyper

  @property
  def pack(self) -> packs.Pack:
    """What evaluation needs of it."""
    return packs.Pack(self.adapters, self.scales)


def for_batches(model: Transformer, shape: BatchShape) -> Transformer:
  """The model as it is fastest on batches of a shape: attention may count on what is not there."""
  return model.clone(attention=SelfAttention(shared_prefix=bool(shape.prefix)))


def init_state(
  adapters: Params,
  lora_config: LoraConfig,
  optim_config: OptimConfig,
  steps: int,
  seed: int,
  shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> TrainState:
  """A cell before its first update.

  Args:
    adapters: a fresh adapter, from `lora_family.init`.
    lora_config: which it was made by.
    optim_config: its hyperparameters.
    steps: updates in the whole run, which the schedule spans.
    seed: of dropout.
    shapes: those of the union tree that it is to stand in; None: its own.
  """
  shapes = packs.union([adapters]) if shapes is None else shapes
  scales = packs.scales(adapters, lora_config, shapes)
  whole, hyper = packs.embed(adapters, shapes), Hyper.of(optim_config, steps)
  key = jax.random.fold_in(jax.random.key(seed), 1)
  return TrainState(jnp.int32(0), whole, optimizer(hyper).init(whole), key, scales, hyper)


def place(states: TrainState, base: Params) -> TrainState:
  """Puts stacked cells onto the current mesh, if there is one."""
  mesh = sharding.current()
  return states if mesh is None else sharding.place(states, shardings(states, base, mesh))


def shardings(states: TrainState, base: Params, mesh: Mesh) -> TrainState:
  """Where stacked cells, or their shapes, lie on a mesh.

  Adapters and what the optimiser keeps of each are cut as their kernels are.
  """
  whole = NamedSharding(mesh, PartitionSpec())
  specs = lora.specs(sharding.specs(base), states.adapters)
  of_adapters = sharding.adapter_shardings(specs, states.adapters, mesh)
  of_moments = optax.tree.map_params(
    # Any: the state does not depend on its numbers.
    optimizer(Hyper.of(OptimConfig(), 1)),
    lambda _, of_adapter: of_adapter,
    states.opt_state,
    of_adapters,
    transform_non_params=lambda _: whole,
  )
  of_all = jax.tree.map(lambda _: whole, states)
  return of_all.replace(adapters=of_adapters, opt_state=of_moments)


def stack_batches(batches: Sequence[Batch], positions: int = 0) -> dict[str, Any]:
  """A batch of each cell in parts, (C, parts, rows, T), and how much of each the head must see.

  Args:
    batches: of one shape.
    positions: as `part_rows` has it.
  """
  cells, (rows, length) = len(batches), batches[0]['tokens'].shape
  together = part_rows(rows, length, cells, positions)
  parted = lambda x: x.reshape(cells, rows // together, together, *x.shape[2:])
  whole = {name: parted(x) for name, x in packs.stack(list(batches)).items()}
  in_use = [[with_target(part) for part in of_cell] for of_cell in whole['weights']]
  return {**whole, 'in_use': np.max(in_use, axis=0).astype(np.int32)}


def batch_loss(
  model: Transformer,
  base: Params,
  adapters: Params,
  batch: Mapping[str, Any],
  scale: lora.Scale,
  dropout_key: jax.Array | None = None,
  dropout_rate: float = 0.0,
  chunk: int = CHUNK,
  may_be_idle: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Sum of the losses of a batch's completion tokens, in nats, and how many there are."""
  params = lora.attach(base, adapters, scale, dropout_key, dropout_rate, may_be_idle)
  features = Features(batch['features'], batch['slots']) if 'features' in batch else None
  hidden_BTD, _ = model.apply(
    {'params': params}, batch['tokens'], batch['positions'], batch['segments'], features=features
  )
  # The head is no target, so the frozen parameters serve it. Its logits are rounded to the
  # model's dtype, as transformers' are: kept in float32 they cost a tenth of a step.
  kernel = head_kernel(model, base)
  head = lambda hidden_CD: logits(model, hidden_CD, kernel, model.dtype)
  total = completion_loss(
    head, hidden_BTD, batch['targets'], batch['weights'], chunk, batch.get('in_use')
  )
  return total, batch['weights'].sum()


def make_step(
  model: Transformer, cells: int, dropout: float = 0.0, states: TrainState | None = None
) -> Callable[[TrainState, Params, Mapping[str, Any], Any], tuple[TrainState, dict]]:
  """Jits an update: (states, base, batches, active_C) -> (states, metrics of (C,) each).

  The states are donated. A cell that is not active stays as it is.

  Args:
    model: the Transformer.
    cells: C.
    dropout: share of an adapter's input that is dropped.
    states: over a mesh, some that it will be given: it gives them back lying as they did.
  """

  def update(state: TrainState, base: Params, batch: Mapping[str, Any], active: jax.Array):
    step_key = jax.random.fold_in(state.key, state.step)

    def total_loss(adapters, number, part):
      # Of each row of the batch, so that it does not matter how many there are in a part.
      rows = part['tokens'].shape[0]
      keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, number * rows + jnp.arange(rows))
      of_cells = (_chunk(cells), packs.may_be_idle(cells))
      return batch_loss(model, base, adapters, part, state.scales, keys, dropout, *of_cells)

    part_grads = jax.value_and_grad(total_loss, has_aux=True)
    of_part = lambda number, part: part_grads(state.adapters, number, part)
    (total, count), sums = summed(of_part, batch)
    mean = lambda x: x / jnp.maximum(count, 1)
    loss, grads = mean(total), jax.tree.map(mean, sums)
    opt_state: Any
    updates, opt_state = optimizer(state.hyper).update(grads, state.opt_state, state.adapters)
    adapters = optax.apply_updates(state.adapters, updates)
    metrics = {
      'loss': loss,
      'grad_norm': optax.tree.norm(grads),
      'bad_in_a_row': opt_state.notfinite_count,
      'bad_steps': opt_state.total_notfinite,
    }
    after = (state.step + 1, adapters, opt_state)
    before = (state.step, state.adapters, state.opt_state)
    kept = jax.tree.map(lambda new, old: jnp.where(active, new, old), after, before)
    step, adapters, opt_state = kept
    return TrainState(step, adapters, opt_state, state.key, state.scales, state.hyper), metrics

  over_cells = _over_cells(update, cells, (0, None, _BATCH_AXES, 0))
  placed: dict[str, Any] = {}
  if states is not None and sharding.spread():
    placed = {'out_shardings': (jax.tree.map(lambda leaf: leaf.sharding, states), None)}
  return jax.jit(over_cells, donate_argnums=0, **placed)


def make_evaluation(
  model: Transformer, cells: int
) -> Callable[[packs.Pack, Params, Sequence[Mapping[str, Any]]], np.ndarray]:
  """Mean completion loss (C,) over batches: (pack, base, batches) -> nats.

  Args:
    model: the Transformer.
    cells: C.
  """

  def one(pack: packs.Pack, base: Params, batch: Mapping[str, Any]):
    def of_part(number, part):
      of_cells = {'chunk': _chunk(cells), 'may_be_idle': packs.may_be_idle(cells)}
      return batch_loss(model, base, pack.adapters, part, pack.scales, **of_cells)

    return summed(of_part, batch)

  compiled = jax.jit(_over_cells(one, cells, (0, None, _BATCH_AXES)))

  def mean(pack: packs.Pack, base: Params, batches: Sequence[Mapping[str, Any]]) -> np.ndarray:
    totals, counts = zip(*(compiled(pack, base, batch) for batch in batches), strict=True)
    with np.errstate(invalid='ignore'):
      return np.sum(np.asarray(totals), axis=0) / np.sum(np.asarray(counts), axis=0)

  return mean


# How much the head sees is one for all cells, so that what it decides stays a branch.
_BATCH_AXES = {
  **dict.fromkeys(('tokens', 'targets', 'weights', 'positions', 'segments'), 0),
  **dict.fromkeys(('features', 'slots'), 0),
  'in_use': None,
}


def _over_cells(one: Callable, cells: int, axes: tuple) -> Callable:
  """Maps over C; where C is 1, takes the axis off and puts it on again."""

  def mapped(*arguments):
    # Not all batches hold all of them.
    of = lambda axis, held: {name: axis[name] for name in held} if isinstance(axis, dict) else axis
    return jax.vmap(one, tuple(map(of, axes, arguments)))(*arguments)

  if cells > 1:
    return mapped

  def alone(*arguments):
    def off(axis, argument):
      return jax.tree.map(lambda leaf: leaf[0], argument) if axis == 0 else argument

    taken = [
      {name: off(axis[name], part) for name, part in argument.items()}
      if isinstance(axis, dict)
      else off(axis, argument)
      for axis, argument in zip(axes, arguments, strict=True)
    ]
    return jax.tree.map(lambda leaf: leaf[None], one(*taken))

  return alone


def summed(of_part: Callable[[jax.Array, Mapping[str, Any]], Any], batch: Mapping[str, Any]):
  """The sum of what `of_part` gives for each part of a batch and its number."""
  parts = batch['tokens'].shape[0]
  if parts == 1:
    return of_part(jnp.int32(0), {name: x[0] for name, x in batch.items()})
  first = {name: x[0] for name, x in batch.items()}
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, jnp.int32(0), first))

  def add(sums, numbered):
    return jax.tree.map(jnp.add, sums, of_part(*numbered)), None

  return jax.lax.scan(add, zeros, (jnp.arange(parts), batch))[0]


def _chunk(cells: int) -> int:
  return max(_LEAST_CHUNK, CHUNK // cells) * sharding.row_shards()

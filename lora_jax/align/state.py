"""How far a stage is: its parameters and optimiser after so many updates, in memory and on disk."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax import checkpoint
from lora_jax.align.recipe import Recipe, Stage
from lora_jax.config import OptimConfig
from lora_jax.errors import UserError
from lora_jax.optim import schedule

_NAME = re.compile(r'checkpoint-(\d+)')


@flax.struct.dataclass
class State:
  """A stage on its way.

  Attributes:
    step: updates so far, int32.
    params: what is trained, float32.
    opt_state: the optimiser's.
  """

  step: jax.Array
  params: Any
  opt_state: Any


def optimizer(recipe: Recipe, stage: Stage) -> optax.GradientTransformation:
  """AdamW, clipped, that leaves out what is not finite; only kernels decay."""
  config = OptimConfig(learning_rate=stage.learning_rate, warmup=recipe.warmup)

  def kernels(params):
    return unflatten_dict({path: path[-1] == 'kernel' for path in flatten_dict(params)})

  chain = optax.chain(
    optax.clip_by_global_norm(recipe.clip_norm),
    optax.adamw(
      schedule(config, stage.steps), b2=0.98, weight_decay=recipe.weight_decay, mask=kernels
    ),
  )
  # The loop gives up long before so many.
  return optax.apply_if_finite(chain, max_consecutive_errors=2**30)


def fresh(recipe: Recipe, stage: Stage, params: Mapping[str, Any]) -> State:
  """Before the first update."""
  return State(jnp.int32(0), params, optimizer(recipe, stage).init(params))


def make_step(recipe: Recipe, stage: Stage, loss: Callable) -> Callable:
  """Jits (state, frozen, batch) -> (state, metrics); the state is given back.

  Args:
    recipe: the recipe.
    stage: of it.
    loss: as `work.Work` has it.
  """
  update = optimizer(recipe, stage).update

  def step(state: State, frozen: Any, batch: Mapping[str, Any]):
    grads, metrics = jax.grad(loss, has_aux=True)(state.params, frozen, batch)
    opt_state: Any
    updates, opt_state = update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {**metrics, 'bad_in_a_row': opt_state.notfinite_count}
    return State(state.step + 1, params, opt_state), metrics

  return jax.jit(step, donate_argnums=0)


def latest(directory: Path) -> tuple[int, Path] | None:
  """The number of updates and the place of the newest checkpoint of a stage, if there is one."""
  found = [(int(m[1]), path) for path in directory.glob('*') if (m := _NAME.fullmatch(path.name))]
  return max(found, default=None)


def save(directory: Path, state: State) -> None:
  """Writes a checkpoint whole, then deletes those before it.

  Raises:
    UserError: it cannot be written.
  """
  path = directory / f'checkpoint-{int(state.step):07d}'
  checkpoint.save(path, _numbered(state))
  for old in directory.glob('checkpoint-*'):
    if old != path:
      shutil.rmtree(old, ignore_errors=True)


def load(path: Path, like: State) -> State:
  """Reads a checkpoint.

  Args:
    path: from `latest`.
    like: a state of the same stage, or its shapes.

  Raises:
    UserError: it is damaged, or of another recipe.
  """
  of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  shapes = jax.tree.map(of, _numbered(like))
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      held = checkpointer.restore(path.absolute(), shapes)
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f'{path} is damaged; delete it, and its stage begins again') from error
  # Copied: what a checkpoint reader owns is not to be given back to the device by a step.
  leaves = [jnp.array(leaf) for _, leaf in sorted(held.items())]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _numbered(state: State) -> dict[str, Any]:
  """The leaves by name, since checkpoints hold dicts alone."""
  return {f'{i:05d}': leaf for i, leaf in enumerate(jax.tree.leaves(state))}

"""What the first steps of training would bring to each module, without any training.

Adapters are put on all modules and the gradient of the loss is taken on a few batches. At
B = 0 that of A is zero, and Adam's first step moves each number of B by its rate, against
the sign of its gradient. To first order a step on batch i lowers the loss of batch j by

  rate * <sign(g_i), g_j>

which is a sum over modules: what a set of modules would bring is the sum of what each of
them would. Beside it stands PLoP's feature norm, which needs no gradient
(`lora_jax.feature_norm`).

  found = measure(model, params, batches, paths, LoraConfig(), OptimConfig(), seed=0)
  found.decreases['layers/attn/o_proj']       # (n, n): step on i, loss of j
"""

import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from lora_jax import arms, feature_norm, lora, lora_family, packs
from lora_jax.config import LoraConfig, OptimConfig
from lora_jax.data.eyes import Eyes
from lora_jax.data.pipeline import Batch, groups, training_batches
from lora_jax.data.sources import Source
from lora_jax.data.task import Task
from lora_jax.errors import UserError
from lora_jax.hub.base import Base
from lora_jax.presets import EQUAL_RANK, Settings
from lora_jax.progress import Progress
from lora_jax.ranking import FEWEST_BATCHES
from lora_jax.sight import Sight
from lora_jax.step import batch_loss, for_batches, stack_batches, summed
from lora_jax.targets import FUSED, is_sight
from lora_jax.task_rows import TaskRows
from lora_jax.transformer import Transformer

Params = Mapping[str, Any]

# Probed whatever the sets are, so that more of them can be ranked later.
_ALL = 'all'
# Leaves that the first step moves. A begins to move with the second, but for PiSSA, whose B
# is not zero. Norms and biases that train too do so in every set, and rank none.
_MOVED = {'default': ('b', 'm'), 'pissa': ('a', 'b', 'm')}


@dataclasses.dataclass(frozen=True)
class Probed:
  """What n batches say of each module.

  Attributes:
    losses: (n,) mean completion loss of each batch before any step, nats a token.
    decreases: path of a module -> (n, n): by how much a step of its adapter on batch i
      lowers the loss of batch j, to first order.
    feature_norms: path of a kernel's module -> (n,), means over tokens and layers.
  """

  losses: np.ndarray
  decreases: dict[str, np.ndarray]
  feature_norms: dict[str, np.ndarray]

  def record(self) -> dict[str, Any]:
    """As plain JSON values."""
    plain = lambda held: {path: _rounded(values) for path, values in held.items()}
    return {
      'losses': _rounded(self.losses),
      'decreases': plain(self.decreases),
      'feature_norms': plain(self.feature_norms),
    }


class Prober:
  """Probes tasks as a study would train on them."""

  def __init__(
    self,
    settings: Settings,
    base: Base,
    model: Transformer,
    params: Params,
    source: Source,
    cache_dir: Path,
  ):
    """Computes nothing yet.

    Args:
      settings: the study's.
      base: the frozen model.
      model: its Transformer.
      params: its parameters, on the device.
      source: where rows come from.
      cache_dir: where prepared rows, and features of their images, are kept.
    """
    self._settings, self._base, self._source = settings, base, source
    self._model, self._params, self._cache_dir = model, params, cache_dir
    self._sight: Sight | None = None
    if base.images is not None and base.config.vision is not None:
      edge = settings.sight.image_edge or base.images.longest_edge
      images = dataclasses.replace(base.images, longest_edge=edge)
      eyes = Eyes(base.config.vision, images, settings.sight.blank_images)
      self._sight = Sight(model, params, eyes, cache_dir / 'features')

  def sets(self, targets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Set -> its 'modules' and their 'trainable_params', as a record has it.

    Raises:
      UserError: a set that the adapters' configuration does not go with, or of what sees.
    """
    config, found = self._settings.lora, {}
    lora_family.check(config, [*targets, _ALL], self._params)
    for name in targets:
      paths = lora.resolve(name, self._params)
      for path in filter(is_sight, paths):
        raise UserError(
          f'{name} adapts {path}, and images are seen once, before training; give targets of the '
          'language model'
        )
      size = arms.size(name, EQUAL_RANK, config, self._params).summary
      found[name] = {'modules': [*paths], 'trainable_params': size.trainable_params}
    return found

  def posed(self, tasks: Sequence[Task]) -> list[Task]:
    """The tasks that this base can be asked; the others are told.

    Raises:
      UserError: there is none.
    """
    found = [task for task in tasks if task.posed(sees=self._sight is not None)]
    for task in tasks:
      if task not in found:
        why = 'it needs the image, which this base cannot see'
        print(f'{task.name}: left out, {why}', file=sys.stderr)
    if not found:
      raise UserError(f'{self._base.name} can be asked none of these datasets; give others')
    return found

  def fingerprint(self, task: Task) -> str:
    """Changes when the task's rows would; as in the records of a study."""
    return hashlib.sha256(self._source.fingerprint(task).encode()).hexdigest()

  def probe(self, task: Task, sets: Mapping[str, Any], count: int, seed: int) -> Probed:
    """Probes all modules of the language model, and what else the sets have.

    Args:
      task: the dataset.
      sets: from `sets`.
      count: batches.
      seed: of the order of rows, and of A.

    Raises:
      UserError: rows that cannot be used or are too few.
    """
    settings, source = self._settings, self._source
    rows = TaskRows(task, source, self._base, settings, self._cache_dir, self._sight)
    rows.look()
    more = [path for of in sets.values() for path in of['modules']]
    return measure(
      for_batches(self._model, rows.shape),
      self._params,
      distinct_batches(rows, count, seed),
      [*dict.fromkeys([*lora.resolve(_ALL, self._params), *more])],
      settings.lora,
      settings.optim,
      seed,
      settings.train.positions,
      f'probe {task.name}',
    )


def distinct_batches(rows: TaskRows, count: int, seed: int) -> list[Batch]:
  """The first batches that training with this seed sees, without any row twice.

  A row that two batches share would be one that each knows of the other.

  Raises:
    UserError: too few rows for that.
  """
  there = len(groups(rows.train, rows.shape, seed)) // rows.shape.rows
  if there < FEWEST_BATCHES:
    raise UserError(
      f'{rows.task.name}: {len(rows.train)} rows make {there} batches, at least {FEWEST_BATCHES} '
      'are needed; lower --tokens_per_batch or raise --train_rows'
    )
  if there < count:
    print(f'{rows.task.name}: {there} batches, since its rows make no more', file=sys.stderr)
  stream = training_batches(rows.train, rows.shape, seed, rows.features)
  return [*itertools.islice(stream, min(there, count))]


def measure(
  model: Transformer,
  base: Params,
  batches: Sequence[Batch],
  paths: Sequence[str],
  config: LoraConfig,
  optim: OptimConfig,
  seed: int,
  positions: int = 0,
  what: str = 'probe',
) -> Probed:
  """Probes modules on batches; one program for all of them.

  Args:
    model: the Transformer, as it is for batches of this shape.
    base: its parameters.
    batches: of one shape, no row in two of them.
    paths: modules, from `lora.resolve`; fused ones beside their parts, too.
    config: which of the LoRA family the adapters are.
    optim: the rates of a step, at their peak.
    seed: of A, drawn as for training.
    positions: as `part_rows` has it.
    what: name of the work for the progress display.

  Raises:
    UserError: a loss or gradient is not finite.
  """
  parted = [_in_parts(batch, positions) for batch in batches]
  # A kernel has one adapter at a time. Modules do not see each other's, since all are zero.
  fused = lambda path: path.rsplit('/', 1)[-1] in FUSED
  trees = [[p for p in paths if not fused(p)], [p for p in paths if fused(p)]]
  losses = np.zeros(len(batches))
  decreases: dict[str, np.ndarray] = {}
  norms: dict[str, list[float]] = {}
  with Progress(what, len(batches) * sum(map(bool, trees)), unit='batch') as progress:
    for own in filter(None, trees):
      adapters = lora_family.init(jax.random.key(seed), base, own, config)
      scales = lora_family.plan(config, adapters).scales()
      flat = packs.flat(adapters)
      moved = {p: x for p, x in flat.items() if p.rsplit('/', 1)[-1] in _MOVED[config.init]}
      still = {p: x for p, x in flat.items() if p not in moved}
      grads, norms = [], {}
      for i, batch in enumerate(parted):
        loss, grad, of_batch = _of_batch(model, base, moved, still, scales, batch)
        losses[i] = float(loss)
        grads.append(grad)
        for path, of_layers in of_batch.items():
          norms.setdefault(path, []).append(float(np.mean(of_layers)))
        progress.advance(loss=losses[i])
      decreases |= _decreases(adapters, grads, optim)
  found = Probed(losses, decreases, {path: np.array(of) for path, of in norms.items()})
  if not all(np.isfinite(x).all() for x in [losses, *decreases.values()]):
    raise UserError(f'{what}: a loss or gradient is not finite; try --dtype=float32')
  return found


def _in_parts(batch: Batch, positions: int) -> dict[str, Any]:
  """A batch as the training step runs it, without the axis of cells."""
  whole = stack_batches([batch], positions)
  return {name: x if name == 'in_use' else x[0] for name, x in whole.items()}


@functools.partial(jax.jit, static_argnames='model')
def _of_batch(
  model: Transformer,
  base: Params,
  moved: dict[str, jax.Array],
  still: dict[str, jax.Array],
  scales: Mapping[str, Any],
  batch: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
  """A batch's mean loss, its gradient, and each module's feature norm in each layer."""

  def total_loss(moved, part):
    adapters = unflatten_dict({**still, **moved}, sep='/')
    return batch_loss(model, base, adapters, part, scales)

  def of_part(number, part):
    part_loss = jax.value_and_grad(total_loss, has_aux=True)
    # No gradient goes through the second pass, so it keeps nothing.
    return part_loss(moved, part), feature_norm.over_tokens(model, base, part)

  ((total, count), sums), (norms, tokens) = summed(of_part, batch)
  mean = lambda x: x / jnp.maximum(count, 1)
  norms = {path: of_layers / tokens for path, of_layers in norms.items()}
  return mean(total), jax.tree.map(mean, sums), norms


def _decreases(
  adapters: Params, grads: Sequence[Mapping[str, jax.Array]], optim: OptimConfig
) -> dict[str, np.ndarray]:
  """Path of a module -> its decreases (n, n), summed over its leaves."""
  owners = {path: module.owner for path, module in lora.modules(adapters).items()}
  found: dict[str, np.ndarray] = {}
  for path in grads[0]:
    module, leaf = path.rsplit('/', 1)
    # As `optim.optimizer` has it.
    rate = optim.learning_rate * (optim.lr_ratio if leaf == 'b' else 1.0)
    owner = owners.get(module, module)
    lowered = rate * np.asarray(_signed_products([grad[path] for grad in grads]), np.float64)
    found[owner] = found[owner] + lowered if owner in found else lowered
  return found


@jax.jit
def _signed_products(grads: Sequence[jax.Array]) -> jax.Array:
  """<sign(g_i), g_j> of n gradients, (n, n)."""
  flat_NP = jnp.stack([grad.reshape(-1) for grad in grads])
  return jnp.matmul(jnp.sign(flat_NP), flat_NP.T, precision=jax.lax.Precision.HIGHEST)


def _rounded(values: np.ndarray) -> Any:
  """Seven digits, which is what float32 has."""
  if values.ndim:
    return [_rounded(value) for value in values]
  return float(f'{values:.7g}')

"""The arms of a study: target sets at one rank, and at one number of trainable parameters.

At equal rank, which is the article's arm, sets of modules differ in size by as much as nine
times. In the arm of equal parameters each set has a rank of its own, so that it trains as
many numbers as `all` does at the run's rank, as nearly as whole ranks allow; the factor
on the low-rank product stays what it was.

  sized = arms.size('o_proj', EQUAL_PARAMETERS, LoraConfig(rank=16), params)
  sized.config.rank, sized.miss
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from lora_jax import lora, lora_family
from lora_jax.config import LoraConfig
from lora_jax.errors import UserError
from lora_jax.presets import EQUAL_PARAMETERS
from lora_jax.targets import parts

Params = Mapping[str, Any]

# The set whose size is the budget. It does not depend on which sets a run has, so that sets
# which are added later are of the same size.
_BUDGET_OF = 'all'


@dataclasses.dataclass(frozen=True)
class Sized:
  """A target set's adapter in an arm.

  Attributes:
    config: the adapter's shape.
    summary: what it holds.
    budget: trainable parameters aimed at; None: rank was what was given.
    most: the highest rank of use, the smallest side of its modules.
  """

  config: LoraConfig
  summary: lora.Summary
  budget: int | None = None
  most: int | None = None

  @property
  def miss(self) -> float:
    """How far it is above the budget, as a share of it."""
    return self.summary.trainable_params / self.budget - 1 if self.budget else 0.0

  def __str__(self) -> str:
    if self.budget is None:
      return str(self.summary)
    aimed = f'{100 * self.miss:+.1f} % off {self.budget:,}'
    return f'rank {self.config.rank}, {aimed}: {self.summary}'

  def record(self) -> dict[str, Any]:
    """What a cell's record says of it beside its summary."""
    if self.budget is None:
      return {}
    held = {'rank': self.config.rank, 'alpha': self.config.alpha, 'most_rank': self.most}
    return {**held, 'budget': self.budget, 'miss': self.miss}


def check(config: LoraConfig) -> None:
  """Raises `UserError` where a configuration leaves no single rank to solve."""
  for name in ('rank_pattern', 'alpha_pattern'):
    if getattr(config, name):
      raise UserError(
        f'--{name}: --arms={EQUAL_PARAMETERS} gives all modules of a set one rank and one alpha; '
        'leave one of the two out'
      )


def size(targets: str, arm: str, config: LoraConfig, params: Params) -> Sized:
  """The adapter of a target set in an arm.

  Args:
    targets: comma-joined.
    arm: one of `presets.ARMS`.
    config: the run's, whose rank and alpha are those of equal rank.
    params: the base, or its shapes.

  Raises:
    UserError: the set matches nothing, or a rank is too large.
  """
  if arm != EQUAL_PARAMETERS:
    return Sized(config, _summary(targets, config, params))
  budget = _summary(_BUDGET_OF, config, params).trainable_params
  one, two = (_parameters(targets, config, params, rank) for rank in (1, 2))
  # Norms, biases and DoRA's magnitudes do not grow with the rank; all else does evenly.
  fixed, each = 2 * one - two, two - one
  most = _most(targets, params)
  rank = min(max(1, round((budget - fixed) / each)), most)
  solved = with_rank(config, rank)
  return Sized(solved, _summary(targets, solved, params), budget, most)


def with_rank(config: LoraConfig, rank: int) -> LoraConfig:
  """Another rank, and the alpha that keeps the factor on the low-rank product."""
  grown = (rank / config.rank) ** (0.5 if config.rslora else 1.0)
  return dataclasses.replace(config, rank=rank, alpha=config.alpha * grown)


def _most(targets: str, params: Params) -> int:
  """The highest rank that any of its modules can use."""
  flat: dict[str, Any] = dict(flatten_dict(params, sep='/'))
  sides = []
  for path in lora.resolve(targets, params):
    shapes = [flat[f'{part}/kernel'].shape[-2:] for part in parts(path)]
    sides += [shapes[0][0], sum(fan_out for _, fan_out in shapes)]
  return min(sides)


def _parameters(targets: str, config: LoraConfig, params: Params, rank: int) -> int:
  return _summary(targets, dataclasses.replace(config, rank=rank), params).trainable_params


def _summary(targets: str, config: LoraConfig, params: Params) -> lora.Summary:
  """What an adapter on `targets` holds, from its shapes alone."""
  paths = lora.resolve(targets, params)
  fresh = lambda: lora_family.init(jax.random.key(0), params, paths, config)
  shapes = jax.eval_shape(fresh)
  return lora.summarise(shapes, lora_family.plan(config, shapes).ranks)

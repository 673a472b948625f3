"""Batches that latency is measured in; nothing here needs an accelerator or JAX."""

import dataclasses
from collections.abc import Sequence

from lora_jax.errors import UserError

# What stands beside the target sets: the base, and the base with an adapter merged into it.
BASE, MERGED = 'base', 'merged'


@dataclasses.dataclass(frozen=True, order=True)
class Batch:
  """What is answered at a time.

  Attributes:
    rows: prompts.
    adapters: how many different ones these have, at most one each.
  """

  rows: int
  adapters: int

  @property
  def label(self) -> str:
    """For people."""
    plural = lambda count, noun: f'{count} {noun}{"" if count == 1 else "s"}'
    return f'{plural(self.rows, "row")}, {plural(self.adapters, "adapter")}'


def batches(rows: Sequence[int], adapters: Sequence[int]) -> list[Batch]:
  """Each number of rows with each number of adapters that it has room for, the smallest first.

  Raises:
    UserError: a number below 1, or more adapters than any batch has rows.
  """
  if not rows or not adapters or min(*rows, *adapters) < 1:
    raise UserError('rows and adapters of a batch are at least 1, as in --rows=1,8 --adapters=1,8')
  if max(adapters) > max(rows):
    raise UserError(
      f'{max(adapters)} adapters in one batch need as many rows; add --rows={max(adapters)}'
    )
  return sorted({Batch(r, a) for r in rows for a in adapters if a <= r})

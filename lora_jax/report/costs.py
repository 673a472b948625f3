"""What a configuration's adapters weigh and took to train, from the records of its runs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.targets import label


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a configuration costs to train and to keep.

  Attributes:
    modules: names of the adapted modules.
    trainable_params: numbers in an adapter.
    adapter_bytes: its size.
    tokens_per_second: real tokens, after the first step (which compiles); None for
      runs of one step.
    seconds: wall time of a run, compilation included, averaged over runs.
    bad_steps: updates left out because they were not finite, over all runs.
  """

  modules: list[str]
  trainable_params: int
  adapter_bytes: int
  tokens_per_second: float | None
  seconds: float
  bad_steps: int


@dataclasses.dataclass(frozen=True)
class Size:
  """The adapter of a configuration whose rank was solved.

  Attributes:
    rank: of all its modules.
    budget: trainable parameters aimed at.
    miss: how far it is above them, as a share.
    most_rank: the highest rank that its modules can use.
  """

  rank: int
  budget: int
  miss: float
  most_rank: int


def cost(records: Sequence[Mapping[str, Any]]) -> Cost:
  """Of the runs of one configuration, at least one."""
  runs = [record['train'] for record in records]
  adapter = records[0]['lora']
  # All steps have batches of about one size, so the first has its share of the tokens.
  tokens = math.fsum(run['tokens'] * (1 - 1 / len(run['losses'])) for run in runs)
  seconds = math.fsum(run['seconds'] - run['compile_seconds'] - run['eval_seconds'] for run in runs)
  return Cost(
    modules=[label(path) for path in adapter['modules']],
    trainable_params=adapter['trainable_params'],
    adapter_bytes=adapter['adapter_bytes'],
    tokens_per_second=tokens / seconds if tokens and seconds > 0 else None,
    seconds=math.fsum(run['seconds'] for run in runs) / len(runs),
    bad_steps=sum(run['bad_steps'] for run in runs),
  )


def size(records: Sequence[Mapping[str, Any]]) -> Size | None:
  """How the rank of one configuration was solved; None where it was given, or nothing ran."""
  if not records or 'budget' not in records[0]['lora']:
    return None
  held = records[0]['lora']
  return Size(**{field.name: held[field.name] for field in dataclasses.fields(Size)})

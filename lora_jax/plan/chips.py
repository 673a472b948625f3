"""Chips that plans are made for, by the figures that their makers publish.

Google Cloud's TPU documentation, "TPU architecture": one page per generation.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    flops: bfloat16 operations a second at best.
    memory_bytes: high-bandwidth memory.
    memory_rate: bytes a second to and from it.
    link_rate: bytes a second to and from other chips of its slice, all links together.
  """

  flops: float
  memory_bytes: int
  memory_rate: float
  link_rate: float


_GB = 10**9
_GIB = 2**30

CHIPS = {
  'v4': Chip(275e12, 32 * _GIB, 1228 * _GB, 300 * _GB),
  'v5e': Chip(197e12, 16 * _GIB, 819 * _GB, 200 * _GB),
  'v5p': Chip(459e12, 95 * _GIB, 2765 * _GB, 600 * _GB),
  'v6e': Chip(918e12, 32 * _GIB, 1640 * _GB, 448 * _GB),
}

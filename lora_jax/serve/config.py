"""What a server keeps room for; all of it is taken when it starts, and none after."""

import dataclasses

from lora_jax.errors import UserError

# Prompts that are read together: what all must wait for, and each is one more write.
_TOGETHER = 8


@dataclasses.dataclass(frozen=True)
class ServeConfig:
  """Room on the device and on the host.

  Attributes:
    rows: requests that are answered at the same time.
    length: tokens of a prompt and its answer together; each row has a cache of so many.
    shortest: prompts are padded to this times a power of two, up to `length`, and caches
      read as far: for each such length there are a few programs.
    slots: adapters on the device.
    rank: the largest of an adapter.
    targets: comma-joined set of the modules that an adapter may adapt.
    dora: whether adapters may have magnitudes (DoRA), which costs every row a little.
    host_bytes: of adapters in host memory, ready to be copied to a slot.

  Raises:
    UserError: room for nothing.
  """

  rows: int = 16
  length: int = 1024
  shortest: int = 64
  slots: int = 16
  rank: int = 16
  targets: str = 'all'
  dora: bool = False
  host_bytes: int = 2**30

  def __post_init__(self):
    for name in ('rows', 'shortest', 'slots', 'rank'):
      if getattr(self, name) < 1:
        raise UserError(f'{name} is {getattr(self, name)}; give at least 1')
    if self.length < 2:
      raise UserError(f'length is {self.length}; give at least 2, a token to read and one to write')

  @property
  def lengths(self) -> tuple[int, ...]:
    """What prompts and reaches are padded to, the shortest first."""
    found, length = [], self.shortest
    while length < self.length:
      found.append(length)
      length *= 2
    return (*found, self.length)

  def padded(self, count: int) -> int:
    """The least of `lengths` that has room for `count` tokens, at most `length`."""
    return next(length for length in self.lengths if length >= count)

  def together(self, length: int) -> int:
    """How many prompts of a padded length are read in one program, where so many have come."""
    return min(self.rows, max(1, self.length // length), _TOGETHER)

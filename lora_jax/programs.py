"""Counts the programs that XLA compiles, those it finds in a cache on disk included.

with Programs() as programs:
  ...
print(programs)    # 14 programs compiled in 41 s
"""

from types import TracebackType

import jax

# What jax reports of each program it has compiled or read from its cache on disk.
_COMPILED = '/jax/core/compile/backend_compile_duration'


class Programs:
  """What was compiled within the block, by any thread.

  Attributes:
    count: how many programs.
    seconds: what they took.
  """

  def __init__(self):
    """Counts from the start of the `with` block."""
    self.count, self.seconds = 0, 0.0

  def __enter__(self) -> 'Programs':
    jax.monitoring.register_event_duration_secs_listener(self._hear)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    jax.monitoring.unregister_event_duration_listener(self._hear)

  def __str__(self) -> str:
    return f'{self.count} programs compiled in {self.seconds:.0f} s'

  def _hear(self, event: str, duration_secs: float, **labels: str | int) -> None:
    if event == _COMPILED:
      self.count += 1
      self.seconds += duration_secs

"""Which adapter is in which slot of the device: the latest used, and all that are in use.

slots = Slots(2)
slots.acquire('a')     # (1, True): not there before, and to be written
slots.acquire('a')     # (1, False)
slots.release('a')     # still in use once
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from lora_jax.bank_kernel import NONE

Key = TypeVar('Key', bound=Hashable)


class Slots(Generic[Key]):
  """Slots beside `NONE`, given to keys; the one that was not used for longest is taken back."""

  def __init__(self, count: int):
    """All of `count` slots are free."""
    self._free = [*range(NONE + count, NONE, -1)]
    # In the order of their last use.
    self._slots: OrderedDict[Key, int] = OrderedDict()
    self._uses: Counter[Key] = Counter()
    self._forgotten: set[Key] = set()

  @property
  def held(self) -> dict[Key, int]:
    """Key -> slot, the least recently used first."""
    return dict(self._slots)

  @property
  def in_use(self) -> int:
    """How many slots are in use, and cannot be taken back."""
    return len(self._uses)

  def acquire(self, key: Key) -> tuple[int, bool] | None:
    """Gives a key a slot, whose it stays until it is released as often.

    Returns:
      The slot, and whether it is the key's only from now on; None: all are in use by others.
    """
    new = key not in self._slots
    if new:
      slot = self._vacant()
      if slot is None:
        return None
      self._slots[key] = slot
    self._slots.move_to_end(key)
    self._uses[key] += 1
    return self._slots[key], new

  def release(self, key: Key) -> None:
    """Undoes one `acquire`; the key keeps its slot until another needs it."""
    self._uses[key] -= 1
    if not self._uses[key]:
      del self._uses[key]
      if key in self._forgotten:
        self.forget(key)

  def forget(self, key: Key) -> None:
    """Frees a key's slot, if it has one, as soon as it is not in use."""
    if key in self._uses:
      self._forgotten.add(key)
      return
    self._forgotten.discard(key)
    if key in self._slots:
      self._free.append(self._slots.pop(key))

  def _vacant(self) -> int | None:
    if not self._free:
      idle = next((key for key in self._slots if key not in self._uses), None)
      if idle is None:
        return None
      self._free.append(self._slots.pop(idle))
    return self._free.pop()

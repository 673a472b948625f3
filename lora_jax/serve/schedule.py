"""Who waits, who sits in which row, and who is seated next; it knows nothing of models.

Requests are seated in the order in which they came. One that waits for a slot holds up
those behind it: the slots in use come free one by one, and whoever overtook could keep
them in use for ever. In one go no more is seated than may be read while others wait for
their next token.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar


class Costly(Protocol):
  """What has a cost to be seated."""

  @property
  def cost(self) -> int: ...


Item = TypeVar('Item', bound=Costly)


class Schedule(Generic[Item]):
  """Rows and a queue."""

  def __init__(self, rows: int, most: int):
    """All rows are free.

    Args:
      rows: how many there are.
      most: what those that are seated in one go may cost together; no one costs more.
    """
    self._most = most
    self._free = [*range(rows)][::-1]
    self._rows: dict[Item, int] = {}
    # In the order in which they came.
    self._waiting: deque[Item] = deque()

  @property
  def waiting(self) -> int:
    """How many wait."""
    return len(self._waiting)

  @property
  def seated(self) -> dict[Item, int]:
    """Who sits, and in which row."""
    return dict(self._rows)

  @property
  def all(self) -> tuple[Item, ...]:
    """Who sits, and who waits."""
    return (*self._rows, *self._waiting)

  @property
  def free(self) -> int:
    """How many rows are free."""
    return len(self._free)

  def add(self, item: Item) -> None:
    """Puts one at the end of the queue."""
    self._waiting.append(item)

  def seat(self, acquire: Callable[[Item], int | None]) -> Iterator[tuple[Item, int, int]]:
    """Seats those whose turn it is.

    Args:
      acquire: gives an item its slot, or None, with which it has to wait; it may also let
        the item leave, who is then not seated.

    Yields:
      Who was seated, the row, and the slot.
    """
    left = self._most
    while self._waiting and self._free and self._waiting[0].cost <= left:
      item = self._waiting[0]
      slot = acquire(item)
      if slot is None:
        if self._waiting and self._waiting[0] is item:
          return
        continue
      self._waiting.popleft()
      self._rows[item] = self._free.pop()
      left -= item.cost
      yield item, self._rows[item], slot

  def leave(self, item: Item) -> bool:
    """Frees an item's row, or takes it out of the queue; whether it had a row."""
    row = self._rows.pop(item, None)
    if row is None:
      self._waiting.remove(item)
      return False
    self._free.append(row)
    return True

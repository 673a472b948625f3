"""Which rows share a row of the batch, planned from their lengths before anything is read.

All lengths are known, so an epoch is packed as a whole: its rows are shuffled, put into
groups that nearly fill a row of the batch, and the groups shuffled again. Each epoch's
plan depends on lengths, room and seed alone.

  groups = plan([len(row) for row in rows], room=384, seed=0)     one epoch
  epochs = Epochs([len(row) for row in rows], room=384, seed=0)   all of them
  epochs[5]                                                       the sixth group: indices of rows
"""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

# Rows among which `_fullest` looks for a group, and `_best_fit` for partners.
_WAITING = 64
_WINDOW = 512

# Indices of the rows that share a row of the batch.
Group = list[int]


def pack(sizes: Sequence[int], room: int) -> list[Group]:
  """Groups of rows whose sizes add up to at most `room`; every row is in one.

  Two heuristics take turns in being best: many short rows to a group want a search for
  the sum that fills it, rows of about half of the room want partners from the longest
  down. Both run, and the one with fewer groups is taken.

  Args:
    sizes: of each row, at least 1; it decides the result together with its order.
    room: of a group, at least the largest size.

  Raises:
    ValueError: a row has no size, or does not fit.
  """
  if sizes and not 1 <= min(sizes) <= max(sizes) <= room:
    raise ValueError(f'rows of {min(sizes)} to {max(sizes)} do not go into groups of {room}')
  return min(_fullest(sizes, room), _best_fit(sizes, room), key=len)


def plan(sizes: Sequence[int], room: int, seed: int, epoch: int = 0) -> list[Group]:
  """The groups of one epoch, in random order; each row is in exactly one of them."""
  random = np.random.default_rng((seed, epoch))
  order = random.permutation(len(sizes)).tolist()
  groups = pack([sizes[row] for row in order], room)
  return [[order[place] for place in groups[i]] for i in random.permutation(len(groups))]


class Epochs:
  """The groups of endless epochs, one after another, by their number.

  A group's number says which it is, whatever was read before; to find one far ahead,
  the epochs before it are planned once. Not for several threads at a time.
  """

  def __init__(self, sizes: Sequence[int], room: int, seed: int):
    if not sizes:
      raise ValueError('there are no rows to pack')
    self._sizes, self._room, self._seed = sizes, room, seed
    # The number of each epoch's first group, as far as is known.
    self._starts = [0]
    self._planned: tuple[int, list[Group]] = (-1, [])

  def __getitem__(self, number: int) -> Group:
    while self._starts[-1] <= number:
      self._starts.append(self._starts[-1] + len(self._plan(len(self._starts) - 1)))
    epoch = bisect.bisect_right(self._starts, number) - 1
    return self._plan(epoch)[number - self._starts[epoch]]

  def _plan(self, epoch: int) -> list[Group]:
    if self._planned[0] != epoch:
      self._planned = epoch, plan(self._sizes, self._room, self._seed, epoch)
    return self._planned[1]


def _fullest(sizes: Sequence[int], room: int) -> list[Group]:
  """Groups of the row that waits longest and those of the next rows that best fill its group.

  Sums that rows reach are the bits of one number, so that trying a row is a shift.
  """
  groups = []
  coming = iter(range(len(sizes)))
  # Longest first: they are harder to place later than short ones.
  waiting: list[tuple[int, int]] = []
  while True:
    for place in itertools.islice(coming, _WAITING - len(waiting)):
      bisect.insort(waiting, (-sizes[place], place))
    if not waiting:
      return groups
    first = min(waiting, key=lambda row: row[1])
    waiting.remove(first)
    left = room + first[0]
    in_reach, reached = (1 << (left + 1)) - 1, [1]
    for size, _ in waiting:
      reached.append((reached[-1] | (reached[-1] << -size)) & in_reach)
      if reached[-1] >> left:
        break
    group, total = [first[1]], reached[-1].bit_length() - 1
    for i in reversed(range(len(reached) - 1)):
      # The rows before this one do not reach the sum, so it is among those that do.
      if not (reached[i] >> total) & 1:
        size, place = waiting.pop(i)
        group.append(place)
        total += size
    groups.append(group)


def _best_fit(sizes: Sequence[int], room: int) -> list[Group]:
  """Best fit, from the longest row down, in windows: over all rows, partners would never change."""
  groups: list[Group] = []
  count = len(sizes)
  windows = max(1, round(count / _WINDOW))
  for window in range(windows):
    rows = range(count * window // windows, count * (window + 1) // windows)
    # (room left, number of the group), least room first.
    open_groups: list[tuple[int, int]] = []
    for row in sorted(rows, key=lambda row: -sizes[row]):
      tightest = bisect.bisect_left(open_groups, (sizes[row],))
      if tightest < len(open_groups):
        left, group = open_groups.pop(tightest)
      else:
        left, group = room, len(groups)
        groups.append([])
      groups[group].append(row)
      bisect.insort(open_groups, (left - sizes[row], group))
  return groups

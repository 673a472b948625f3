"""How much of a batch runs through the model at a time."""

import jax

# A CPU is fastest with so many positions at a time (BUILD_NOTES.md, Speed).
CPU_POSITIONS = 1024


def part_rows(rows: int, length: int, cells: int, positions: int = 0) -> int:
  """How many rows of a batch run through the model at a time.

  Args:
    rows: of a batch.
    length: of a row.
    cells: C, which all run at the same time.
    positions: at most so many at a time, where a row allows it; 0: all, but on a CPU as
      many as its caches hold (BUILD_NOTES.md, Speed).

  Returns:
    A divisor of `rows`, so that no part is filled up with padding.
  """
  if not positions:
    if jax.default_backend() != 'cpu':
      return rows
    positions = CPU_POSITIONS
  fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * length * cells <= positions]
  return max(fitting, default=1)

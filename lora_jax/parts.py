"""How much of a batch runs through the model at a time."""

from lora_jax import platforms
from lora_jax.sharding import row_shards

# A CPU is fastest with so many positions at a time (BUILD_NOTES.md, Speed).
CPU_POSITIONS = 1024


def part_rows(rows: int, length: int, cells: int, positions: int = 0) -> int:
  """How many rows of a batch run through the model at a time.

  Args:
    rows: of a batch.
    length: of a row.
    cells: C, which all run at the same time.
    positions: at most so many at a time, where a row allows it; 0: all, but on a CPU as
      many as its caches hold (BUILD_NOTES.md, Speed). Over a mesh, so many for each of those
      that share the rows.

  Returns:
    A divisor of `rows`, so that no part is filled up with padding; a multiple of
    `row_shards`, where `rows` is one.
  """
  if not positions:
    if platforms.target() != 'cpu':
      return rows
    positions = CPU_POSITIONS
  shards = row_shards() if rows % row_shards() == 0 else 1
  own = rows // shards
  fitting = [n for n in range(1, own + 1) if own % n == 0 and n * length * cells <= positions]
  return shards * max(fitting, default=1)

"""What a JAX process measures of itself: matrix peak and memory.

memory()
matrix_peak('float32')  # last, or its matrices are in the memory too
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.memory import peak_bytes

# Products of one measurement: enough to hide its start.
_CHAIN = 4


def matrix_peak(dtype: str, size: int | None = None, seconds: float = 2.0) -> float:
  """The machine's matrix peak: FLOPs a second of square products, the best of several.

  Args:
    dtype: of the factors; sums are the compiler's to choose, as in a model.
    size: of the matrices; None: 1,024 on a CPU, 8,192 elsewhere.
    seconds: how long to try, once at least.
  """
  if size is None:
    size = 1024 if jax.default_backend() == 'cpu' else 8192
  # Rows of length 1 keep products of products in range.
  w = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
  x = w = w.astype(dtype)

  @functools.partial(jax.jit, static_argnames='count')
  def chain(x, w, count):
    return jax.lax.fori_loop(0, count, lambda _, x: jnp.matmul(x, w), x)

  count = _CHAIN if jax.default_backend() == 'cpu' else 8 * _CHAIN
  jax.block_until_ready(chain(x, w, count))
  best, end = 0.0, time.perf_counter() + seconds
  while best == 0.0 or time.perf_counter() < end:
    start = time.perf_counter()
    jax.block_until_ready(chain(x, w, count))
    best = max(best, 2 * size**3 * count / (time.perf_counter() - start))
  return best


def memory() -> dict[str, Any]:
  """{'peak_bytes', 'where'}: of the accelerator where there is one, else of the process."""
  held = jax.local_devices()[0].memory_stats()
  if held and 'peak_bytes_in_use' in held:
    return {'peak_bytes': held['peak_bytes_in_use'], 'where': 'device'}
  return {'peak_bytes': peak_bytes(), 'where': 'host'}

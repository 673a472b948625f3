"""Operations of a traced program, loops counted as often as they run.

XLA's own cost analysis counts the body of a loop once, and the blocks of a model are one.
"""

import math
from typing import Any

from jax.extend import core

# Eqn parameters that hold a sub-program that is run once.
_BODIES = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')


def matmul_flops(jaxpr: Any) -> int:
  """Of all matrix products, over all devices; a product of (m, k) and (k, n) is 2 m k n.

  Of branches the dearest counts. A kernel counts as often as its grid has places, skipped or
  not, and what runs under `shard_map` on every device, as often as there are devices.

  Args:
    jaxpr: a (closed) jaxpr, as `jax.jit(f).trace(...).jaxpr` is.

  Raises:
    ValueError: it has a loop of which nobody knows how often it runs.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
  if name == 'scan':
    return params['length'] * matmul_flops(params['jaxpr'])
  if name == 'while':
    inside = matmul_flops(params['body_jaxpr'])
    if inside:
      raise ValueError('a loop with products in it runs as often as its data say')
    return 0
  if name == 'cond':
    return max(matmul_flops(branch) for branch in params['branches'])
  times = 1
  if name == 'pallas_call':
    times = math.prod(params['grid_mapping'].grid)
  elif name == 'shard_map':
    times = math.prod(params['mesh'].shape.values())
  for body in _BODIES:
    if isinstance(params.get(body), core.Jaxpr | core.ClosedJaxpr):
      return times * matmul_flops(params[body])
  return 0

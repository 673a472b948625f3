"""Which mesh to plan with, and what to try where a step does not fit."""

from collections.abc import Mapping

from lora_jax.plan.program import Planned, Work

# Of a device's memory, what a whole base may take before it is better spread.
_ROOMY = 0.3


def first_mesh(base_bytes: int, memory_bytes: int | None) -> str:
  """A mesh to begin with: rows spread, and the base too where it is large for a device.

  Args:
    base_bytes: of the whole base.
    memory_bytes: of a device; None: unknown.
  """
  whole = memory_bytes is not None and base_bytes <= _ROOMY * memory_bytes
  return 'data=-1' if whole else 'fsdp=-1'


def remedy(planned: Planned, work: Work, sizes: Mapping[str, int], memory_bytes: int) -> str:
  """What to try next where a step takes more than a device has; '' where it fits.

  Args:
    planned: the step.
    work: its size.
    sizes: of the mesh's axes.
    memory_bytes: of a device.
  """
  if planned.memory <= memory_bytes:
    return ''
  data, fsdp, tensor = (sizes[axis] for axis in ('data', 'fsdp', 'tensor'))
  if planned.arguments > memory_bytes / 2 and data > 1:
    return f'--mesh=fsdp={data * fsdp},tensor={tensor}: what is held is spread over more devices'
  if not work.remat:
    return '--remat'
  if work.rows // work.parts > data * fsdp:
    return f'--parts={2 * work.parts}: fewer rows at a time'
  if fsdp > 1:
    return f'--mesh=data={data},fsdp={fsdp // 2},tensor={2 * tensor}: half the rows at a time'
  if work.quantize == 'none' and planned.arguments > memory_bytes / 2:
    return '--quantize=int4'
  return 'more devices, or a shorter --length'

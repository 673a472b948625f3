"""What programs are compiled for: this process's devices, unless a plan is for others.

Some choices are made while tracing, by what will run the program; they ask `target`.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_elsewhere: contextvars.ContextVar[str | None] = contextvars.ContextVar('elsewhere', default=None)


def target() -> str:
  """'cpu', 'cuda', 'rocm' or 'tpu'; JAX calls every GPU 'gpu'."""
  elsewhere = _elsewhere.get()
  if elsewhere is not None:
    return elsewhere
  backend = jax.default_backend()
  return ('cuda' if capability() else 'rocm') if backend == 'gpu' else backend


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """What is traced meanwhile is for a platform that need not be here."""
  token = _elsewhere.set(platform)
  try:
    yield
  finally:
    _elsewhere.reset(token)


def capability() -> float:
  """The compute capability of this process's NVIDIA GPUs, which alone tell it; 0 without any."""
  capability = str(getattr(jax.local_devices()[0], 'compute_capability', ''))
  return float(capability) if capability.replace('.', '').isdigit() else 0.0

"""What a result was made with."""

import importlib.metadata
import platform

_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets', 'numpy')


def versions() -> dict[str, str]:
  """Versions of what a result depends on."""
  import jax  # readers of records do without

  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {'python': platform.python_version(), 'device': jax.devices()[0].device_kind, **found}

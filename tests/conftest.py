"""Settings that every test runs under; they must be made before JAX starts."""

import jax
import pytest

# A broadcast over a missing axis is a mistake more often than an intention.
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Comparisons with float32 references want float32 products on every device.
jax.config.update('jax_default_matmul_precision', 'highest')
# Sharding is tested on any machine.
jax.config.update('jax_num_cpu_devices', 8)
# Programs here run once on little data: nearly all of a test's time is compilation.
jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture
def optimised():
  """Compiles as users do, where the compiler's optimiser is what might break the property."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Turns the optimiser on or off, before any fixture.

  After them, what those of a module have compiled for its tests would be gone again.
  """
  quick = 'optimised' not in item.fixturenames
  if jax.config.read('jax_disable_most_optimizations') != quick:
    jax.config.update('jax_disable_most_optimizations', quick)
    # Neighbours that want the same keep what was compiled.
    jax.clear_caches()

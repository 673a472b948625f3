"""Examples in docstrings say what happens."""

import doctest

import pytest

from lora_jax import kernels
from lora_jax.hub import hf_names


@pytest.mark.parametrize('module', [kernels, hf_names])
def test_examples_hold(module):
  found = doctest.testmod(module)
  assert found.attempted
  assert not found.failed

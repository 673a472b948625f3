"""benchmarks/flops.py: the counts are those of the products in traced programs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from benchmarks import flops, measure
from lora_jax.hub import tiny
from lora_jax.kernels import LoraKernel, dot
from lora_jax.transformer import Transformer, abstract_params
from tests import tiny_model


def product_flops(jaxpr) -> int:
  """FLOPs of all products of a traced program, a scan's body as often as it runs."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left = equation.invars[0].aval.shape
      out = equation.outvars[0].aval.shape
      total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    times = equation.params.get('length', 1) if equation.primitive.name == 'scan' else 1
    for inner in core.jaxprs_in_params(equation.params):
      total += times * product_flops(inner)
  return total


@pytest.mark.parametrize('config', [tiny_model.CONFIG, tiny.CONFIG])
def test_forward_counts_the_products_of_the_blocks(config):
  batch, length = 2, 16
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  hidden = lambda params, tokens: Transformer(config).apply({'params': params}, tokens)[0]
  traced = product_flops(jax.make_jaxpr(hidden)(abstract_params(config), tokens).jaxpr)
  # A short sequence is one block of queries, which all keys are multiplied with.
  positions = np.full((batch, length), length - 1)
  assert flops.forward(config, positions) == traced


def test_a_step_takes_the_frozen_kernels_twice_and_the_adapters_three_times():
  tokens, wide, narrow, rank = 7, 12, 5, 3
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)

  def loss(x, a, b, w):
    return dot(x, LoraKernel(w, a, b, jnp.float32(2.0))).sum()

  gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
  arguments = shape(tokens, wide), shape(wide, rank), shape(rank, narrow), shape(wide, narrow)
  traced = product_flops(jax.make_jaxpr(gradient)(*arguments).jaxpr)
  assert traced == tokens * (4 * wide * narrow + 6 * rank * (wide + narrow))


def test_a_step_is_the_sum_of_its_parts():
  config = tiny.CONFIG
  positions = np.arange(10)
  plain = flops.training_step(config, [], 4, positions, 0)
  with_losses = flops.training_step(config, [], 4, positions, 3)
  adapted = flops.training_step(config, ['layers/attn/o_proj'], 4, positions, 0)
  assert with_losses - plain == 3 * 4 * config.model_dim * config.vocab_size
  heads = config.num_heads * config.head_dim
  assert adapted - plain == 10 * config.num_layers * 6 * 4 * (heads + config.model_dim)


def test_windows_bound_what_a_token_sees():
  config = dataclasses.replace(tiny.CONFIG, windows=(0, 3))
  assert flops.visible_keys(config, np.arange(5)) == (1 + 2 + 3 + 4 + 5) + (1 + 2 + 3 + 3 + 3)


def test_totals_go_round_the_batches():
  assert flops.total([1, 10, 100], steps=4, skipped=2) == 100 + 1 + 10 + 100


def test_a_process_finds_a_peak():
  assert measure.matrix_peak('float32', size=64, seconds=0.0) > 0

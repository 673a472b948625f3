"""A Transformer small enough to test with, of sizes that all differ, and adapters for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import lora
from lora_jax.config import ModelConfig
from lora_jax.transformer import Transformer, init_params

CONFIG = ModelConfig(
  vocab_size=56,
  num_layers=3,
  model_dim=24,
  num_heads=6,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=40,
  max_length=64,
  rope_theta=500.0,
)
RANK, SCALE = 4, 2.0


@functools.cache
def params(config=CONFIG):
  """Random parameters whose norms are not all one."""
  shift = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
  # What is kept must not belong to the program that happens to be traced at the first call.
  with jax.ensure_compile_time_eval():
    return jax.jit(lambda key: jax.tree.map(shift, init_params(config, key)))(jax.random.key(0))


def trained_adapters(targets, seed=0, of=None):
  """Adapters that change something: both A and B are random."""
  base = params() if of is None else of
  fresh = lora.init(jax.random.key(seed), base, lora.resolve(targets, base), RANK)
  rng = np.random.default_rng(seed)
  noise = lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32)
  return jax.tree.map(noise, fresh)


def tokens(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape), jnp.int32)


@functools.partial(jax.jit, static_argnames='model')
def logits(model, params, tokens_BT, positions_BT=None, segments_BT=None):
  hidden_BTD, _ = model.apply({'params': params}, tokens_BT, positions_BT, segments_BT)
  return model.apply({'params': params}, hidden_BTD, method='head')


def assert_trees_close(ours, theirs, **tolerance):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(one, other, **tolerance)


MODEL = Transformer(CONFIG)

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import CONFIG, MODEL

from lora_jax.head import head_kernel, logits
from lora_jax.kernels import dense
from lora_jax.rotary import frequencies, rotate
from lora_jax.self_attention import SelfAttention
from lora_jax.transformer import (
  NOWHERE,
  Block,
  KeyValues,
  Layer,
  RMSNorm,
  Transformer,
  abstract_params,
)

# Two sequences of 5 and 4 tokens in a row, and one of 9.
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 4, [1] * 9])
POSITIONS = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3], [*range(9)]])


@functools.partial(jax.jit, static_argnames='model')
def run(model, tokens_BT, positions_BT=None, segments_BT=None, past=()):
  """hidden_BTD and the keys and values of the tokens."""
  variables = {'params': tiny_model.params()}
  return model.apply(variables, tokens_BT, positions_BT, segments_BT, past)


def influence(positions_BT, segments_BT):
  """(T, T): how strongly output t depends on input s, by the gradient."""
  # Every position has a token of its own, so its embedding stands for its input.
  time = SEGMENTS.shape[1]
  tokens_BT = jnp.arange(time)[None]

  @jax.jit
  @jax.jacrev
  def outputs(embedding_VD):
    params = {**tiny_model.params(), 'embed_tokens': {'embedding': embedding_VD}}
    hidden_BTD, _ = MODEL.apply({'params': params}, tokens_BT, positions_BT, segments_BT)
    return jnp.sin(3 * hidden_BTD[0]).sum(-1)

  gradient_TVD = outputs(tiny_model.params()['embed_tokens']['embedding'])
  return np.abs(gradient_TVD[:, :time]).max(-1)


def test_no_output_depends_on_a_later_input():
  strength = influence(None, None)
  lower = np.tri(len(strength), dtype=bool)
  assert (strength[~lower] == 0).all()
  assert (strength[lower] > 1e-4).all()


def test_no_output_depends_on_another_sequence_in_its_row():
  strength = influence(POSITIONS[:1], SEGMENTS[:1])
  same = np.asarray(SEGMENTS[0][:, None] == SEGMENTS[0][None])
  visible = np.tri(len(strength), dtype=bool) & same
  assert (strength[~visible] == 0).all()
  assert (strength[visible] > 1e-4).all()


def test_packed_sequences_equal_each_alone():
  tokens_BT = tiny_model.tokens(2, 9)
  packed, _ = run(MODEL, tokens_BT, POSITIONS, SEGMENTS)
  alone = lambda row, start, end: run(MODEL, tokens_BT[row : row + 1, start:end])[0][0]
  np.testing.assert_allclose(packed[0, :5], alone(0, 0, 5), atol=1e-5)
  np.testing.assert_allclose(packed[0, 5:], alone(0, 5, 9), atol=1e-5)
  np.testing.assert_allclose(packed[1], alone(1, 0, 9), atol=1e-5)


def test_remat_changes_neither_value_nor_gradient():
  tokens_BT = tiny_model.tokens(2, 9)

  @functools.partial(jax.jit, static_argnums=0)
  @functools.partial(jax.value_and_grad, argnums=1)
  def work(model, params):
    hidden_BTD, _ = model.apply({'params': params}, tokens_BT, POSITIONS, SEGMENTS)
    return jnp.mean(jnp.sin(3 * hidden_BTD))

  plain = work(MODEL, tiny_model.params())
  changed = work(Transformer(CONFIG, remat=True), tiny_model.params())
  tiny_model.assert_trees_close(changed, plain, atol=1e-6, rtol=1e-4)


def test_the_scan_equals_a_loop_over_blocks():
  params, tokens_BT = tiny_model.params(), tiny_model.tokens(2, 9)
  block = jax.jit(
    lambda layer, x_BTD: Block(CONFIG, SelfAttention()).apply(
      {'params': layer}, x_BTD, (), Layer(), POSITIONS, None, ()
    )
  )
  x_BTD = params['embed_tokens']['embedding'][tokens_BT]
  keys = []
  for i in range(CONFIG.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params['layers'])
    x_BTD, (k_BKTH, _) = block(layer, x_BTD)
    keys.append(k_BKTH)
  expected = RMSNorm(CONFIG.norm_eps).apply({'params': params['norm']}, x_BTD)
  hidden_BTD, kv = run(MODEL, tokens_BT, POSITIONS)
  np.testing.assert_allclose(hidden_BTD, expected, atol=1e-5)
  np.testing.assert_allclose(kv.k_LBKSH, jnp.stack(keys), atol=1e-5)


def test_rows_do_not_depend_on_each_other_or_their_order():
  tokens_BT = tiny_model.tokens(4, 9)
  order = jnp.asarray([2, 0, 3, 1])
  whole, _ = run(MODEL, tokens_BT)
  np.testing.assert_allclose(run(MODEL, tokens_BT[order])[0], whole[order], atol=1e-6)
  np.testing.assert_allclose(run(MODEL, tokens_BT[1:2])[0], whole[1:2], atol=1e-5)


def test_padding_on_the_right_changes_nothing():
  tokens_BT = tiny_model.tokens(2, 9)
  padded = jnp.pad(tokens_BT, ((0, 0), (0, 130)))
  expected, _ = run(MODEL, tokens_BT)
  np.testing.assert_allclose(run(MODEL, padded)[0][:, :9], expected, atol=1e-5)


def test_only_distances_matter():
  tokens_BT = tiny_model.tokens(2, 9)
  expected, _ = run(MODEL, tokens_BT, POSITIONS)
  np.testing.assert_allclose(run(MODEL, tokens_BT, POSITIONS + 17)[0], expected, atol=1e-4)
  assert not np.allclose(run(MODEL, tokens_BT, 2 * POSITIONS)[0], expected, atol=1e-2)


def test_rotation_keeps_lengths_and_leaves_position_0_alone():
  x_BTNH = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 3, 8)), jnp.float32)
  turned = rotate(x_BTNH, POSITIONS, *frequencies(CONFIG, 500.0))
  np.testing.assert_allclose(
    jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x_BTNH, axis=-1), rtol=1e-5
  )
  np.testing.assert_array_equal(turned[:, 0], x_BTNH[:, 0])
  assert not np.allclose(turned[:, 1], x_BTNH[:, 1])


def test_decoding_with_a_cache_equals_the_full_forward():
  tokens_BT, prompt = tiny_model.tokens(2, 9), 5
  expected, all_kv = run(MODEL, tokens_BT)
  hidden_BTD, prompt_kv = run(MODEL, tokens_BT[:, :prompt])
  np.testing.assert_allclose(hidden_BTD, expected[:, :prompt], atol=1e-5)
  # Prompt and new tokens lie in stretches of their own, as generation has them.
  own_kv = KeyValues.empty(CONFIG, 2, 6, jnp.float32)
  in_prompt = jnp.broadcast_to(jnp.arange(prompt), (2, prompt))
  for step in range(9 - prompt):
    slots = jnp.arange(6)
    written = jnp.broadcast_to(jnp.where(slots < step, prompt + slots, NOWHERE), (2, 6))
    positions = jnp.full((2, 1), prompt + step)
    token = tokens_BT[:, prompt + step, None]
    hidden_B1D, new = run(MODEL, token, positions, past=((prompt_kv, in_prompt), (own_kv, written)))
    np.testing.assert_allclose(hidden_B1D[:, 0], expected[:, prompt + step], atol=1e-5)
    own_kv = own_kv.write(new, step)
  both = jnp.concatenate([prompt_kv.k_LBKSH, own_kv.k_LBKSH[:, :, :, : 9 - prompt]], axis=3)
  np.testing.assert_allclose(both, all_kv.k_LBKSH, atol=1e-5)


def test_a_chunk_after_a_cache_equals_the_full_forward():
  tokens_BT = tiny_model.tokens(2, 9)
  expected, _ = run(MODEL, tokens_BT)
  _, past = run(MODEL, tokens_BT[:, :4])
  chunk, _ = run(
    MODEL,
    tokens_BT[:, 4:],
    POSITIONS[1:, 4:].repeat(2, 0),
    past=((past, POSITIONS[1:, :4].repeat(2, 0)),),
  )
  np.testing.assert_allclose(chunk, expected[:, 4:], atol=1e-5)


def test_bfloat16_compute_is_near_float32_and_logits_are_float32():
  tokens_BT = tiny_model.tokens(2, 9)
  half = Transformer(CONFIG, dtype=jnp.bfloat16)
  hidden_BTD, kv = run(half, tokens_BT)
  assert (hidden_BTD.dtype, kv.k_LBKSH.dtype) == (jnp.bfloat16, jnp.bfloat16)
  ours = tiny_model.logits(half, tiny_model.params(), tokens_BT)
  theirs = tiny_model.logits(MODEL, tiny_model.params(), tokens_BT)
  assert ours.dtype == jnp.float32
  assert jnp.abs(ours - theirs).max() < 0.1 * jnp.abs(theirs).max()


@pytest.mark.parametrize('tied', [True, False])
def test_logits_of_a_bfloat16_model_are_not_rounded_to_it(tied):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_model.params(config))
  model = Transformer(config, dtype=jnp.bfloat16)
  hidden = jax.random.normal(jax.random.key(0), (5, config.model_dim)).astype(jnp.bfloat16)
  for ours in (
    model.apply({'params': params}, hidden, method='head'),
    logits(model, hidden, head_kernel(model, params)),
  ):
    exact = hidden.astype(jnp.float32) @ dense(head_kernel(model, params), jnp.float32)
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('tied', [True, False])
def test_abstract_parameters_are_those_of_init(tied):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), tiny_model.params(config))
  assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))
  assert ('lm_head' in shapes) is not tied


@pytest.mark.parametrize('rows', [None, 5, 50])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('tied', [True, False])
def test_the_head_laid_out_once_equals_the_head(tied, dtype, rows):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  model, params = Transformer(config, dtype=jnp.dtype(dtype)), tiny_model.params(config)
  hidden_BD = jnp.asarray(np.random.default_rng(0).standard_normal((5, CONFIG.model_dim)), dtype)
  expected = model.apply({'params': params}, hidden_BD, method='head')
  ours = logits(model, hidden_BD, head_kernel(model, params, rows))
  assert ours.dtype == expected.dtype == jnp.float32
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)

"""All that sets a family apart, in one model: what holds for a plain one holds for it too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from lora_jax import lora
from lora_jax.choices import next_log_probs, pack_prompts
from lora_jax.config import RopeScaling
from lora_jax.generate import generate
from lora_jax.head import head_kernel, logits
from lora_jax.step import batch_loss
from lora_jax.transformer import NOWHERE, KeyValues, Transformer, init_params

CONFIG = dataclasses.replace(
  tiny_model.CONFIG,
  rope_scaling=RopeScaling('yarn', 4.0, 16, 1.0, 32.0, 1.3),
  rope_thetas=(500.0, 0.0, 90.0),
  windows=(3, 0, 5),
  qkv_bias=True,
  output_bias=True,
  mlp_bias=True,
  qk_norm=True,
  post_norms=True,
  norm_offset=1.0,
  activation='gelu_tanh',
  embed_scale=3.0,
  query_scale=0.7,
  attention_cap=1.0,
  logit_cap=2.0,
)
MODEL = Transformer(CONFIG)
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 4, [1] * 9])
POSITIONS = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3], [*range(9)]])


def run(tokens_BT, positions_BT=None, segments_BT=None, past=(), model=MODEL):
  params = tiny_model.params(CONFIG)
  return _run(model, params, tokens_BT, positions_BT, segments_BT, past)


@functools.partial(jax.jit, static_argnames='model')
def _run(model, params, *inputs):
  return model.apply({'params': params}, *inputs)


@pytest.mark.parametrize(
  'changes',
  [
    {'windows': ()},
    {'windows': (3, 0, 0)},
    {'rope_thetas': ()},
    {'rope_thetas': (500.0, 0.0, 91.0)},
    {'rope_scaling': None},
    {'rope_scaling': RopeScaling('yarn', 4.0, 16, 1.0, 32.0, 1.0)},
    {'norm_offset': 0.0},
    {'activation': 'silu'},
    {'embed_scale': 1.0},
    {'query_scale': None},
    {'attention_cap': 0.0},
  ],
)
def test_every_field_changes_the_hidden_states(changes):
  tokens_BT = tiny_model.tokens(2, 9)
  other = Transformer(dataclasses.replace(CONFIG, **changes))
  difference = jnp.abs(run(tokens_BT, model=other)[0] - run(tokens_BT)[0]).max()
  assert difference > 1e-3


def test_packed_sequences_equal_each_alone():
  tokens_BT = tiny_model.tokens(2, 9)
  packed, _ = run(tokens_BT, POSITIONS, SEGMENTS)
  alone = lambda row, start, end: run(tokens_BT[row : row + 1, start:end])[0][0]
  np.testing.assert_allclose(packed[0, :5], alone(0, 0, 5), atol=1e-5)
  np.testing.assert_allclose(packed[0, 5:], alone(0, 5, 9), atol=1e-5)
  np.testing.assert_allclose(packed[1], alone(1, 0, 9), atol=1e-5)


def test_tokens_beyond_every_window_have_no_influence():
  windows = (3, 2, 4)
  model = Transformer(dataclasses.replace(CONFIG, windows=windows))
  reach = sum(window - 1 for window in windows)
  tokens_BT = tiny_model.tokens(1, 12)
  changed_BT = tokens_BT.at[0, 1].add(1)
  before, after = (np.asarray(run(ids, model=model)[0][0]) for ids in (tokens_BT, changed_BT))
  difference_T = np.abs(after - before).max(-1)
  assert (difference_T[[0, *range(2 + reach, 12)]] == 0).all()
  assert (difference_T[1 : 2 + reach] > 0).all()


def test_decoding_with_a_cache_equals_the_full_forward():
  tokens_BT, prompt = tiny_model.tokens(2, 9), 5
  expected, _ = run(tokens_BT)
  _, prompt_kv = run(tokens_BT[:, :prompt])
  own_kv = KeyValues.empty(CONFIG, 2, 6, jnp.float32)
  in_prompt = jnp.broadcast_to(jnp.arange(prompt), (2, prompt))
  for step in range(9 - prompt):
    slots = jnp.arange(6)
    written = jnp.broadcast_to(jnp.where(slots < step, prompt + slots, NOWHERE), (2, 6))
    past = ((prompt_kv, in_prompt), (own_kv, written))
    token = tokens_BT[:, prompt + step, None]
    hidden_B1D, new = run(token, jnp.full((2, 1), prompt + step), past=past)
    np.testing.assert_allclose(hidden_B1D[:, 0], expected[:, prompt + step], atol=1e-5)
    own_kv = own_kv.write(new, step)


def test_a_chunk_after_a_cache_equals_the_full_forward():
  tokens_BT = tiny_model.tokens(2, 9)
  expected, _ = run(tokens_BT)
  _, past = run(tokens_BT[:, :4])
  positions = POSITIONS[1:].repeat(2, 0)
  chunk, _ = run(tokens_BT[:, 4:], positions[:, 4:], past=((past, positions[:, :4]),))
  np.testing.assert_allclose(chunk, expected[:, 4:], atol=1e-5)


def test_remat_changes_neither_value_nor_gradient():
  tokens_BT = tiny_model.tokens(2, 9)

  @functools.partial(jax.jit, static_argnums=0)
  @functools.partial(jax.value_and_grad, argnums=1)
  def work(model, params):
    hidden_BTD, _ = model.apply({'params': params}, tokens_BT, POSITIONS, SEGMENTS)
    return jnp.mean(jnp.sin(3 * hidden_BTD))

  plain = work(MODEL, tiny_model.params(CONFIG))
  changed = work(Transformer(CONFIG, remat=True), tiny_model.params(CONFIG))
  tiny_model.assert_trees_close(changed, plain, atol=1e-6, rtol=1e-4)


def test_attached_adapters_equal_merged_ones_beside_biases():
  params, tokens_BT = tiny_model.params(CONFIG), tiny_model.tokens(2, 9)
  adapters = tiny_model.trained_adapters('all', of=params)
  attached = lora.attach(params, adapters, tiny_model.SCALE)
  merged = lora.merge(params, adapters, tiny_model.SCALE)
  ours = tiny_model.logits(MODEL, attached, tokens_BT)
  np.testing.assert_allclose(ours, tiny_model.logits(MODEL, merged, tokens_BT), atol=1e-4)
  assert np.abs(ours - tiny_model.logits(MODEL, params, tokens_BT)).max() > 0.05


@pytest.mark.parametrize('tied', [True, False])
def test_logits_are_capped_wherever_they_are_made(tied):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied, logit_cap=0.3)
  model, params = Transformer(config), tiny_model.params(config)
  tokens_BT = tiny_model.tokens(2, 9)
  hidden_BTD, _ = model.apply({'params': params}, tokens_BT)
  uncapped = Transformer(dataclasses.replace(config, logit_cap=0.0))
  free_BTV = tiny_model.logits(uncapped, params, tokens_BT)
  expected_BTV = 0.3 * np.tanh(np.asarray(free_BTV) / 0.3)
  assert np.abs(expected_BTV - free_BTV).max() > 0.1
  np.testing.assert_allclose(tiny_model.logits(model, params, tokens_BT), expected_BTV, atol=1e-5)
  head = head_kernel(model, params)
  np.testing.assert_allclose(logits(model, hidden_BTD, head), expected_BTV, atol=1e-5)

  log_probs_BTV = jax.nn.log_softmax(expected_BTV)
  prompts = [tokens_BT[0].tolist(), tokens_BT[1, :4].tolist()]
  (read,) = pack_prompts(prompts, batch_rows=2).batches
  ours_BV = next_log_probs(model, params, read.arrays, read.ends_E)
  ours_BV = ours_BV[np.argsort(read.prompts)]
  np.testing.assert_allclose(ours_BV[0], log_probs_BTV[0, 8], atol=1e-5)
  np.testing.assert_allclose(ours_BV[1], log_probs_BTV[1, 3], atol=1e-5)

  batch = {
    'tokens': tokens_BT,
    'positions': jnp.broadcast_to(jnp.arange(9), (2, 9)),
    'segments': jnp.ones((2, 9), jnp.int32),
    'targets': tiny_model.tokens(2, 9, seed=1),
    'weights': jnp.ones((2, 9)),
  }
  adapters = lora.init(jax.random.key(0), params, lora.resolve('o_proj', params), 2)
  total, _ = batch_loss(model, params, adapters, batch, 1.0)
  picked = np.take_along_axis(np.asarray(log_probs_BTV), np.asarray(batch['targets'])[..., None], 2)
  np.testing.assert_allclose(total, -picked.sum(), rtol=1e-5)


def test_ragged_rows_generate_what_each_says_alone():
  params, tokens_BT = tiny_model.params(CONFIG), tiny_model.tokens(2, 9)
  ragged = np.asarray(generate(MODEL, params, tokens_BT, jnp.asarray([9, 4]), 6, -1))
  for row, length in ((0, 9), (1, 4)):
    ids = list(tokens_BT[row, :length])
    for token in ragged[row]:
      width = jnp.asarray([ids + [0] * (16 - len(ids))])
      logits_V = tiny_model.logits(MODEL, params, width)[0, len(ids) - 1]
      assert int(logits_V.argmax()) == token
      ids.append(token)


def test_a_fresh_model_has_norms_of_one():
  tokens_BT = tiny_model.tokens(2, 9)
  fresh = init_params(CONFIG, jax.random.key(0))
  assert (fresh['layers']['post_feedforward_layernorm']['scale'] == 0).all()
  plain = dataclasses.replace(CONFIG, norm_offset=0.0)
  ones = init_params(plain, jax.random.key(0))
  assert (ones['layers']['attn']['q_norm']['scale'] == 1).all()
  np.testing.assert_allclose(
    tiny_model.logits(MODEL, fresh, tokens_BT),
    tiny_model.logits(Transformer(plain), ones, tokens_BT),
    atol=1e-5,
  )

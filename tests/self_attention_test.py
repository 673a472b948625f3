import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import logits

from lora_jax import attention, attention_cudnn, attention_splash
from lora_jax.config import ModelConfig
from lora_jax.self_attention import SelfAttention
from lora_jax.transformer import Layer, Transformer, init_params

HEADS, KV_HEADS, HEAD_DIM, TIME = 4, 2, 16, 256
SCALE = HEAD_DIM**-0.5
CONFIG = ModelConfig(
  vocab_size=32,
  num_layers=2,
  model_dim=32,
  num_heads=HEADS,
  num_kv_heads=KV_HEADS,
  head_dim=HEAD_DIM,
  mlp_dim=32,
  max_length=TIME,
)


def draw(batch, time=TIME, dtype=jnp.float32):
  """q_BTNH, k_BKTH, v_BKTH, and what the output is weighed by."""
  rng = np.random.default_rng(time)
  q, weights = rng.standard_normal((2, batch, time, HEADS, HEAD_DIM))
  k, v = rng.standard_normal((2, batch, KV_HEADS, time, HEAD_DIM))
  return tuple(jnp.asarray(x, dtype) for x in (q, k, v, weights))


def packed(batch, time=TIME):
  """Positions and segments of rows of three sequences and padding, cut inside of blocks."""
  rng = np.random.default_rng(batch)
  cuts = np.sort(rng.integers(1, time, (batch, 3)))
  segments = (np.arange(time)[None, :, None] >= cuts[:, None, :]).sum(-1)
  starts = np.concatenate([np.zeros((batch, 1), int), cuts], axis=1)
  positions = np.arange(time)[None] - np.take_along_axis(starts, segments, axis=1)
  # The last one is padding.
  return jnp.asarray(positions, jnp.int32), jnp.asarray((segments + 1) % 4, jnp.int32)


def value_and_gradients(attend, arrays, *others):
  """Of a weighed sum of attend(q, k, v, *others)."""
  *qkv, weights = arrays

  def loss(q, k, v):
    out = attend(q, k, v, *others)
    return jnp.vdot(weights, out), out

  return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*qkv)


def assert_close(ours, theirs, atol=1e-4):
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(one, other, atol=atol)


def queries(time=TIME, head_dim=HEAD_DIM, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct((2, time, HEADS, head_dim), dtype)


@pytest.mark.parametrize(
  ('platform', 'q', 'given', 'expected'),
  [
    (None, queries(), {}, 'blocks'),
    ('rocm', queries(), {}, 'blocks'),
    ('cuda', queries(), {}, 'cudnn'),
    ('cuda', queries(dtype=jnp.float16), {'in_segments': True, 'windowed': True}, 'cudnn'),
    ('cuda', queries(dtype=jnp.float32), {}, 'blocks'),
    ('cuda', queries(head_dim=132), {}, 'blocks'),
    ('cuda', queries(head_dim=12), {}, 'blocks'),
    ('cuda', queries(time=255), {}, 'blocks'),
    ('cuda', queries(), {'cap': 50.0}, 'blocks'),
    ('tpu', queries(), {}, 'splash'),
    ('tpu', queries(dtype=jnp.float32), {'cap': 50.0}, 'splash'),
    ('tpu', queries(time=200), {}, 'blocks'),
    ('tpu', queries(), {'windowed': True}, 'blocks'),
    ('tpu', queries(), {'in_segments': True}, 'blocks'),
  ],
)
def test_what_a_kernel_cannot_do_is_done_in_blocks(platform, q, given, expected):
  assert SelfAttention(platform).implementation(q, **given) == expected


def test_splash_takes_segments_where_rows_share_no_prefix():
  apart = SelfAttention('tpu', shared_prefix=False)
  assert apart.implementation(queries(), in_segments=True) == 'splash'


# JAX's own implementation stands in for cuDNN's, behind the same call.
@pytest.fixture
def any_device(monkeypatch):
  monkeypatch.setattr(attention_cudnn, '_IMPLEMENTATION', 'xla')


@pytest.mark.usefixtures('any_device')
@pytest.mark.parametrize('window', [None, 40])
@pytest.mark.parametrize('rows', ['one sequence', 'packed', 'shared prefix'])
def test_masks_for_cudnn_hide_what_blocks_hide(monkeypatch, rows, window):
  monkeypatch.setattr(SelfAttention, 'implementation', lambda *_: 'cudnn')
  positions, segments = packed(2)
  in_order = jnp.broadcast_to(jnp.arange(TIME), positions.shape)
  if rows == 'one sequence':
    positions, segments = in_order, None
  elif rows == 'shared prefix':
    prefix = in_order < 30
    positions = jnp.where(prefix, in_order, 30 + positions)
    segments = jnp.where(prefix, attention.SHARED, segments)
  others = (positions, segments, None if window is None else jnp.asarray(window), 0.3)
  ours = value_and_gradients(SelfAttention(), draw(2), *others)
  assert_close(ours, value_and_gradients(attention.self_attend, draw(2), *others))


@pytest.mark.usefixtures('any_device')
def test_cudnn_mapped_over_equals_one_by_one():
  *qkv, weights = draw(6)
  positions, segments = packed(6)
  mask = attention.causal_mask(positions, positions, segments, segments)
  mapped = lambda x: x.reshape(3, 2, *x.shape[1:])

  def gradients(q, k, v, mask, weights):
    # As in a training step: under a scan and rematerialised.
    @jax.checkpoint
    def attend(q, k):
      return attention_cudnn.self_attend(q, k, v, mask, SCALE)

    def loss(q, k, v):
      out, _ = jax.lax.scan(lambda q, k: (attend(q, k), None), q, jnp.stack([k, 2 * k]))
      return jnp.vdot(weights, out)

    return jax.grad(loss, (0, 1, 2))(q, k, v)

  arrays = (*qkv, mask, weights)
  alone = [jax.jit(gradients)(*(mapped(x)[i] for x in arrays)) for i in range(3)]
  together = jax.jit(jax.vmap(gradients))(*map(mapped, arrays))
  assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *alone), atol=1e-5)
  # Twice mapped over, the values by neither.
  twice = jax.vmap(
    jax.vmap(attention_cudnn.self_attend, (0, 0, None, 0, None)), (0, 0, None, 0, None)
  )
  split = lambda x: x.reshape(3, 2, 1, *x.shape[1:])
  out = jax.jit(twice, static_argnums=4)(
    split(qkv[0]), split(qkv[1]), qkv[2][:1], split(mask), SCALE
  )
  values = jnp.broadcast_to(qkv[2][:1], qkv[2].shape)
  expected = attention_cudnn.self_attend(qkv[0], qkv[1], values, mask, SCALE)
  np.testing.assert_allclose(out.reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize(
  ('time', 'cap', 'in_segments'),
  [(256, 0.0, True), (256, 0.0, False), (640, 0.0, True), (256, 0.7, True)],
)
def test_splash_equals_blocks_in_value_and_gradient(time, cap, in_segments):
  positions, segments = packed(2, time)
  if not in_segments:
    positions, segments = jnp.broadcast_to(jnp.arange(time), positions.shape), None
  splash = functools.partial(attention_splash.self_attend, cap=cap, interpret=True)
  ours = value_and_gradients(splash, draw(2, time), segments, SCALE)
  blocks = functools.partial(attention.self_attend, cap=cap)
  theirs = value_and_gradients(blocks, draw(2, time), positions, segments, None, SCALE)
  assert_close(ours, theirs)


def step_for(platform, cells=3):
  """A training step of a packed model for a platform that need not be here, as text."""
  choice = SelfAttention(platform, shared_prefix=False)
  model = Transformer(CONFIG, jnp.bfloat16, remat=True, attention=choice)
  params = jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0))

  def loss(scale, params, positions, segments):
    scaled = params | {'embed_tokens': jax.tree.map(lambda x: scale * x, params['embed_tokens'])}
    hidden, _ = model.apply({'params': scaled}, positions % 32, positions, segments)
    return hidden.astype(jnp.float32).sum()

  grad = jax.grad(loss)
  rows = jax.ShapeDtypeStruct((2, TIME), jnp.int32)
  scale = jax.ShapeDtypeStruct((), jnp.float32)
  if cells:
    grad = jax.vmap(grad, (0, None, 0, 0))
    rows, scale = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((cells, *x.shape), x.dtype), (rows, scale)
    )
  lowered = jax.jit(grad).trace(scale, params, rows, rows).lower(lowering_platforms=(platform,))
  return lowered.as_text()


@pytest.mark.parametrize('cells', [0, 3])
def test_a_step_for_cuda_holds_the_kernels_forward_and_backward(monkeypatch, cells):
  # The only thing that tracing asks of cuDNN itself.
  asked = 'jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version'
  monkeypatch.setattr(asked, lambda: 91_000)
  step = step_for('cuda', cells)
  calls = re.findall(r'custom_call @(__cudnn\S+?)\(', step)
  assert {'__cudnn$fmhaScaleBiasSoftmax', '__cudnn$fmhaScaleBiasSoftmaxBackward'} == set(calls)
  # One mask for all heads, and scores nowhere.
  rows = 2 * max(cells, 1)
  assert f'{rows}x1x{TIME}x{TIME}xbf16' in step
  assert not re.search(rf'x{TIME}x{TIME}xf32', step)


def test_a_step_for_a_tpu_holds_the_kernels_forward_and_backward():
  step = step_for('tpu')
  names = set(re.findall(r'kernel_name = "(\w+)"', step))
  assert {'fwd', 'dq', 'dkv'} == {name.split('_')[2] for name in names}
  assert not re.search(rf'x{TIME}x{TIME}xf32', step)


def test_a_step_for_a_cpu_holds_no_kernel_of_another_device():
  step = step_for('cpu')
  assert not re.search('cudnn|tpu_custom_call', step)


def test_windows_as_long_as_a_row_hide_nothing():
  config = dataclasses.replace(CONFIG, windows=(0, 16))
  assert Layer.stacked(config, 16).window is None
  params = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
  tokens = jnp.arange(17)[None]
  short, cut, long, whole = (
    logits(Transformer(given), params, tokens[:, :time])
    for time in (16, 17)
    for given in (config, CONFIG)
  )
  np.testing.assert_array_equal(short, cut)
  assert np.abs(long - whole).max() > 1e-3

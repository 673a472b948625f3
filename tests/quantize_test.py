"""A quantised base as a whole: LoRA, training and generation on it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P
from sharded import COLUMN, base_specs, mesh, put
from tiny_model import CONFIG, MODEL, RANK, SCALE

from lora_jax import kernels, lora, packs, sharding
from lora_jax.config import QUANTIZE, LoraConfig, ModelConfig, OptimConfig, TrainConfig
from lora_jax.errors import UserError
from lora_jax.generate import generate
from lora_jax.hub import bases
from lora_jax.quantize import KINDS, dequantize, footprint, quantize, store
from lora_jax.quantized import Nf4Kernel, QuantizedKernel
from lora_jax.step import make_step, stack_batches
from lora_jax.train import TrainJob, prepare, train
from lora_jax.transformer import Transformer, abstract_params

EACH_KIND = pytest.mark.parametrize('kind', list(KINDS))
# One stands for all where it is the product that counts: they share it, and
# `quantized_test` has what each decodes to.
ONE_KIND = pytest.mark.parametrize('kind', ['int4'])


@functools.cache
def quantised(kind):
  return quantize(tiny_model.params(), kind)


def test_the_setting_names_the_kinds():
  assert set(QUANTIZE) == {'none', *KINDS}


# The tree.


@EACH_KIND
def test_kernels_of_the_blocks_change_and_nothing_else(kind):
  before = flatten_dict(tiny_model.params(), sep='/')
  after = flatten_dict(quantised(kind), sep='/')
  assert after.keys() == before.keys()
  paths = {f'{path}/kernel' for path in lora.targetable(tiny_model.params())}
  assert len(paths) == 7
  for path, leaf in after.items():
    if path not in paths:
      assert leaf is before[path]
      continue
    assert isinstance(leaf, KINDS[kind])
    assert leaf.shape == before[path].shape
    assert all(len(array) == CONFIG.num_layers for array in jax.tree.leaves(leaf))
    # Layer by layer is the same as all at once.
    whole = KINDS[kind].quantize(before[path])
    np.testing.assert_array_equal(whole.codes, leaf.codes)
  assert lora.targetable(quantised(kind)) == lora.targetable(tiny_model.params())


def test_an_untied_head_and_paths_not_asked_for_stay_arrays():
  untied = ModelConfig(**{**vars(CONFIG), 'tie_embeddings': False})
  flat = flatten_dict(quantize(tiny_model.params(untied), 'nf4'), sep='/')
  assert isinstance(flat['lm_head/kernel'], jax.Array)
  some = quantize(tiny_model.params(), 'nf4', ['layers/mlp/down_proj'])
  found = [path for path, leaf in flatten_dict(some, sep='/').items() if _is_quantised(leaf)]
  assert found == ['layers/mlp/down_proj/kernel']


def _is_quantised(leaf):
  return isinstance(leaf, QuantizedKernel)


@EACH_KIND
def test_shapes_alone_are_quantised_too(kind):
  shapes = jax.eval_shape(lambda p: quantize(p, kind), abstract_params(CONFIG))
  assert jax.tree.structure(shapes) == jax.tree.structure(quantised(kind))
  for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(quantised(kind)), strict=True):
    assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


@EACH_KIND
def test_stored_in_bfloat16_the_codes_are_those_of_the_exact_weights(kind):
  numpy_params = jax.tree.map(np.asarray, tiny_model.params())
  stored = store(numpy_params, jnp.bfloat16, kind)
  for path, leaf in flatten_dict(stored, sep='/').items():
    expected = flatten_dict(quantised(kind), sep='/')[path]
    if not _is_quantised(leaf):
      assert leaf.dtype == jnp.bfloat16
      continue
    for ours, theirs in zip(jax.tree.leaves(leaf), jax.tree.leaves(expected), strict=True):
      np.testing.assert_array_equal(ours, theirs)
  plain = store(numpy_params, jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(plain)} == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda p: quantize(p, 'nf3'), "cannot quantise to 'nf3'; give nf4, int4, int8"),
    (lambda p: quantize(p, 'nf4', ['layers/mlp']), "no kernel .*'layers/mlp'; there are .*o_proj"),
    (lambda p: quantize(quantize(p, 'nf4'), 'int8'), 'holds a Nf4Kernel; quantise a plain base'),
    (
      lambda p: quantize(lora.attach(p, tiny_model.trained_adapters('o_proj'), 1.0), 'nf4'),
      'o_proj holds a LoraKernel; quantise a plain base',
    ),
  ],
)
def test_what_cannot_be_quantised_is_named(make, message):
  with pytest.raises(UserError, match=message) as error:
    make(tiny_model.params())
  assert '\n' not in str(error.value)


# Size.

# SmolLM2-135M.
SMOLLM2 = ModelConfig(49_152, 30, 576, 9, 3, 64, 1536, 8192, rope_theta=100_000.0)


@pytest.mark.parametrize(('kind', 'most'), [('nf4', 0.30), ('int4', 0.30), ('int8', 0.51)])
def test_bytes_beside_float16(kind, most):
  found = footprint(jax.eval_shape(lambda p: quantize(p, kind), abstract_params(SMOLLM2)))
  assert found.kernels == 7 * 30
  assert found.weights == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
  assert 0.25 < found.of_float16 <= most
  assert '210 kernels, 106,168,320 weights in ' in str(found)


@pytest.mark.base
@pytest.mark.usefixtures('optimised')
# Its file is Q4_1, whose blocks those of int4 are.
@pytest.mark.parametrize(('kind', 'most'), [('nf4', 0.1), ('int4', 0.02)])
def test_smollm2_takes_less_than_a_third_of_float16(kind, most):
  params = bases.load('smollm2-135m-instruct').params
  stored = quantize(params, kind)
  measured = exact = lost = kept = 0
  for path, leaf in flatten_dict(stored, sep='/').items():
    if _is_quantised(leaf):
      w = flatten_dict(params, sep='/')[path]
      measured += sum(array.nbytes for array in jax.tree.leaves(leaf))
      exact += 2 * w.size
      lost += float(jnp.sum((leaf.dequantize(jnp.float32) - w) ** 2))
      kept += float(jnp.sum(jnp.asarray(w) ** 2))
  assert measured == footprint(stored).stored_bytes
  assert measured <= 0.30 * exact
  assert (lost / kept) ** 0.5 < most


# LoRA on top.


def scalar(params, tokens_BT, model=MODEL):
  return jnp.mean(jnp.sin(tiny_model.logits(model, params, tokens_BT)))


def gradient(base, adapters, tokens_BT, model=MODEL):
  loss = lambda adapters, base: scalar(lora.attach(base, adapters, SCALE), tokens_BT, model)
  return jax.jit(jax.value_and_grad(loss))(adapters, base)


@EACH_KIND
def test_adapters_are_made_for_it_as_for_the_base(kind):
  paths = lora.resolve('all', quantised(kind))
  make = lambda params: lora.init(jax.random.key(0), params, paths, RANK)
  tiny_model.assert_trees_close(make(quantised(kind)), make(tiny_model.params()), rtol=0)


@ONE_KIND
@pytest.mark.usefixtures('optimised')
@pytest.mark.parametrize(('dtype', 'remat'), [('bfloat16', False), ('float32', True)])
def test_a_fresh_adapter_changes_no_bit(kind, dtype, remat):
  model = Transformer(CONFIG, dtype=jnp.dtype(dtype), remat=remat)
  base = store(tiny_model.params(), dtype, kind)
  fresh = lora.init(jax.random.key(0), base, lora.resolve('all', base), RANK)
  tokens_BT = tiny_model.tokens(2, 9)
  expected = np.asarray(tiny_model.logits(model, base, tokens_BT))
  attached = lora.attach(base, fresh, SCALE)
  assert np.asarray(tiny_model.logits(model, attached, tokens_BT)).tobytes() == expected.tobytes()


@pytest.mark.parametrize(('kind', 'targets'), [('nf4', 'all')])
def test_attach_equals_merge_in_value_and_gradient(kind, targets):
  base, tokens_BT = quantised(kind), tiny_model.tokens(2, 9)
  adapters = tiny_model.trained_adapters(targets)
  merged = lambda adapters: scalar(lora.merge(base, adapters, SCALE), tokens_BT)
  expected = jax.jit(jax.value_and_grad(merged))(adapters)
  value, grads = gradient(base, adapters, tokens_BT)
  np.testing.assert_allclose(value, expected[0], atol=1e-6)
  tiny_model.assert_trees_close(grads, expected[1], atol=1e-6, rtol=1e-4)
  assert abs(value - scalar(base, tokens_BT)) > 1e-4


@EACH_KIND
def test_merging_never_rounds_back(kind):
  small = jax.tree.map(lambda x: 1e-3 * x, tiny_model.trained_adapters('o_proj'))
  attn = lora.merge(quantised(kind), small, SCALE)['layers']['attn']
  before = quantised(kind)['layers']['attn']
  assert attn['q_proj']['kernel'] is before['q_proj']['kernel']
  kernel, held = attn['o_proj']['kernel'], small['layers']['attn']['o_proj']
  assert kernel.dtype == jnp.float32
  expected = before['o_proj']['kernel'].dequantize(jnp.float32) + SCALE * held['a'] @ held['b']
  np.testing.assert_allclose(kernel, expected, atol=1e-7)
  assert (kernel != before['o_proj']['kernel'].dequantize(jnp.float32)).mean() > 0.8
  plain = dequantize(lora.merge(quantised(kind), small, SCALE), jnp.float32)
  assert jax.tree.structure(plain) == jax.tree.structure(tiny_model.params())


@pytest.mark.parametrize(('kind', 'remat'), [('int4', True), ('int8', False)])
def test_gradients_are_those_on_the_decoded_base(kind, remat):
  adapters, tokens_BT = tiny_model.trained_adapters('all'), tiny_model.tokens(2, 9)
  model = Transformer(CONFIG, remat=remat)
  ours = gradient(quantised(kind), adapters, tokens_BT, model)
  decoded = dequantize(quantised(kind), jnp.float32)
  assert not any(map(_is_quantised, flatten_dict(decoded).values()))
  expected = gradient(decoded, adapters, tokens_BT)
  np.testing.assert_allclose(ours[0], expected[0], atol=1e-6)
  tiny_model.assert_trees_close(ours[1], expected[1], atol=1e-6, rtol=1e-4)
  assert all(jnp.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(ours[1]))


def test_many_adapters_at_once_equal_each_alone():
  base, tokens_BT = quantised('nf4'), tiny_model.tokens(2, 9)
  alone = [tiny_model.trained_adapters('o_proj,fc2', seed) for seed in range(2)]
  packed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
  work = jax.value_and_grad(lambda ad: scalar(lora.attach(base, ad, SCALE), tokens_BT))
  values, grads = jax.jit(jax.vmap(work))(packed)
  for i, adapters in enumerate(alone):
    value, expected = gradient(base, adapters, tokens_BT)
    np.testing.assert_allclose(values[i], value, atol=1e-6)
    own = jax.tree.map(lambda leaf, i=i: leaf[i], grads)
    tiny_model.assert_trees_close(own, expected, atol=1e-6, rtol=1e-4)


@ONE_KIND
def test_generation_says_what_the_decoded_base_says(kind):
  attached = lora.attach(quantised(kind), tiny_model.trained_adapters('all'), SCALE)
  plain = lora.merge(
    dequantize(quantised(kind), jnp.float32), tiny_model.trained_adapters('all'), SCALE
  )
  prompts_BT, lengths_B = tiny_model.tokens(3, 9), jnp.asarray([9, 4, 6])
  said = [generate(MODEL, params, prompts_BT, lengths_B, 8, -1) for params in (attached, plain)]
  np.testing.assert_array_equal(*said)


# Training.


def batches():
  """An endless stream in which the next token is always the same function of the last."""
  rng = np.random.default_rng(0)
  shape = (4, 16)
  while True:
    start = rng.integers(0, CONFIG.vocab_size, (shape[0], 1))
    ids = (start + 7 * np.arange(shape[1] + 1)) % CONFIG.vocab_size
    yield {
      'tokens': ids[:, :-1].astype(np.int32),
      'targets': ids[:, 1:].astype(np.int32),
      'weights': np.ones(shape, np.float32),
      'positions': np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
      'segments': np.ones(shape, np.int32),
    }


@ONE_KIND
def test_the_loss_falls_and_the_base_stays(kind):
  base = quantised(kind)
  before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(base)]
  watched = list(itertools.islice(batches(), 1))
  config = TrainConfig(steps=12, eval_every=6, dtype='float32')
  job = TrainJob(
    lora.resolve('all', base),
    LoraConfig(rank=RANK, alpha=2.0 * RANK),
    OptimConfig(learning_rate=1e-2, lr_ratio=1.0),
    seed=0,
    batches=batches,
    eval_batches=watched,
  )
  outcome = train(MODEL, base, job, config)
  assert outcome.eval_losses[-1][1] < 0.8 * outcome.losses[0]
  assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(base)] == before


# Kernels of attention of 25 MB that dwarf the activations of 32 tokens. The feed-forward
# network computes its insides again in any case, and what its kernels decode to with them.
WIDE = ModelConfig(64, 6, 256, 16, 16, 64, 256, 64)


def temporaries(base):
  """Bytes that the compiled training step wants beside its arguments and results."""
  job = TrainJob(lora.resolve('all', base), LoraConfig(rank=RANK), OptimConfig(), 0, batches)
  # Of the adapters' start only shapes count, and those a base of zeros has too.
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), base)
  wave = prepare(zeros, [job], 10)
  batch = {name: array[:1] for name, array in next(batches()).items()}
  step = make_step(Transformer(WIDE), 1)
  lowered = step.lower(wave.states, base, stack_batches([batch]), np.asarray([True]))
  return lowered.compile().memory_analysis()


@pytest.mark.slow
@ONE_KIND
@pytest.mark.usefixtures('optimised')
def test_no_decoded_kernel_is_kept_for_the_backward_pass(kind, monkeypatch):
  dense = sum(
    4 * leaf.size
    for path, leaf in flatten_dict(abstract_params(WIDE)).items()
    if 'attn' in path and 'kernel' in path
  )
  base = jax.eval_shape(lambda p: quantize(p, kind), abstract_params(WIDE))
  # A branch with a gradient rule of its own would keep no decoded kernel in any case.
  monkeypatch.setattr(packs, 'may_be_idle', lambda cells: False)
  own = temporaries(base).temp_size_in_bytes
  # What the plain gradient of a decoded kernel would keep.
  monkeypatch.setattr(
    kernels,
    'frozen_product',
    lambda x, kernel, dtype: jnp.matmul(
      x, kernel.dequantize(x.dtype), preferred_element_type=dtype
    ),
  )
  kept = temporaries(base).temp_size_in_bytes
  assert kept > dense
  assert own < kept - 0.9 * dense
  assert own < 0.6 * dense


# Sharding.


def test_arrays_take_the_sharding_of_their_kernel_where_it_divides_them():
  shardings = sharding.base_shardings(quantised('nf4'), mesh())
  found = jax.tree.map(lambda of_array: of_array.spec, shardings)
  assert jax.tree.structure(found) == jax.tree.structure(quantised('nf4'))
  q_proj = found['layers']['attn']['q_proj']['kernel']
  assert isinstance(q_proj, Nf4Kernel)
  assert q_proj.codes == COLUMN
  # 24 inputs are one block, which two devices cannot share.
  assert q_proj.absmax == P(None, None, 'tensor')
  assert found['norm'] == base_specs()['norm']


@ONE_KIND
def test_sharded_over_eight_devices_equals_one(kind):
  base, adapters, tokens_BT = (
    quantised(kind),
    tiny_model.trained_adapters('all'),
    tiny_model.tokens(4, 9),
  )
  work = jax.jit(
    jax.value_and_grad(lambda ad, base, tokens_BT: scalar(lora.attach(base, ad, SCALE), tokens_BT))
  )
  expected = work(adapters, base, tokens_BT)
  sharded = sharding.place(base, sharding.base_shardings(base, mesh()))
  codes = sharded['layers']['attn']['q_proj']['kernel'].codes
  assert codes.sharding.shard_shape(codes.shape)[1:] == (codes.shape[1] // 2, codes.shape[2] // 2)
  value, grads = work(
    put(adapters, lora.specs(base_specs(), adapters)), sharded, put(tokens_BT, P('data', None))
  )
  assert float(value) == pytest.approx(float(expected[0]), abs=1e-6)
  tiny_model.assert_trees_close(grads, expected[1], atol=1e-6, rtol=1e-3)

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P
from packs_test import assert_same, job
from tiny_vlm import VISION
from train_test import toy_batches

from lora_jax import attention, lora, quantize, sharding
from lora_jax.config import LoraConfig, TrainConfig
from lora_jax.errors import UserError
from lora_jax.generate import generate
from lora_jax.quantized import QuantizedKernel
from lora_jax.step import make_step, stack_batches
from lora_jax.train import prepare, train_wave
from lora_jax.transformer import Transformer, abstract_params

MIXED = 'data=2,fsdp=2,tensor=2'
MESHES = ('data=8', 'fsdp=8', 'tensor=8', MIXED, 'data=4,tensor=2', 'fsdp=4,tensor=2')
CONFIG = TrainConfig(steps=4, eval_every=2, dtype='float32')
LORA = LoraConfig(rank=4, alpha=8.0)


def mesh(text):
  return sharding.make_mesh(text, jax.devices('cpu')[:8])


# The flag.


@pytest.mark.parametrize(
  ('text', 'says'),
  [
    ('model=2', "no axis 'model'; there are data, fsdp, tensor"),
    ('data', 'give data a whole number from 1'),
    ('data=0', 'give data a whole number from 1'),
    ('data=-2', 'give data a whole number from 1'),
    ('data=2,data=4', 'data is given twice'),
    ('data=-1,fsdp=-1', 'only one axis can be -1'),
    ('data=3', 'there are 8 devices'),
    ('data=2', 'there are 8 devices'),
    ('fsdp=16', 'there are 8 devices'),
    ('data=-1,fsdp=3', 'there are 8 devices'),
    ('', "no axis ''"),
  ],
)
def test_a_mesh_that_cannot_be_is_an_error_in_one_line(text, says):
  with pytest.raises(UserError, match=f'^--mesh={text}: ') as raised:
    mesh(text)
  assert says in str(raised.value)
  assert '\n' not in str(raised.value)


def test_minus_one_is_what_is_left():
  assert dict(mesh('tensor=2, data=-1').shape) == {'data': 4, 'fsdp': 1, 'tensor': 2}
  assert dict(mesh('data=-1,fsdp=8').shape) == {'data': 1, 'fsdp': 8, 'tensor': 1}


# The rules.


def all_that_may_be():
  """Shapes of models that have, between them, every parameter that a model can have."""
  every = dataclasses.replace(
    tiny_model.CONFIG,
    tie_embeddings=False,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    post_norms=True,
    vision=VISION,
  )
  return [tiny_model.CONFIG, every]


def test_rules_cover_every_parameter_and_split_every_matrix_of_the_blocks():
  for config in all_that_may_be():
    shapes = abstract_params(config)
    found = flatten_dict(sharding.specs(shapes), sep='/')
    for path, leaf in flatten_dict(shapes, sep='/').items():
      assert len(found[path]) == len(leaf.shape)
      if re.fullmatch('layers/.*/kernel|embed_.*|lm_head/kernel', path):
        assert {*found[path]} - {None} == {'fsdp', 'tensor'}, path


def test_a_parameter_without_a_rule_is_an_error():
  with pytest.raises(ValueError, match='layers/mlp/router'):
    sharding.specs({'layers': {'mlp': {'router': jnp.zeros((2, 3))}}})


def test_what_a_mesh_does_not_divide_lies_whole():
  assert sharding.fit(P(None, 'fsdp', 'tensor'), (3, 6, 7), mesh(MIXED)) == P(None, 'fsdp', None)
  assert sharding.fit(P(('data', 'fsdp'), None), (6, 2), mesh(MIXED)) == P(None, None)
  assert sharding.fit(P(('data', 'fsdp'), None), (8, 2), mesh(MIXED)) == P(('data', 'fsdp'), None)


# Placing.


@pytest.mark.parametrize('kind', ['none', 'nf4', 'int4', 'int8'])
def test_each_device_holds_its_part_of_a_base(kind):
  params = jax.tree.map(np.asarray, tiny_model.params())
  whole = quantize.store(params, jnp.bfloat16, kind)
  with jax.set_mesh(mesh(MIXED)):
    cut = quantize.store(params, jnp.bfloat16, kind)
  assert jax.tree.structure(whole) == jax.tree.structure(cut)
  jax.tree.map(np.testing.assert_array_equal, cut, whole)
  for path, leaf in flatten_dict(cut, sep='/').items():
    arrays = jax.tree.leaves(leaf)
    assert all(len(array.sharding.device_set) == 8 for array in arrays)
    if path.endswith('kernel'):
      # What holds a number for each weight; scales of blocks may be too few to be cut.
      largest = max(arrays, key=lambda array: array.size)
      assert largest.addressable_shards[0].data.size == largest.size // 4
      assert isinstance(leaf, QuantizedKernel) == (kind != 'none')
  held = sharding.resident_bytes(cut)
  assert held < 0.5 * sharding.resident_bytes(whole)


# Training.


def wide_batches(seed):
  """Batches of eight rows."""
  for one, other in zip(toy_batches(seed), toy_batches(seed + 100), strict=True):
    yield {name: np.concatenate([one[name], other[name]]) for name in one}


def jobs(packed):
  cells = [('all', 0), ('o_proj,fc2', 1), ('qkv', 2)] if packed else [('all', 0)]
  watched = [*itertools.islice(wide_batches(99), 2)]
  return [
    dataclasses.replace(
      job(targets, seed, LORA),
      batches=functools.partial(wide_batches, seed),
      eval_batches=watched,
    )
    for targets, seed in cells
  ]


def outcomes(base, packed, remat=False):
  """What comes of training, and where the states lay."""
  model = Transformer(tiny_model.CONFIG, remat=remat)
  wave = prepare(base, jobs(packed), CONFIG.steps)
  lay = jax.tree.map(lambda leaf: getattr(leaf, 'sharding', None), wave.states)
  return train_wave(model, base, wave, CONFIG), lay


def stored(kind='none'):
  return quantize.store(jax.tree.map(np.asarray, tiny_model.params()), jnp.float32, kind)


@functools.cache
def on_one(packed, kind='none'):
  return outcomes(stored(kind), packed)[0]


def check(text, packed, remat=False, kind='none'):
  expected = on_one(packed, kind)
  with jax.set_mesh(mesh(text)):
    found, lay = outcomes(stored(kind), packed, remat)
  for one, other in zip(found, expected, strict=True):
    assert_same(one, other, 1e-5)
  return lay


@pytest.mark.slow
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('text', MESHES)
def test_every_mesh_trains_as_one_device(text, packed):
  lay = check(text, packed)
  # Adapters and their moments lie as their kernels do.
  adapters = lay.adapters['layers']
  in_axis, out_axis = mesh(text).shape['fsdp'], mesh(text).shape['tensor']
  shape = (len(jobs(packed)), tiny_model.CONFIG.num_layers, 48, 48)
  of = lambda leaf: tuple(a // b for a, b in zip(shape, leaf.shard_shape(shape), strict=True))
  assert of(adapters['attn']['q_proj']['a']) == (1, 1, in_axis, 1)
  assert of(adapters['attn']['q_proj']['b']) == (1, 1, 1, out_axis)
  assert of(adapters['mlp']['down_proj']['a']) == (1, 1, out_axis, 1)
  assert of(adapters['mlp']['down_proj']['b']) == (1, 1, 1, in_axis)
  moments = [leaf for leaf in jax.tree.leaves(lay.opt_state) if leaf.spec != P()]
  assert len(moments) in (0, 2 * len(jax.tree.leaves(lay.adapters)))


@pytest.mark.slow
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize(
  ('remat', 'kind'), [(True, 'none'), (False, 'nf4'), (True, 'int4'), (False, 'int8')]
)
def test_so_does_one_that_keeps_less_or_has_a_quantised_base(packed, remat, kind):
  check(MIXED, packed, remat, kind)


def test_the_compiled_step_takes_and_gives_back_no_matrix_whole():
  with jax.set_mesh(mesh(MIXED)):
    base, model = stored(), Transformer(tiny_model.CONFIG)
    wave = prepare(base, jobs(packed=True), CONFIG.steps)
    step = make_step(model, wave.cells, states=wave.states)
    batches = stack_batches([next(wide_batches(0))] * wave.cells)
    compiled = step.lower(wave.states, base, batches, np.ones(wave.cells, bool)).compile()
  (states, params, *_), _ = compiled.input_shardings
  after, _ = compiled.output_shardings
  of_states = jax.tree.leaves_with_path(states)
  assert [*map(str, jax.tree.leaves(states))] == [*map(str, jax.tree.leaves(after))]
  for (path, sharding_), leaf in zip(of_states, jax.tree.leaves(wave.states), strict=True):
    if path[-1] in (jax.tree_util.DictKey('a'), jax.tree_util.DictKey('b')):
      assert np.prod(sharding_.shard_shape(leaf.shape)) == leaf.size // 2, path
  of_base = jax.tree.leaves_with_path(params)
  for (path, sharding_), leaf in zip(of_base, jax.tree.leaves(base), strict=True):
    if leaf.ndim > 2 or 'embed' in str(path):
      assert np.prod(sharding_.shard_shape(leaf.shape)) == leaf.size // 4, path


@pytest.mark.parametrize('segmented', [False, True])
@pytest.mark.parametrize(
  ('text', 'rows', 'kv_heads', 'local'),
  [
    (MIXED, 8, 2, (2, 16, 3, 8)),
    ('tensor=8', 8, 2, (8, 16, 6, 8)),
    ('data=8', 3, 2, (3, 16, 6, 8)),
    ('data=4,tensor=2', 4, 2, (1, 16, 3, 8)),
  ],
)
def test_a_kernel_runs_on_the_rows_and_heads_of_a_device(text, rows, kv_heads, local, segmented):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  heads = (draw(rows, 16, 6, 8), draw(rows, kv_heads, 16, 8), draw(rows, kv_heads, 16, 8))
  positions_BT = np.broadcast_to(np.arange(16, dtype=np.int32), (rows, 16))
  segments_BT = np.sort(rng.integers(1, 4, (rows, 16)).astype(np.int32)) if segmented else None
  seen = []

  def attend(q_BTNH, k_BKTH, v_BKTH, positions_BT, segments_BT):
    seen.append(q_BTNH.shape)
    return attention.self_attend(q_BTNH, k_BKTH, v_BKTH, positions_BT, segments_BT)

  expected = attend(*heads, positions_BT, segments_BT)
  with jax.set_mesh(mesh(text)):
    found = jax.jit(functools.partial(sharding.apart, attend))(*heads, positions_BT, segments_BT)
  assert seen[-1] == local
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_device_multiplies_by_a_whole_kernel_under_tensor_parallelism():
  """Nor is one gathered: no array of the compiled program has a block's whole kernel's shape."""
  base = stored()
  model = Transformer(tiny_model.CONFIG)
  tokens_BT = np.zeros((8, 16), np.int32)
  work = jax.jit(lambda base, tokens: model.apply({'params': base}, tokens)[0])
  c = tiny_model.CONFIG
  whole = f'f32[{c.model_dim},{c.mlp_dim}]'
  assert whole in work.lower(base, tokens_BT).compile().as_text()
  with jax.set_mesh(mesh('tensor=8')):
    assert whole not in work.lower(stored(), tokens_BT).compile().as_text()


def test_generation_over_a_mesh_gives_the_tokens_of_one_device():
  prompts_BT = np.asarray(tiny_model.tokens(3, 9))
  lengths_B = np.asarray([9, 4, 7], np.int32)
  model = tiny_model.MODEL
  attached = lambda base: lora.attach(base, tiny_model.trained_adapters('all'), 2.0)
  run = lambda base: np.asarray(generate(model, attached(base), prompts_BT, lengths_B, 8, -1))
  expected = run(stored())
  with jax.set_mesh(mesh(MIXED)):
    np.testing.assert_array_equal(run(stored()), expected)

"""Every member of the LoRA family is a tree that trains, packs, merges and starts as it should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from family import KINDS, PLAIN, fresh, trained
from flax.traverse_util import flatten_dict
from tiny_model import CONFIG, MODEL

from lora_jax import lora, lora_family
from lora_jax.config import LoraConfig
from lora_jax.errors import UserError
from lora_jax.kernels import LoraKernel, dense
from lora_jax.quantized import Int8Kernel
from lora_jax.transformer import Transformer


def attached(adapters, config, params=None, **dropout):
  params = tiny_model.params() if params is None else params
  return lora.attach(params, adapters, lora_family.plan(config, adapters).scales(), **dropout)


def logits(adapters, config, model=MODEL, params=None):
  return tiny_model.logits(model, attached(adapters, config, params), tiny_model.tokens(2, 9))


def plain_logits(model=MODEL, params=None):
  params = tiny_model.params() if params is None else params
  return np.asarray(tiny_model.logits(model, params, tiny_model.tokens(2, 9)))


# The start.


@pytest.mark.usefixtures('optimised')
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('kind', ['fused dora', 'ragged dora', 'norms'])
def test_a_fresh_adapter_changes_no_bit(kind, dtype):
  model = Transformer(CONFIG, dtype=jnp.dtype(dtype))
  base = jax.tree.map(lambda x: x.astype(dtype), tiny_model.params())
  adapters, config = fresh(kind, base)
  assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype('float32')}
  expected = plain_logits(model, base).tobytes()
  assert np.asarray(logits(adapters, config, model, base)).tobytes() == expected
  # In training the lengths are taken in the model's program.
  inside = jax.jit(lambda ad, base: logits(ad, config, model, base))(adapters, base)
  assert np.asarray(inside).tobytes() == expected


@pytest.mark.parametrize('kind', ['pissa and dora', 'fused pissa'])
def test_pissa_changes_no_more_than_rounding(kind):
  np.testing.assert_allclose(logits(*fresh(kind)), plain_logits(), atol=1e-4)


def test_pissa_begins_at_the_principal_singular_vectors():
  adapters, config = fresh('pissa')
  kernels = flatten_dict(tiny_model.params(), sep='/')
  for path, module in lora.modules(adapters).items():
    for layer, w in enumerate(np.asarray(kernels[f'{path}/kernel'])):
      a, b = module.leaves['a'][layer], module.leaves['b'][layer]
      s = np.linalg.svd(w, compute_uv=False)
      # As much of the kernel as any product of that rank takes out of it.
      left = np.linalg.norm(w - config.scale * a @ b)
      assert left <= 1.001 * np.linalg.norm(s[config.rank :])
      # A and B share the singular values evenly.
      np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-4)


def test_magnitudes_begin_as_the_lengths_of_the_weights():
  adapters, _ = fresh('ragged dora')
  kernel = np.asarray(tiny_model.params()['layers']['attn']['o_proj']['kernel'])
  lengths = np.linalg.norm(kernel, axis=1)
  np.testing.assert_allclose(
    adapters['layers']['attn']['o_proj']['m'], lengths * [[1], [0], [1]], rtol=1e-6
  )


# What all kinds share.


@pytest.mark.parametrize('kind', KINDS)
def test_attach_equals_merge(kind):
  adapters, config = trained(kind)
  scales = lora_family.plan(config, adapters).scales()
  merged = lora.merge(tiny_model.params(), adapters, scales)
  assert not any(isinstance(leaf, LoraKernel) for leaf in flatten_dict(merged).values())
  found = logits(adapters, config)
  np.testing.assert_allclose(
    found, tiny_model.logits(MODEL, merged, tiny_model.tokens(2, 9)), atol=2e-4
  )
  assert np.abs(found - plain_logits()).max() > 0.05


@pytest.mark.parametrize('kind', ['fused pissa', 'ragged dora', 'norms'])
def test_many_adapters_at_once_equal_each_alone_under_remat(kind):
  model = Transformer(CONFIG, remat=True)
  alone = [trained(kind, seed)[0] for seed in range(2)]
  config = trained(kind)[1]
  packed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
  value = lambda ad: jnp.sum(jnp.sin(logits(ad, config, model)))
  together = jax.jit(jax.vmap(jax.value_and_grad(value)))(packed)
  one = jax.jit(jax.value_and_grad(lambda ad: jnp.sum(jnp.sin(logits(ad, config)))))
  for i, adapters in enumerate(alone):
    found = jax.tree.map(lambda leaf, i=i: leaf[i], together)
    tiny_model.assert_trees_close(found, one(adapters), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize('kind', ['ragged dora', 'ragged pissa'])
def test_what_is_not_trained_gets_no_gradient(kind):
  adapters, config = trained(kind)
  ranks = lora_family.plan(config, adapters).ranks
  grads = jax.jit(jax.grad(lambda ad: jnp.sum(jnp.sin(logits(ad, config)))))(adapters)
  for path, module in lora.modules(grads).items():
    leaves = module.leaves
    assert not any(leaves[name].any() for name in leaves if name in ('a0', 'b0'))
    for layer, rank in enumerate(ranks[path]):
      assert not leaves['a'][layer, :, rank:].any()
      assert not leaves['b'][layer, rank:].any()
      trains = [leaves[name][layer].any() for name in ('a', 'b', 'm') if name in leaves]
      assert [*map(bool, trains)] == [rank > 0] * len(trains)


@pytest.mark.parametrize('kind', ['dora', 'fused'])
def test_dropout_needs_a_key(kind):
  adapters, config = trained(kind)
  run = lambda **dropout: tiny_model.logits(
    MODEL, attached(adapters, config, **dropout), tiny_model.tokens(2, 9)
  )
  exact = run()
  np.testing.assert_array_equal(run(dropout_rate=0.5), exact)
  dropped = run(dropout_key=jax.random.key(0), dropout_rate=0.5)
  assert not np.allclose(dropped, exact, atol=1e-3)


@pytest.mark.parametrize('kind', ['fused dora', 'pissa'])
def test_a_quantised_base_is_one_more_kernel(kind):
  quantised = jax.tree.map(lambda leaf: leaf, tiny_model.params())
  for block, name in (('attn', 'q_proj'), ('mlp', 'up_proj')):
    kernel = quantised['layers'][block][name]['kernel']
    quantised['layers'][block][name]['kernel'] = Int8Kernel.quantize(kernel)
  decode = lambda leaf: dense(leaf, jnp.float32) if isinstance(leaf, Int8Kernel) else leaf
  plain = jax.tree.map(decode, quantised, is_leaf=lambda leaf: isinstance(leaf, Int8Kernel))
  adapters, config = fresh(kind, quantised)
  tiny_model.assert_trees_close(adapters, fresh(kind, plain)[0], atol=1e-5)
  moved, _ = trained(kind, params=quantised)
  found = logits(moved, config, params=quantised)
  np.testing.assert_allclose(found, logits(moved, config, params=plain), atol=2e-4)


# Fused and split.


def test_fused_and_split_are_one_function_when_tied():
  adapters, config = trained('fused')
  tied = lora.split_fused(adapters)
  assert set(lora.modules(tied)) == set(lora.resolve('all', tiny_model.params())) - {
    'layers/mlp/down_proj'
  }
  value = lambda ad: jnp.sum(jnp.sin(logits(ad, config)))
  of_fused, of_split = (jax.jit(jax.value_and_grad(value))(tree) for tree in (adapters, tied))
  np.testing.assert_array_equal(of_fused[0], of_split[0])
  fused, split = of_fused[1]['layers'], of_split[1]['layers']
  for block, whole, parts in (
    ('attn', 'qkv_proj', ('q_proj', 'k_proj', 'v_proj')),
    ('mlp', 'gate_up_proj', ('gate_proj', 'up_proj')),
  ):
    of_a = sum(split[block][part]['a'] for part in parts)
    np.testing.assert_allclose(fused[block][whole]['a'], of_a, atol=1e-4)
    for part in parts:
      np.testing.assert_allclose(fused[block][part]['b'], split[block][part]['b'], atol=1e-5)


def test_the_parts_of_a_fused_module_drop_the_same_entries():
  adapters, config = fresh('fused')
  held = attached(adapters, config, dropout_key=jax.random.key(0), dropout_rate=0.5)['layers']
  data = lambda block, name: jax.random.key_data(held[block][name]['kernel'].dropout_key).tolist()
  assert data('attn', 'q_proj') == data('attn', 'k_proj') == data('attn', 'v_proj')
  assert data('mlp', 'gate_proj') == data('mlp', 'up_proj') != data('attn', 'q_proj')


def test_a_module_in_a_fused_one_and_alone_is_refused():
  with pytest.raises(UserError, match=r'adapts layers/attn/q_proj twice.*qkv_proj holds it'):
    lora.resolve('qkv_proj,q_proj', tiny_model.params())


# Ranks, alphas, layers.

PATHS = ('layers/attn/q_proj', 'layers/attn/o_proj', 'layers/mlp/gate_up_proj')


@pytest.mark.parametrize(
  ('changes', 'ranks'),
  [
    ({}, {}),
    ({'rank_pattern': (('o_proj', 2),)}, {'o_proj': (2, 2, 2)}),
    ({'rank_pattern': (('qkv', 2),)}, {'q_proj': (2, 2, 2)}),
    ({'rank_pattern': (('fc1', 2),)}, {'gate_up_proj': (2, 2, 2)}),
    ({'rank_pattern': (('layers/attn/.*', 2),)}, {'q_proj': (2, 2, 2), 'o_proj': (2, 2, 2)}),
    ({'rank_pattern': (('layers/1/.*', 9), ('o_proj', 2))},
     {'q_proj': (4, 9, 4), 'o_proj': (2, 9, 2), 'gate_up_proj': (4, 9, 4)}),
    ({'rank_pattern': (('o_proj', 2), ('layers/1/.*', 9)), 'layers': '1-2'},
     {'q_proj': (0, 9, 4), 'o_proj': (0, 2, 2), 'gate_up_proj': (0, 9, 4)}),
    ({'layers': '0,2'}, {path.rsplit('/', 1)[-1]: (4, 0, 4) for path in PATHS}),
    ({'rank_pattern': (('proj', 2),)}, {}),
  ],
)  # fmt: skip
def test_the_first_pattern_that_matches_gives_the_rank(changes, ranks):
  plan = lora_family.plan_for(dataclasses.replace(PLAIN, **changes), dict.fromkeys(PATHS, 3))
  expected = {path: ranks.get(path.rsplit('/', 1)[-1], (4, 4, 4)) for path in PATHS}
  assert plan.ranks == expected


@pytest.mark.parametrize(('rslora', 'power'), [(False, 1.0), (True, 0.5)])
def test_scales_follow_rank_and_alpha(rslora, power):
  config = dataclasses.replace(
    PLAIN,
    rslora=rslora,
    rank_pattern=(('o_proj', 2),),
    alpha_pattern=(('layers/0/attn/q_proj', 3.0),),
    layers='0-1',
  )
  scales = lora_family.plan_for(config, dict.fromkeys(PATHS, 3)).scales()
  np.testing.assert_allclose(scales['layers/attn/q_proj'], [3 / 4**power, 8 / 4**power, 0])
  np.testing.assert_allclose(scales['layers/attn/o_proj'], [8 / 2**power, 8 / 2**power, 0])
  assert config.scale == 8 / 4**power


def test_only_what_trains_is_counted():
  adapters, config = fresh('ragged')
  ranks = lora_family.plan(config, adapters).ranks
  kernels = flatten_dict(tiny_model.params(), sep='/')
  expected = sum(
    sum(ranks[path]) * sum(kernels[f'{path}/kernel'].shape[1:]) for path in lora.modules(adapters)
  )
  assert lora.summarise(adapters, ranks).trainable_params == expected
  assert lora.summarise(adapters).trainable_params > expected
  # Where an adapter began does not train; magnitudes and norms do.
  pissa, config = fresh('pissa')
  assert (
    lora.summarise(pissa).trainable_params == lora.summarise(fresh('plain')[0]).trainable_params
  )
  dora, config = fresh('ragged dora')
  ranks = lora_family.plan(config, dora).ranks
  sizes = [sum(kernels[f'{path}/kernel'].shape[1:]) for path in ranks]
  outs = [kernels[f'{path}/kernel'].shape[2] for path in ranks]
  assert lora.summarise(dora, ranks).trainable_params == 2 * (4 * sum(sizes) + sum(outs))
  norms = lora.summarise(fresh('norms')[0])
  assert norms.modules[1:] == ('layers/input_layernorm/scale', 'norm/scale')
  assert str(norms).startswith('o_proj, input_layernorm/scale, norm/scale: ')
  fused = lora.summarise(fresh('fused')[0])
  assert fused.modules == ('layers/attn/o_proj', 'layers/attn/qkv_proj', 'layers/mlp/gate_up_proj')


def test_shardings_follow_the_kernels():
  adapters, _ = fresh('fused pissa')
  spec = jax.sharding.PartitionSpec
  specs = lora.specs(
    jax.tree.map(lambda leaf: spec(*'xyz'[: leaf.ndim]), tiny_model.params()), adapters
  )
  assert jax.tree.structure(specs) == jax.tree.structure(adapters)
  attn = specs['layers']['attn']
  assert attn['qkv_proj'] == {'a': spec('x', 'y', None), 'a0': spec('x', 'y', None)}
  assert attn['q_proj'] == {'b': spec('x', None, 'z'), 'b0': spec('x', None, 'z')}
  dora = lora.specs(
    jax.tree.map(lambda leaf: spec(*'xyz'[: leaf.ndim]), tiny_model.params()),
    fresh('ragged dora')[0],
  )
  assert dora['layers']['attn']['o_proj']['m'] == spec('x', 'z')


# Names of what trains too, and mistakes.


@pytest.mark.parametrize(
  ('names', 'found'),
  [
    (('norm',), ['norm/scale']),
    (('input_layernorm',), ['layers/input_layernorm/scale']),
    (('layers/.*/scale',),
     ['layers/input_layernorm/scale', 'layers/post_attention_layernorm/scale']),
    (('scale',),
     ['layers/input_layernorm/scale', 'layers/post_attention_layernorm/scale', 'norm/scale']),
  ],
)  # fmt: skip
def test_norms_are_named_by_module_leaf_or_path(names, found):
  config = dataclasses.replace(PLAIN, train_also=names)
  assert sorted(lora_family.also_trained(config, tiny_model.params())) == found


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'train_also': ('bias',)}, "'bias' matches no norm or bias; this base has .*norm/scale"),
    ({'train_also': ('o_proj',)}, 'matches no norm or bias'),
    ({'rank_pattern': (('down_proj', 2),)}, r"'down_proj' matches no adapted module.*o_proj"),
    ({'alpha_pattern': (('layers/3/attn/o_proj', 2.0),)}, 'layers/0/attn/o_proj'),
    ({'layers': '0-3'}, r"layers '0-3': 0-3 is not in 0-2 of this base"),
    ({'layers': '2-1'}, '2-1 is not in 0-2'),
  ],
)
def test_what_is_named_in_vain_is_an_error(changes, says):
  config = dataclasses.replace(PLAIN, **changes)
  with pytest.raises(UserError, match=says) as error:
    lora_family.check(config, ['o_proj', 'qkv'], tiny_model.params())
  assert '\n' not in str(error.value)


def test_a_pattern_need_match_one_set_of_several():
  config = dataclasses.replace(PLAIN, rank_pattern=(('down_proj', 2),))
  lora_family.check(config, ['o_proj', 'fc2'], tiny_model.params())


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'init': 'pisa'}, "'pisa'; give one of default, pissa"),
    ({'layers': '1-'}, "layers is '1-'"),
    ({'rank_pattern': (('o_proj', 0),)}, 'o_proj=0'),
    ({'rank_pattern': (('(', 2),)}, 'is no pattern'),
    ({'alpha_pattern': (('o_proj', float('nan')),)}, 'o_proj=nan'),
    ({'train_also': ('(',)}, 'is no pattern'),
  ],
)
def test_a_value_without_a_meaning_is_refused_where_it_is_made(changes, says):
  with pytest.raises(UserError, match=says):
    LoraConfig(**changes)


def test_a_configuration_comes_back_from_its_record():
  config = LoraConfig(
    rank_pattern=(('o_proj', 2),),
    alpha_pattern=(('qkv', 3.0),),
    dora=True,
    layers='0-1',
    train_also=('norm',),
  )
  assert LoraConfig.from_record(dataclasses.asdict(config)) == config
  assert LoraConfig.from_record({'rank': 8, 'alpha': 4.0, 'dropout': 0.0}).rank == 8


def test_a_rank_that_no_module_has_room_for_is_found_before_training():
  shapes = jax.eval_shape(tiny_model.params)
  with pytest.raises(UserError, match=r'rank 99 is more than layers/attn/o_proj has'):
    lora_family.check(LoraConfig(rank=99), ['o_proj'], shapes)

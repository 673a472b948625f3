import dataclasses
import functools
import warnings

import jax
import numpy as np
import pytest
import tiny_model
from family import PLAIN, trained

from lora_jax import arithmetic, lora, lora_family
from lora_jax.errors import UserError
from lora_jax.hub import huggingface
from lora_jax.hub import peft as ours

WEIGHTS = (0.7, -0.4)


def operand(kind, seed=0):
  adapters, config = trained(kind, seed)
  return adapters, lora_family.plan(config, adapters).scales()


def updates(adapters, scale=1.0):
  """What an adapter adds to each kernel."""
  base = tiny_model.params()
  merged = lora.merge(base, adapters, scale)
  return jax.tree.map(lambda one, other: np.asarray(one - other), merged['layers'], base['layers'])


def test_a_weighted_sum_adds_the_weighted_updates():
  operands = [operand('ragged'), operand('fused pissa', 1)]
  found = updates(arithmetic.weighted_sum(operands, WEIGHTS))
  one, other = (updates(*held) for held in operands)
  expected = jax.tree.map(lambda a, b: WEIGHTS[0] * a + WEIGHTS[1] * b, one, other)
  tiny_model.assert_trees_close(found, expected, atol=2e-5)
  assert np.abs(found['attn']['q_proj']['kernel']).max() > 0.01


def test_a_cut_is_the_nearest_of_its_rank():
  operands = [operand('plain'), operand('plain', 1)]
  cut = arithmetic.weighted_sum(operands, WEIGHTS, rank=3)
  whole = updates(arithmetic.weighted_sum(operands, WEIGHTS))['mlp']['up_proj']['kernel']
  assert cut['layers']['mlp']['up_proj']['a'].shape[-1] == 3
  u, s, v = np.linalg.svd(whole)
  nearest = (u[..., :3] * s[:, None, :3]) @ v[:, :3]
  np.testing.assert_allclose(updates(cut)['mlp']['up_proj']['kernel'], nearest, atol=1e-5)


def test_ties_with_one_adapter_trims_it_alone():
  held = operand('plain')
  size = 24 * 16
  found = updates(arithmetic.ties([held], [1.0], 0.25, 16))['attn']['k_proj']['kernel']
  whole = updates(*held)['attn']['k_proj']['kernel']
  for layer in range(len(whole)):
    kept = np.abs(found[layer]) > 1e-5
    assert kept.sum() == size // 4
    np.testing.assert_allclose(found[layer][kept], whole[layer][kept], atol=1e-5)
    assert np.abs(whole[layer][~kept]).max() <= np.abs(whole[layer][kept]).min()


def test_dare_keeps_the_mean_and_everything_at_density_one():
  held = operand('plain')
  whole = updates(*held)['attn']['k_proj']['kernel']
  run = jax.jit(
    lambda key, density: arithmetic.dare(key, [held], [1.0], density, 16), static_argnums=1
  )
  exact = updates(run(jax.random.key(0), 1.0))['attn']['k_proj']['kernel']
  np.testing.assert_allclose(exact, whole, atol=1e-5)
  draws = [updates(run(jax.random.key(i), 0.5))['attn']['k_proj']['kernel'] for i in range(60)]
  dropped = (np.abs(draws[0]) < 1e-6).mean()
  assert dropped == pytest.approx(0.5, abs=0.06)
  np.testing.assert_allclose(
    draws[0][np.abs(draws[0]) > 1e-6], 2 * whole[np.abs(draws[0]) > 1e-6], atol=1e-4
  )
  error = np.std(draws, axis=0) / len(draws) ** 0.5
  assert (np.abs(np.mean(draws, axis=0) - whole) < 5 * error + 1e-6).mean() > 0.99


@pytest.mark.parametrize(
  ('work', 'says'),
  [
    (lambda: arithmetic.weighted_sum([operand('dora')], [1.0]), '/m, which does not add up'),
    (lambda: arithmetic.weighted_sum([operand('norms')], [1.0]), 'scale, which does not add up'),
    (lambda: arithmetic.weighted_sum([operand('plain')], [1.0, 2.0]), '1 adapters and 2 weights'),
    (lambda: arithmetic.ties([operand('plain')], [1.0], 0.0, 2), 'density 0.0'),
    (lambda: arithmetic.dare(jax.random.key(0), [operand('plain')], [1.0], 1.5, 2), 'density 1.5'),
  ],
)
def test_what_does_not_add_up_is_refused(work, says):
  with pytest.raises(UserError, match=says):
    work()


def test_adapters_of_two_bases_are_refused():
  wider = tiny_model.params(dataclasses.replace(tiny_model.CONFIG, mlp_dim=44))
  one, other = (tiny_model.trained_adapters('fc2', of=base) for base in (None, wider))
  with pytest.raises(UserError, match='down_proj of different sizes'):
    arithmetic.weighted_sum([(one, 1.0), (other, 1.0)], [1.0, 1.0])


# Against PEFT.

RANK = 5
COMBINED = {
  'cat': (lambda operands: arithmetic.weighted_sum(operands, WEIGHTS), {}),
  'svd': (
    lambda operands: arithmetic.weighted_sum(operands, WEIGHTS, RANK),
    {'svd_rank': RANK},
  ),
  'ties_svd': (
    lambda operands: arithmetic.ties(operands, WEIGHTS, 0.3, RANK),
    {'svd_rank': RANK, 'density': 0.3},
  ),
  'dare_linear_svd': (
    lambda operands: arithmetic.dare(jax.random.key(0), operands, WEIGHTS, 1.0, RANK),
    {'svd_rank': RANK, 'density': 1.0},
  ),
}


@pytest.fixture(scope='module')
def two_adapters(tmp_path_factory):
  pytest.importorskip('peft', reason='installs on Python 3.11')
  directory = tmp_path_factory.mktemp('adapters')
  huggingface.save(directory / 'base', tiny_model.CONFIG, tiny_model.params())
  for seed, alpha in ((0, 8.0), (1, 3.0)):
    adapters, config = trained('plain', seed)
    held = ours.of(adapters, dataclasses.replace(config, alpha=alpha))
    ours.save(directory / str(seed), held)
  return directory


def quietly(work):
  with warnings.catch_warnings():
    # PEFT reads a name that transformers is about to drop, and warns of a density of 1.
    warnings.simplefilter('ignore')
    return work()


@pytest.mark.parametrize('combination', COMBINED)
def test_a_combination_equals_pefts(two_adapters, combination):
  peft, torch = pytest.importorskip('peft'), pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  combine, options = COMBINED[combination]
  held = [ours.load(two_adapters / name, tiny_model.params()) for name in '01']
  assert held[0].alphas != held[1].alphas
  merged = combine([(adapter.params, adapter.scales()) for adapter in held])
  tokens_BT = tiny_model.tokens(2, 9)
  found = tiny_model.logits(
    tiny_model.MODEL, lora.attach(tiny_model.params(), merged, 1.0), tokens_BT
  )
  base = transformers.AutoModelForCausalLM.from_pretrained(two_adapters / 'base', dtype='float32')
  load = functools.partial(peft.PeftModel.from_pretrained, base, two_adapters / '0', '0')
  model = quietly(load).eval()
  quietly(lambda: model.load_adapter(two_adapters / '1', '1'))
  quietly(
    lambda: model.add_weighted_adapter(['0', '1'], [*WEIGHTS], 'both', combination, **options)
  )
  model.set_adapter('both')
  with torch.no_grad():
    expected = model(torch.from_numpy(np.array(tokens_BT, np.int64))).logits.numpy()
  np.testing.assert_allclose(found, expected, atol=5e-4)
  plain = tiny_model.logits(tiny_model.MODEL, tiny_model.params(), tokens_BT)
  assert np.abs(found - plain).max() > 0.05


def test_a_sum_goes_to_peft_as_any_adapter(two_adapters, tmp_path):
  held = ours.load(two_adapters / '0', tiny_model.params())
  both = arithmetic.weighted_sum([(held.params, held.scales())] * 2, [1.0, 1.0])
  rank = 2 * PLAIN.rank
  ours.save(tmp_path, ours.uniform(both, rank, rank))
  back = ours.load(tmp_path, tiny_model.params())
  jax.tree.map(np.testing.assert_array_equal, back.params, both)
  assert all((scales == 1).all() for scales in back.scales().values())

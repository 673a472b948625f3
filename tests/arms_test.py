"""Ranks of the arm of equal parameters: the sizes that they give, and what they leave alone."""

import dataclasses

import jax
import pytest
import tiny_model

from lora_jax import arms, lora, lora_family
from lora_jax.config import LoraConfig
from lora_jax.errors import UserError
from lora_jax.presets import ARTICLE_TARGETS, EQUAL_PARAMETERS, EQUAL_RANK
from lora_jax.report.arms import TOLERANCE

CONFIG = LoraConfig(rank=4, alpha=10.0)
SETS = (*ARTICLE_TARGETS, 'gate_up_proj', 'layers/attn/.*')


def sized(targets, config=CONFIG, arm=EQUAL_PARAMETERS):
  return arms.size(targets, arm, config, tiny_model.params())


def trained(targets, config):
  """Numbers of an adapter that train, counted apart from any summary."""
  params = tiny_model.params()
  paths = lora.resolve(targets, params)
  init = lambda: lora_family.init(jax.random.key(0), params, paths, config)
  return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init)))


@pytest.mark.parametrize('dora', [False, True])
@pytest.mark.parametrize('targets', SETS)
def test_no_whole_rank_comes_nearer_to_the_budget(targets, dora):
  config = dataclasses.replace(CONFIG, rank=2, dora=dora)
  budget = trained('all', config)
  found = sized(targets, config)
  assert found.budget == budget
  assert found.summary.trainable_params == trained(targets, found.config)
  assert found.miss == pytest.approx(found.summary.trainable_params / budget - 1)
  miss = abs(found.summary.trainable_params - budget)
  for rank in {max(1, found.config.rank - 1), found.config.rank + 1}:
    assert miss <= abs(trained(targets, dataclasses.replace(found.config, rank=rank)) - budget)


def test_the_set_that_makes_the_budget_keeps_its_rank():
  assert sized('all').config == CONFIG
  assert sized('all').miss == 0


def test_the_factor_on_the_product_stays():
  for rslora in (False, True):
    config = dataclasses.replace(CONFIG, rslora=rslora)
    found = sized('o_proj', config).config
    assert found.rank > 2 * config.rank
    assert found.scale == pytest.approx(config.scale)


def test_a_rank_ends_at_the_smallest_side_of_the_modules():
  config = dataclasses.replace(CONFIG, rank=12, alpha=24.0)
  # o_proj takes 48 inputs to 24 outputs; keys and values have 16 outputs.
  assert (sized('o_proj', config).config.rank, sized('o_proj', config).most) == (24, 24)
  assert sized('qkv', config).config.rank == 16
  assert sized('o_proj', config).miss < -TOLERANCE
  assert sized('qkv_proj', config).config.rank == 24


def test_the_budget_is_that_of_the_chosen_layers():
  config = LoraConfig(rank=1, alpha=1.0, layers='0')
  found = sized('layers/mlp/.*', config)
  # 24 x 40 twice and 40 x 24: 192 numbers a rank, of 416 for all modules.
  assert (found.config.rank, found.summary.trainable_params, found.budget) == (2, 384, 416)
  assert found.config.layers == '0'


def test_equal_rank_is_what_was_given():
  found = sized('fc1', arm=EQUAL_RANK)
  assert (found.config, found.budget, found.record()) == (CONFIG, None, {})
  assert str(found) == str(found.summary)


def test_a_record_says_what_was_solved():
  found = sized('fc2')
  held = found.record()
  assert held['rank'] == found.config.rank
  assert held['alpha'] == pytest.approx(2.5 * found.config.rank)
  assert held['budget'] * (1 + held['miss']) == pytest.approx(found.summary.trainable_params)
  assert f'rank {held["rank"]}, ' in str(found)


def test_ranks_by_pattern_leave_nothing_to_solve():
  arms.check(CONFIG)
  for name in ('rank_pattern', 'alpha_pattern'):
    with pytest.raises(UserError, match=rf'--{name}: .*one rank and one alpha'):
      arms.check(dataclasses.replace(CONFIG, **{name: (('fc2', 8),)}))

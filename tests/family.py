"""Adapters of every member of the LoRA family for the tiny model, fresh and moved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny_model
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax import lora, lora_family
from lora_jax.config import LoraConfig

PLAIN = LoraConfig(rank=4, alpha=8.0)
KINDS = {
  'plain': ('all', {}),
  'rslora': ('all', {'rslora': True}),
  'dora': ('all', {'dora': True}),
  'pissa': ('all', {'init': 'pissa'}),
  'pissa and dora': ('qkv,fc2', {'init': 'pissa', 'dora': True}),
  'fused': ('qkv_proj,o_proj,gate_up_proj', {}),
  'fused dora': ('qkv_proj,gate_up_proj', {'dora': True}),
  'fused pissa': ('qkv_proj,gate_up_proj', {'init': 'pissa'}),
  'ragged': ('all', {'rank_pattern': (('o_proj', 2), ('layers/1/mlp/.*', 7)), 'layers': '0-1'}),
  'ragged dora': ('o_proj,fc2', {'layers': '0,2', 'dora': True}),
  'ragged pissa': ('qkv,fc1', {'layers': '1-2', 'init': 'pissa', 'rank_pattern': (('qkv', 3),)}),
  'norms': ('o_proj', {'train_also': ('input_layernorm', 'norm')}),
}


def fresh(kind, params=None, seed=0):
  targets, changes = KINDS[kind]
  params = tiny_model.params() if params is None else params
  config = dataclasses.replace(PLAIN, **changes)
  key = jax.random.key(seed)
  return lora_family.init(key, params, lora.resolve(targets, params), config), config


def trained(kind, seed=0, params=None):
  """As after some steps: what may move has moved, where it is not zero for good."""
  adapters, config = fresh(kind, params, seed)
  plan = lora_family.plan(config, adapters)
  rng = np.random.default_rng(seed)
  flat = dict(flatten_dict(adapters, sep='/'))
  owners = {path: module.owner for path, module in lora.modules(adapters).items()}
  owners |= {owner: owner for owner in owners.values()}
  for path, leaf in flat.items():
    parent, name = path.rsplit('/', 1)
    if name in ('a0', 'b0'):
      continue
    noise = 0.1 * rng.standard_normal(leaf.shape)
    for layer, rank in enumerate(plan.ranks.get(owners.get(parent, ''), ())):
      if name == 'm':
        noise[layer] *= rank > 0
      else:
        noise[layer, ..., rank:] *= name != 'a'
        noise[layer, rank:] *= name != 'b'
    flat[path] = leaf + jnp.asarray(noise, jnp.float32)
  return unflatten_dict(flat, sep='/'), config

"""A small base with adapters of every kind on disk, and what each answers alone, merged.

Adapters are made and merged by numpy, as the papers have it and not as `lora_jax` does.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import tiny_model
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax import lora
from lora_jax.generate import generate
from lora_jax.hub import peft, tiny
from lora_jax.sampling import GREEDY
from lora_jax.serve.answer import Request
from lora_jax.serve.config import ServeConfig
from lora_jax.targets import parts
from lora_jax.transformer import Transformer

TOKENIZER = tiny.chat_tokenizer()
# No answer ends where no token is this one.
TOKENIZER.eos_id = -1
BASE = dataclasses.replace(tiny_model.CONFIG, vocab_size=TOKENIZER.vocab_size)
MODEL = Transformer(BASE)
# Targets, the rank of each layer, and what else there is.
KINDS = {
  'o_proj': ('o_proj', (4, 4, 4), ()),
  'all': ('all', (3, 3, 3), ()),
  'rslora': ('qkv,fc2', (8, 8, 8), ('rslora',)),
  'dora': ('all', (2, 2, 2), ('m',)),
  'ragged': ('qkv,o_proj', (0, 7, 2), ()),
  'ragged dora': ('o_proj,fc2', (5, 0, 1), ('m',)),
  'pissa': ('fc1,fc2', (4, 4, 4), ('a0',)),
  'fused': ('qkv_proj,gate_up_proj', (4, 4, 4), ()),
}
ALPHA = 6.0
CONFIG = ServeConfig(rows=4, length=32, shortest=8, slots=3, rank=8, dora=True, host_bytes=100_000)
NEW, LONGEST = 10, 20


def params():
  return tiny_model.params(BASE)


@functools.cache
def adapter(name):
  """`kind`, or `kind.seed` for another of it; every leaf is random."""
  kind, _, seed = name.partition('.')
  targets, ranks, also = KINDS[kind]
  rng = np.random.default_rng([*KINDS].index(kind) + 100 * int(seed or 0))
  rank, layers = max(ranks), len(ranks)
  used_LR = np.arange(rank) < np.asarray(ranks)[:, None]
  draw = lambda *shape: rng.normal(0, 0.2, shape).astype(np.float32)
  kernels = flatten_dict(params(), sep='/')
  owners = lora.resolve(targets, params())
  leaves = {}
  for owner in owners:
    shape = kernels[f'{parts(owner)[0]}/kernel'].shape
    leaves[f'{owner}/a'] = draw(layers, shape[1], rank) * used_LR[:, None]
    for path in parts(owner):
      fan_out = kernels[f'{path}/kernel'].shape[2]
      leaves[f'{path}/b'] = draw(layers, rank, fan_out) * used_LR[..., None]
      if 'm' in also:
        lengths = 1 + np.abs(draw(layers, fan_out))
        leaves[f'{path}/m'] = lengths * (np.asarray(ranks)[:, None] > 0)
  if 'a0' in also:
    leaves |= {f'{path}0': leaf + draw(*leaf.shape) for path, leaf in leaves.items()}
  return peft.Adapter(
    unflatten_dict(leaves, sep='/'),
    dict.fromkeys(owners, ranks),
    {owner: tuple(ALPHA if rank else 0.0 for rank in ranks) for owner in owners},
    'rslora' in also,
  )


@functools.cache
def merged(name):
  """The base with an adapter in its kernels; '': as it is."""
  if not name:
    return params()
  held = adapter(name)
  scales = held.scales()
  flat = dict(flatten_dict(params(), sep='/'))
  for path, module in lora.modules(held.params).items():
    leaves = module.leaves
    update = leaves['a'] @ leaves['b']
    if 'a0' in leaves:
      update -= leaves['a0'] @ leaves['b0']
    w = np.asarray(flat[f'{path}/kernel']) + scales[module.owner][:, None, None] * update
    if 'm' in leaves:
      length = np.linalg.norm(w, axis=1)
      w *= np.where(leaves['m'] > 0, leaves['m'] / length, 1)[:, None]
    flat[f'{path}/kernel'] = jnp.asarray(w, jnp.float32)
  return unflatten_dict(flat, sep='/')


def write(root, names):
  for name in names:
    peft.save(root / name, adapter(name))
  return root


def prompt(length, seed=0):
  drawn = np.random.default_rng([seed, length]).integers(0, BASE.vocab_size, length)
  return tuple(drawn.tolist())


@functools.cache
def alone(name, asked):
  """The greedy answer of NEW tokens to a prompt, and by how much it is the likeliest.

  Args:
    name: of the adapter, which is merged; '': none.
    asked: the prompt.
  """
  tokens = np.zeros((1, LONGEST), np.int32)
  tokens[0, : len(asked)] = asked
  ids = np.asarray(generate(MODEL, merged(name), tokens, np.asarray([len(asked)]), NEW, -1))[0]
  whole = np.zeros((1, LONGEST + NEW), np.int32)
  whole[0, : len(asked) + NEW] = [*asked, *ids]
  logits_TV = np.asarray(tiny_model.logits(MODEL, merged(name), jnp.asarray(whole)))[0]
  top_T2 = np.sort(logits_TV, axis=-1)[len(asked) - 1 : len(asked) + NEW - 1, -2:]
  return ids.tolist(), float((top_T2[:, 1] - top_T2[:, 0]).min())


def clear(names, lengths):
  """Requests whose greedy answers do not hang on rounding, and those answers."""
  found = []
  for name in names:
    for length in lengths:
      for asked in (prompt(length, seed) for seed in range(3)):
        ids, margin = alone(name, asked)
        if margin > 1e-3:
          found.append((Request(asked, name, NEW, GREEDY), ids))
          break
  return found


def run(engine):
  """Steps until nothing is left to do."""
  while engine.busy:
    engine.step()


def is_free(engine):
  """Whether nobody waits or sits, and no slot is in use."""
  counts = engine.counts
  at = (counts.waiting, counts.seated, counts.free_rows, counts.slots_in_use)
  return at == (0, 0, engine.config.rows, 0)

"""The bank on the device: what a row computes with a slot, and that loading is a write."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import served
import tiny_model
from flax.traverse_util import flatten_dict
from served import CONFIG, KINDS, MODEL

from lora_jax import lora
from lora_jax.bank_kernel import NONE
from lora_jax.errors import UserError
from lora_jax.hub import peft
from lora_jax.programs import Programs
from lora_jax.serve.bank import AdapterBank, attach

SLOTS, NAMES = len(KINDS), [*KINDS]


def new_bank(**changes):
  config = dataclasses.replace(CONFIG, **{'slots': SLOTS, **changes})
  return AdapterBank(served.params(), config, jnp.float32)


@functools.partial(jax.jit, static_argnames='model')
def logits(model, params, held, slots_B, tokens_BT):
  attached = attach(params, held, slots_B)
  hidden_BTD, _ = model.apply({'params': attached}, tokens_BT)
  return model.apply({'params': attached}, hidden_BTD, method='head')


def rows(count):
  return jnp.asarray([served.prompt(6, seed) for seed in range(count)])


def assert_slots_hold(bank, names):
  """Each slot computes what its adapter does, merged; `NONE` what the base does."""
  names = {NONE: '', **names}
  tokens_BT = rows(len(names))
  slots_B = jnp.asarray([*names], jnp.int32)
  together = logits(MODEL, served.params(), bank.held, slots_B, tokens_BT)
  for row, name in enumerate(names.values()):
    expected = tiny_model.logits(MODEL, served.merged(name), tokens_BT)[row]
    np.testing.assert_allclose(together[row], expected, atol=2e-4, err_msg=name)


def test_every_kind_of_adapter_is_one_slot_of_the_same_batch():
  bank = new_bank()
  slots = dict(enumerate(KINDS, start=1))
  for slot, name in slots.items():
    bank.write(slot, bank.fit(served.adapter(name), name))
  assert_slots_hold(bank, slots)
  tokens_BT = rows(1)[jnp.zeros(SLOTS + 1, jnp.int32)]
  of_all = logits(MODEL, served.params(), bank.held, jnp.arange(SLOTS + 1), tokens_BT)
  # All say different things, or little would have been compared.
  assert len({one.tobytes() for one in np.asarray(of_all)}) == SLOTS + 1


def test_loading_compiles_nothing_and_leaves_nothing_of_what_was_there(tmp_path):
  bank = new_bank(slots=3)
  bank.warm_up()
  read = [
    bank.fit(peft.load(served.write(tmp_path, [name]) / name, served.params()), name)
    for name in NAMES
  ]
  rng = np.random.default_rng(0)
  slots = {}
  with Programs() as programs:
    for at in rng.permutation(3 * SLOTS) % SLOTS:
      slot = int(rng.integers(1, 4))
      bank.write(slot, read[at])
      slots[slot] = NAMES[at]
  assert programs.count == 0
  assert {*slots} == {1, 2, 3}
  assert_slots_hold(bank, slots)


def test_memory_is_all_taken_at_the_start():
  bank = new_bank()
  before = bank.nbytes
  for name in KINDS:
    bank.write(1, bank.fit(served.adapter(name), name))
  assert bank.nbytes == before
  kernels = flatten_dict(served.params(), sep='/')
  shapes = [kernels[f'{path}/kernel'].shape for path in bank.held]
  one = sum(4 * CONFIG.rank * layers * (fan_in + fan_out) for layers, fan_in, fan_out in shapes)
  # Beside A and B, scales and gains come to little.
  assert (SLOTS + 1) * one < before < 1.5 * (SLOTS + 1) * one


def test_in_bfloat16_a_row_is_as_with_its_adapter_attached():
  base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), served.params())
  model = MODEL.clone(dtype=jnp.bfloat16)
  bank = AdapterBank(base, dataclasses.replace(CONFIG, slots=2), jnp.bfloat16)
  tokens_BT = rows(2)
  for slot, name in [(1, 'all'), (2, 'dora')]:
    bank.write(slot, bank.fit(served.adapter(name), name))
  together = logits(model, base, bank.held, jnp.asarray([2, 1]), tokens_BT)
  for row, name in enumerate(['dora', 'all']):
    held = served.adapter(name)
    attached = lora.attach(base, held.params, held.scales())
    expected = np.asarray(tiny_model.logits(model, attached, tokens_BT)[row])
    of_base = np.asarray(tiny_model.logits(model, base, tokens_BT)[row])
    far = np.abs(expected - of_base).max()
    assert np.abs(together[row] - expected).max() < 0.05 * far


def refused(bank, adapter, match):
  with pytest.raises(UserError, match=match):
    bank.fit(adapter, 'mine')


def test_what_does_not_fit_is_refused_with_what_would():
  refused(
    new_bank(rank=3), served.adapter('o_proj'), 'mine: has rank 4 in .*; start with --max_rank=4'
  )
  refused(new_bank(dora=False), served.adapter('dora'), 'mine: has magnitudes .* --dora')
  refused(
    new_bank(targets='o_proj,fc2'),
    served.adapter('all'),
    'mine: adapts layers/attn/k_proj, and there are slots for layers/attn/o_proj, layers/mlp/down',
  )
  broken = jax.tree.map(lambda leaf: leaf * np.nan, served.adapter('all').params)
  broken = dataclasses.replace(served.adapter('all'), params=broken)
  refused(new_bank(), broken, 'mine: has numbers in layers/.* that are not finite')
  norms = {**served.adapter('all').params, 'norm': {'scale': np.ones(MODEL.config.model_dim)}}
  trained = dataclasses.replace(served.adapter('all'), params=norms)
  refused(new_bank(), trained, 'mine: trains norm/scale too')
  with pytest.raises(UserError, match="target 'nope' matches no module"):
    new_bank(targets='nope')


def test_slots_under_fewer_modules_take_less_and_serve_what_adapts_those():
  bank = new_bank(targets='o_proj,fc2', dora=True)
  assert [*bank.held] == ['layers/attn/o_proj', 'layers/mlp/down_proj']
  bank.write(2, bank.fit(served.adapter('ragged dora'), 'ragged dora'))
  assert_slots_hold(bank, {2: 'ragged dora'})

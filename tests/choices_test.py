import jax
import numpy as np
import pytest

from lora_jax import choices, lora, packs
from lora_jax.attention import SHARED
from lora_jax.config import LoraConfig
from lora_jax.transformer import Transformer
from tests import tiny_model

MODEL = Transformer(tiny_model.CONFIG)


def made_prompts(count, prefix=0, low=1, high=60, seed=0):
  """Prompts that begin alike for `prefix` tokens."""
  rng = np.random.default_rng(seed)
  ids = lambda length: rng.integers(1, tiny_model.CONFIG.vocab_size, length).tolist()
  shared = ids(prefix)
  return [shared + ids(int(length)) for length in rng.integers(low, high, count)]


def alone(params, prompt):
  """Log probabilities after one prompt, by the whole model on it and nothing else."""
  logits_BTV = tiny_model.logits(MODEL, params, np.asarray([prompt]))
  return np.asarray(jax.nn.log_softmax(logits_BTV[0, -1]))


def read(params, packed):
  """Prompt -> its log probabilities, each prompt once."""
  found = {}
  for batch in packed.batches:
    log_probs_EV = choices.next_log_probs(packed.fit(MODEL), params, batch.arrays, batch.ends_E)
    for number, of_prompt in zip(batch.prompts, log_probs_EV, strict=False):
      assert number not in found
      found[number] = np.asarray(of_prompt)
  return found


@pytest.mark.slow
@pytest.mark.parametrize('prefix', [0, 40])
@pytest.mark.parametrize('batch_rows', [1, 3, 50])
def test_packed_prompts_end_as_each_does_alone(prefix, batch_rows):
  params, prompts = tiny_model.params(), made_prompts(23, prefix)
  packed = choices.pack_prompts(prompts, batch_rows)
  assert bool(packed.shape.prefix) == bool(prefix)
  found = read(params, packed)
  assert sorted(found) == [*range(23)]
  for number, prompt in enumerate(prompts):
    np.testing.assert_allclose(found[number], alone(params, prompt), atol=1e-4)


def test_a_single_prompt_of_a_single_token():
  params = tiny_model.params()
  packed = choices.pack_prompts([[7]], batch_rows=4)
  assert len(packed.batches) == packed.shape.rows == 1
  np.testing.assert_allclose(read(params, packed)[0], alone(params, [7]), atol=1e-4)


def test_prompts_that_are_all_alike_keep_a_token_of_their_own():
  prompts = [[3, 1, 4, 1, 5]] * 9
  packed = choices.pack_prompts(prompts, batch_rows=2)
  found = read(tiny_model.params(), packed)
  for of_prompt in found.values():
    np.testing.assert_allclose(of_prompt, alone(tiny_model.params(), prompts[0]), atol=1e-4)


@pytest.mark.parametrize('batch_rows', [1, 4, 16])
def test_batches_are_alike_even_and_no_larger_than_asked(batch_rows):
  prompts = made_prompts(200, prefix=30, low=20, high=120)
  packed = choices.pack_prompts(prompts, batch_rows)
  shapes = {(batch.arrays['tokens'].shape, batch.ends_E.shape) for batch in packed.batches}
  assert len(shapes) == 1
  rows, length = packed.shape.rows, packed.shape.length
  # One row may be longer than the longest prompt, by the multiple that rows come in.
  assert rows * length <= max(batch_rows * 150, 256)
  own = sum(map(len, prompts)) - 200 * len(packed.shape.prefix)
  positions = len(packed.batches) * rows * length
  used = sum((batch.arrays['segments'] != 0).sum() for batch in packed.batches)
  assert used >= own
  # Rows are full but for a few tokens, and batches of rows but for less than one each.
  assert positions - used < 0.05 * positions + len(packed.batches) * length


def test_what_all_prompts_begin_with_is_read_once_a_row():
  packed = choices.pack_prompts(made_prompts(40, prefix=50), batch_rows=8)
  for batch in packed.batches:
    shared = (batch.arrays['segments'] == SHARED).sum(axis=1)
    assert set(shared) <= {0, 50}


def test_cells_of_a_pack_read_as_alone():
  params, prompts = tiny_model.params(), made_prompts(9, prefix=12)
  paths = lora.resolve('all', params)
  adapters = [
    jax.tree.map(
      lambda x, seed=seed: x + jax.random.normal(jax.random.key(seed), x.shape) / 4,
      lora.init(jax.random.key(seed), params, paths, 2),
    )
    for seed in range(3)
  ]
  shapes = packs.union(adapters)
  scales = packs.scales(adapters[0], LoraConfig(rank=2, alpha=4.0), shapes)
  pack = packs.stack([packs.Pack(own, scales) for own in adapters])
  packed = choices.pack_prompts(prompts, batch_rows=4)
  for batch in packed.batches:
    arguments = (batch.arrays, batch.ends_E)
    found_CEV = choices.next_log_probs_pack(packed.fit(MODEL), params, pack, *arguments)
    for own, found_EV in zip(adapters, found_CEV, strict=True):
      attached = lora.attach(params, own, 2.0)
      alone_EV = choices.next_log_probs(packed.fit(MODEL), attached, *arguments)
      np.testing.assert_allclose(found_EV, alone_EV, atol=1e-4)
  assert np.abs(found_CEV[0] - found_CEV[1]).max() > 0.1

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import CONFIG, MODEL

from lora_jax import lora, lora_family, packs
from lora_jax.config import LoraConfig
from lora_jax.generate import generate, generate_pack
from lora_jax.parts import part_rows

# No row ends where no token is this one.
NEVER = -1
NEW = 8
LENGTHS = [1, 7, 4, 11]


def prompts():
  return [np.asarray(tiny_model.tokens(length, seed=length)) for length in LENGTHS]


def padded(rows, pad=0):
  width = max(len(row) for row in rows)
  out = [np.pad(row, (0, width - len(row)), constant_values=pad) for row in rows]
  return np.stack(out), np.asarray([len(row) for row in rows], np.int32)


def run(rows, eos_id=NEVER, params=None, pad=0, new=NEW):
  params = tiny_model.params() if params is None else params
  return np.asarray(generate(MODEL, params, *padded(rows, pad), new, eos_id))


def by_full_forward(prompt, params=None):
  """Greedy tokens with neither cache nor batch, and the margin over the second best."""
  params = tiny_model.params() if params is None else params
  width = max(LENGTHS) + NEW
  ids, margin = list(prompt), np.inf
  for _ in range(NEW):
    # Padding on the right changes nothing, and spares a compilation for each length.
    row = jnp.asarray([ids + [0] * (width - len(ids))])
    logits_V = tiny_model.logits(MODEL, params, row)[0, len(ids) - 1]
    second, first = np.sort(logits_V)[-2:]
    margin = min(margin, first - second)
    ids.append(int(logits_V.argmax()))
  return ids[len(prompt) :], margin


@pytest.fixture(scope='module')
def free():
  """What follows each prompt where nothing ends a row."""
  return run(prompts())


def test_ragged_rows_equal_the_full_forward_of_each_alone(free):
  assert free.shape == (len(LENGTHS), NEW)
  for row, prompt in zip(free, prompts(), strict=True):
    expected, margin = by_full_forward(prompt)
    # Otherwise the comparison would hang on rounding.
    assert margin > 1e-3
    assert row.tolist() == expected
  # The model says different things, or little would have been compared.
  assert len(np.unique(free)) > len(LENGTHS)


def test_rows_do_not_depend_on_padding_or_company(free):
  np.testing.assert_array_equal(run(prompts(), pad=CONFIG.vocab_size - 1), free)
  order = [2, 3, 0, 1]
  np.testing.assert_array_equal(run([prompts()[i] for i in order]), free[order])
  np.testing.assert_array_equal(run(prompts()[1:2]), free[1:2])


def test_a_row_ends_at_eos_and_is_eos_from_there(free):
  for eos_id in {int(free[0, 2]), int(free[3, 5])}:
    out = run(prompts(), eos_id)
    for row, untold in zip(out, free, strict=True):
      ends = np.flatnonzero(untold == eos_id)
      kept = ends[0] if len(ends) else NEW
      assert row.tolist() == untold[:kept].tolist() + [eos_id] * (NEW - kept)


def test_fewer_tokens_are_a_prefix(free):
  np.testing.assert_array_equal(run(prompts(), new=3), free[:, :3])


def test_rows_of_length_0_are_padding_of_the_batch(free):
  eos_id = CONFIG.vocab_size - 1
  rows, lengths = padded(prompts())
  lengths[1] = 0
  out = np.asarray(generate(MODEL, tiny_model.params(), rows, lengths, NEW, eos_id))
  assert (out[1] == eos_id).all()
  expected = run(prompts(), eos_id)
  np.testing.assert_array_equal(np.delete(out, 1, 0), np.delete(expected, 1, 0))
  nothing = generate(MODEL, tiny_model.params(), rows, 0 * lengths, NEW, eos_id)
  assert (np.asarray(nothing) == eos_id).all()


def test_adapters_attached_equal_adapters_merged(free):
  base, adapters = tiny_model.params(), tiny_model.trained_adapters('all')
  attached = run(prompts(), params=lora.attach(base, adapters, tiny_model.SCALE))
  np.testing.assert_array_equal(
    attached, run(prompts(), params=lora.merge(base, adapters, tiny_model.SCALE))
  )
  assert (attached != free).any()


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [{}, {'dora': True}, {'init': 'pissa', 'train_also': ('norm', 'input_layernorm')}],
  ids=str,
)
def test_a_pack_writes_what_each_of_its_cells_writes_alone(free, changes):
  base, config = tiny_model.params(), LoraConfig(rank=4, alpha=8.0, **changes)
  adapters = []
  for seed, targets in enumerate(['o_proj', 'all', 'qkv,fc2']):
    paths = lora.resolve(targets, base)
    fresh = lora_family.init(jax.random.key(seed), base, paths, config)
    rng = np.random.default_rng(seed)
    noise = lambda x, rng=rng: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    adapters.append(jax.tree.map(noise, fresh))
  shapes = packs.union(adapters)
  pack = packs.stack(
    [packs.Pack(packs.embed(own, shapes), packs.scales(own, config, shapes)) for own in adapters]
  )
  # A token that ends some rows, at different steps in different cells.
  eos_id = int(free[0, 2])
  together = np.asarray(generate_pack(MODEL, base, pack, *padded(prompts()), NEW, eos_id))
  assert together.shape == (3, len(LENGTHS), NEW)
  for out, own in zip(together, adapters, strict=True):
    attached = lora.attach(base, own, lora_family.plan(config, own).scales())
    np.testing.assert_array_equal(out, run(prompts(), eos_id, params=attached))
  assert len({out.tobytes() for out in together}) == 3


def test_prompts_read_in_parts_are_read_alike(monkeypatch, free):
  monkeypatch.setattr('lora_jax.parts.CPU_POSITIONS', 2 * max(LENGTHS))
  jax.clear_caches()
  assert part_rows(len(LENGTHS), max(LENGTHS), 1) == 2
  np.testing.assert_array_equal(run(prompts()), free)

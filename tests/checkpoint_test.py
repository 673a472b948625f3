import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from lora_jax import checkpoint, lora
from lora_jax.errors import UserError


def shapes(targets, rank=tiny_model.RANK):
  params = tiny_model.params()
  paths = lora.resolve(targets, params)
  return jax.eval_shape(lambda: lora.init(jax.random.key(0), params, paths, rank))


def assert_bits_equal(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert one.dtype == other.dtype
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_every_bit_comes_back(tmp_path):
  adapters = tiny_model.trained_adapters('o_proj,fc2')
  # The smallest number, a negative zero and an infinity survive as well.
  a = adapters['layers']['attn']['o_proj']['a']
  odd = a.at[0, 0, :3].set(jnp.asarray([1e-45, -0.0, jnp.inf]))
  adapters['layers']['attn']['o_proj']['a'] = odd
  checkpoint.save(tmp_path / 'deep' / 'cell.adapter', adapters)
  for like in (adapters, shapes('o_proj,fc2')):
    assert_bits_equal(checkpoint.load(tmp_path / 'deep' / 'cell.adapter', like), adapters)


def test_saving_again_replaces(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  directory = tmp_path.__class__('cell.adapter')
  for seed in range(2):
    adapters = tiny_model.trained_adapters('o_proj', seed)
    checkpoint.save(directory, adapters)
  assert_bits_equal(checkpoint.load(directory, adapters), adapters)


@pytest.mark.parametrize(
  'like', [shapes('o_proj', rank=2), shapes('q_proj'), shapes('o_proj,fc2'), shapes('all')]
)
def test_another_adapter_than_expected_is_refused(tmp_path, like):
  checkpoint.save(tmp_path / 'cell.adapter', tiny_model.trained_adapters('o_proj'))
  with pytest.raises(UserError, match='holds another adapter than expected') as error:
    checkpoint.load(tmp_path / 'cell.adapter', like)
  assert '\n' not in str(error.value)
  assert 'cell.adapter' in str(error.value)


def test_nothing_there_is_named(tmp_path):
  with pytest.raises(UserError, match='no adapter in') as error:
    checkpoint.load(tmp_path / 'missing.adapter', shapes('o_proj'))
  assert 'missing.adapter' in str(error.value)


def test_a_directory_that_holds_no_adapter_is_refused(tmp_path):
  (tmp_path / 'cell.adapter').mkdir()
  with pytest.raises(UserError) as error:
    checkpoint.load(tmp_path / 'cell.adapter', shapes('o_proj'))
  assert '\n' not in str(error.value)

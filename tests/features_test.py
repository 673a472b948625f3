"""data/features.py: what was written is read, and what is damaged is not."""

import concurrent.futures

import ml_dtypes
import numpy as np
import pytest
import seeing

from lora_jax.data.features import FeatureFiles
from lora_jax.errors import UserError

WIDTH = 24


def pictures(count=2):
  sizes = [*seeing.SIZES]
  return [
    seeing.EYES.picture(seeing.encoded(*sizes[i], seed=i), f'shown row {i}') for i in range(count)
  ]


def values(picture, dtype=np.float32):
  rng = np.random.default_rng(picture.embeddings)
  return rng.normal(size=(picture.embeddings, WIDTH)).astype(dtype)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_a_round_trip_changes_nothing(tmp_path, dtype):
  files = FeatureFiles(tmp_path / 'not' / 'there', WIDTH, dtype)
  one, other = pictures()
  assert files.read(one) is None
  files.write(one, values(one, dtype))
  files.write(other, values(other, dtype))
  again = FeatureFiles(tmp_path / 'not' / 'there', WIDTH, dtype)
  for picture in (one, other):
    read = again.read(picture)
    assert read is not None
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values(picture, dtype))
  both = again.of([other, one, other])
  expected = [values(picture, dtype) for picture in (other, one, other)]
  np.testing.assert_array_equal(both, np.concatenate(expected))
  assert again.of([]).shape == (0, WIDTH)
  assert {path.suffix for path in tmp_path.rglob('*') if path.is_file()} == {'.npz'}


def damaged(data, how):
  if how == 'empty':
    return b''
  if how == 'short':
    return data[: len(data) // 2]
  if how == 'text':
    return b'not what it was'
  changed = bytearray(data)
  changed[len(data) // 2] ^= 1
  return bytes(changed)


@pytest.mark.parametrize('how', ['empty', 'short', 'text', 'one bit'])
def test_a_damaged_file_is_no_file(tmp_path, how):
  files, (one, *_) = FeatureFiles(tmp_path, WIDTH, np.float32), pictures()
  files.write(one, values(one))
  (file,) = tmp_path.rglob('*.npz')
  file.write_bytes(damaged(file.read_bytes(), how))
  assert files.read(one) is None
  with pytest.raises(UserError, match=f'{one.key}.npz: the features of shown row 0 are gone'):
    files.of([one])
  files.write(one, values(one))
  np.testing.assert_array_equal(files.read(one), values(one))


def test_whatever_bit_of_its_directory_is_wrong_a_file_is_none_or_the_same(tmp_path):
  files, (one, *_) = FeatureFiles(tmp_path, WIDTH, np.float32), pictures()
  files.write(one, values(one))
  (file,) = tmp_path.rglob('*.npz')
  whole = file.read_bytes()
  directory = whole.index(values(one).tobytes()) + values(one).nbytes
  for place in range(directory, len(whole)):
    for bit in range(8):
      changed = bytearray(whole)
      changed[place] ^= 1 << bit
      file.write_bytes(changed)
      read = files.read(one)
      assert read is None or np.array_equal(read, values(one)), (place, bit)


@pytest.mark.parametrize('kind', ['array', 'pickle', 'directory'])
def test_a_file_of_another_kind_is_no_file(tmp_path, kind):
  files, (one, *_) = FeatureFiles(tmp_path, WIDTH, np.float32), pictures()
  files.write(one, values(one))
  (file,) = tmp_path.rglob('*.npz')
  file.unlink()
  if kind == 'directory':
    file.mkdir()
  else:
    with file.open('wb') as stream:
      held = values(one) if kind == 'array' else np.asarray([None])
      np.save(stream, held, allow_pickle=kind == 'pickle')
  assert files.read(one) is None


def test_features_of_another_shape_are_not_these(tmp_path):
  one, _ = pictures()
  FeatureFiles(tmp_path, WIDTH, np.float32).write(one, values(one)[:-1])
  assert FeatureFiles(tmp_path, WIDTH, np.float32).read(one) is None


def test_many_may_write_at_once(tmp_path):
  files, (one, *_) = FeatureFiles(tmp_path, WIDTH, np.float32), pictures()
  write = lambda _: files.write(one, values(one))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(write, range(40)))
  np.testing.assert_array_equal(files.read(one), values(one))
  assert len([path for path in tmp_path.rglob('*') if path.is_file()]) == 1

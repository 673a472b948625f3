import errno

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from lora_jax.errors import UserError
from lora_jax.hub import bases, snapshot

COMMIT = '0123456789abcdef0123456789abcdef01234567'


def raised(kind, *args):
  """An error as the hub's package raises it, without the response that it wants."""
  error = kind.__new__(kind)
  Exception.__init__(error, *args)
  return error


@pytest.fixture
def offline(monkeypatch, tmp_path):
  """The real package without a network, and an empty cache."""
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  return tmp_path


def test_offline_without_a_cache_says_so(offline):
  with pytest.raises(UserError, match='a/b: the hub cannot be reached and the cache') as error:
    snapshot.fetch('a/b')
  assert '\n' not in str(error.value)


def test_offline_the_cache_is_used(offline):
  cached = offline / 'models--a--b'
  (cached / 'refs').mkdir(parents=True)
  (cached / 'refs' / 'main').write_text(COMMIT)
  (cached / 'snapshots' / COMMIT).mkdir(parents=True)
  assert snapshot.fetch('a/b') == cached / 'snapshots' / COMMIT


def test_only_data_is_fetched(monkeypatch, tmp_path):
  files = ['config.json', 'model-1.safetensors', 'chat_template.jinja', 'README.md']
  files += ['additional_chat_templates/default.jinja', 'tokenizer.json']
  others = ['pytorch_model.bin', 'modeling.py', 'consolidated.safetensors', 'tokenizer.model']
  others += ['original/params.json', 'training_args.pt', 'model.gguf']
  asked = {}

  def download(hub_id, **options):
    asked.update(options, hub_id=hub_id)
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  assert snapshot.fetch('a/b') == tmp_path
  patterns = {name: asked[name] for name in ('allow_patterns', 'ignore_patterns')}
  kept = huggingface_hub.utils.filter_repo_objects(files + others, **patterns)
  assert list(kept) == files


@pytest.mark.parametrize(
  ('error', 'message'),
  [
    (raised(errors.GatedRepoError, '403\nask'), r'is gated; accept its terms at https.*/a/b and'),
    (raised(errors.RepositoryNotFoundError, '404'), 'no such model and there is no such directory'),
    (raised(errors.LocalEntryNotFoundError, 'x'), 'cannot be reached'),
    (raised(errors.HfHubHTTPError, '500\nServer'), r'failed \(HfHubHTTPError: 500 Server\)'),
    (RuntimeError('proxy'), r'the download failed \(RuntimeError: proxy\); run again'),
  ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, error, message):
  def download(hub_id, **options):
    raise error

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  with pytest.raises(UserError, match=message) as found:
    snapshot.fetch('a/b')
  assert '\n' not in str(found.value)
  assert str(found.value).startswith('a/b: ')


def test_a_full_disk_is_said_as_everywhere(monkeypatch):
  def download(hub_id, **options):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  with pytest.raises(OSError, match='No space left'):
    snapshot.fetch('a/b')


def test_a_missing_package_shows_before_anything_else(monkeypatch):
  monkeypatch.setattr(snapshot.importlib.util, 'find_spec', lambda name: None)
  for call in (bases.check_name, snapshot.fetch):
    with pytest.raises(UserError, match=r'a/b: .* needs huggingface_hub; pip install'):
      call('a/b')


@pytest.mark.parametrize('name', ['a/b', 'HuggingFaceTB/SmolLM2-360M-Instruct', 'a.b/c_d-1.5'])
def test_hub_ids(name):
  assert snapshot.is_hub_id(name)
  bases.check_name(name)


@pytest.mark.parametrize(
  'name', ['a', 'a/b/c', './a', '/a/b', '~/a', 'a/', '../a/b', 'a b/c', 'a/..']
)
def test_other_names_are_no_hub_ids(name):
  assert not snapshot.is_hub_id(name)

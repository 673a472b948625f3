"""A model's files from the Hugging Face hub, in the cache that its other tools share.

    directory = snapshot.fetch('HuggingFaceTB/SmolLM2-360M-Instruct')

Only configuration, tokenizer, templates and safetensors are fetched: nothing that could
run code when it is opened. Without a network, what the cache has is used.
"""

import importlib.util
import re
from pathlib import Path

from lora_jax.errors import UserError, one_line

_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')
_WANTED = ['*.json', '*.safetensors', '*.jinja', 'README.md']
# The same weights in other layouts.
_UNWANTED = ['original/*', 'consolidated*', 'onnx/*']


def is_hub_id(name: str) -> bool:
  """Whether `name` has the form owner/name."""
  return _ID.fullmatch(name) is not None


def check_installed(hub_id: str) -> None:
  """Raises `UserError` where the package that talks to the hub is missing."""
  if importlib.util.find_spec('huggingface_hub') is None:
    raise UserError(
      f'{hub_id}: is no directory here, and fetching it from the hub needs huggingface_hub; '
      'pip install -e .[hub], or give the directory of a model'
    )


def fetch(hub_id: str) -> Path:
  """The directory that holds the model's files, fetched where the cache lacks them.

  Raises:
    UserError: there is no such model, it is gated, or the hub cannot be reached and
      the cache does not hold it.
  """
  check_installed(hub_id)
  import huggingface_hub
  from huggingface_hub import errors

  page = f'https://huggingface.co/{hub_id}'
  try:
    return Path(
      huggingface_hub.snapshot_download(
        hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, library_name='lora_jax'
      )
    )
  except errors.GatedRepoError as error:
    raise UserError(
      f'{hub_id}: is gated; accept its terms at {page} and log in with `hf auth login`'
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise UserError(
      f'{hub_id}: the hub has no such model and there is no such directory; check the name, or '
      'log in with `hf auth login` if it is private'
    ) from error
  except errors.LocalEntryNotFoundError as error:
    raise UserError(
      f'{hub_id}: the hub cannot be reached and the cache does not hold it; connect to the '
      'network, or give the directory of a model'
    ) from error
  # Whatever else its network library raises; a full disk is said as everywhere.
  except Exception as error:
    if isinstance(error, OSError) and error.errno:
      raise
    raise UserError(
      f'{hub_id}: the download failed ({type(error).__name__}: {one_line(error):.200}); '
      'run again, or give the directory of a model'
    ) from error

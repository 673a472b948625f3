"""Adapters on disk, through orbax."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lora_jax.errors import UserError


def save(directory: Path, adapters: Mapping[str, Any]) -> None:
  """Writes an adapter tree; the directory appears whole or not at all.

  An adapter that is already there, from a cell that was stopped before its record
  was written, is replaced.
  """
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory.absolute(), adapters, force=True)


def load(directory: Path, like: Mapping[str, Any]) -> Any:
  """Reads an adapter tree.

  Args:
    directory: as it was saved.
    like: the tree expected, or its shapes; `lora.init` under `jax.eval_shape`.

  Raises:
    UserError: there is no adapter, or it has other modules or shapes.
  """
  with ocp.StandardCheckpointer() as checkpointer:
    try:
      return checkpointer.restore(directory.absolute(), jax.eval_shape(lambda: like))
    except FileNotFoundError as error:
      raise UserError(
        f'no adapter in {directory}; give the .adapter directory of a finished cell'
      ) from error
    except (ValueError, KeyError) as error:
      reason = str(error).splitlines()[0]
      raise UserError(f'{directory} holds another adapter than expected: {reason}') from error

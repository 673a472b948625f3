"""JSON files that lie beside a checkpoint's weights."""

import json
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError, one_line


def read_object(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
  """The object in a JSON file, or `missing` where there is no file and that is given.

  Raises:
    UserError: there is no file, or it holds no JSON object.
  """
  if missing is not None and not path.is_file():
    return missing
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise UserError(f'{path}: is not readable JSON ({one_line(error)}); fetch it again') from error
  if not isinstance(value, dict):
    raise UserError(f'{path}: holds no JSON object; fetch it again')
  return value

"""Checks that one raw record is a row of a task, and says where it is not."""

import json
import math
from collections.abc import Mapping
from typing import Any

from lora_jax.data.task import Task
from lora_jax.errors import UserError

_INT64 = range(-(2**63), 2**63)


def _is_text(value: Any) -> bool:
  if not isinstance(value, str):
    return False
  try:
    value.encode()
  except UnicodeEncodeError:  # JSON may spell half of a surrogate pair
    return False
  return True


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value in _INT64


def _is_float(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_json(value: Any) -> bool:
  try:
    return _is_text(json.dumps(value, ensure_ascii=False))
  except (TypeError, ValueError):
    return False


_KINDS = {
  'text': (_is_text, 'text'),
  'int': (_is_int, 'a whole number'),
  'float': (_is_float, 'a finite number'),
  'json': (_is_json, 'a plain JSON value'),
  'image': (lambda value: isinstance(value, bytes), 'an image'),
}


def parse_line(line: bytes, where: str) -> Any:
  """The JSON value of one line of a file.

  Raises:
    UserError: it is not UTF-8, or not JSON.
  """
  try:
    return json.loads(line.decode('utf-8-sig'))
  except UnicodeDecodeError:
    raise UserError(f'{where}: not UTF-8 text; save the file as UTF-8') from None
  except (ValueError, RecursionError) as error:
    raise UserError(f'{where}: not valid JSON ({error}); one object a line') from None


def check_row(task: Task, record: Any, where: str) -> dict[str, Any]:
  """A row with exactly the task's fields; an absent optional field is None.

  Args:
    task: whose `features` and `required` the record must satisfy.
    record: the decoded record; images are bytes already. Other fields are dropped.
    where: file and line, or dataset and index, for the error.

  Returns:
    The fields of `task.features` and `id` (None where the record has none).

  Raises:
    UserError: a required field is missing or null, a field has the wrong type, or
      the task cannot pose a prompt and a target from what the fields hold.
  """
  if not isinstance(record, Mapping):
    raise UserError(f'{where}: expected a JSON object, found {type(record).__name__}')
  row: dict[str, Any] = {}
  for field, kind in task.features.items():
    if field == 'id':
      continue
    value = record.get(field)
    if value is None:
      if field in task.required:
        what = 'is null' if field in record else 'is missing'
        raise UserError(
          f'{where}: field {field!r} {what}; {task.name} needs {", ".join(task.required)}'
        )
    else:
      accepts, wanted = _KINDS[kind]
      if not accepts(value):
        raise UserError(f'{where}: field {field!r} must be {wanted}, found {_shown(value)}')
    row[field] = value
  row['id'] = _row_id(record.get('id'), where)
  _check_content(task, row, where)
  return row


def _row_id(value: Any, where: str) -> str | None:
  if value is None or _is_text(value):
    return value
  if _is_int(value):
    return str(value)
  raise UserError(f"{where}: field 'id' must be text, found {_shown(value)}")


def _check_content(task: Task, row: Mapping[str, Any], where: str) -> None:
  # A task reads its fields only here and in training; a row it cannot read must fail now.
  try:
    task.prompt(row)
    target = task.target(row)
  except UserError as error:
    raise UserError(f'{where}: {error}') from error
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
    text = ' '.join(f'{type(error).__name__} {error}'.split())
    raise UserError(f'{where}: {task.name} cannot read this row: {text}') from error
  if not target.strip():
    raise UserError(f'{where}: the row has an empty answer; remove it or fill it in')


def _shown(value: Any) -> str:
  text = ' '.join(repr(value).split())
  return f'{type(value).__name__} {text if len(text) <= 40 else text[:37] + "..."}'

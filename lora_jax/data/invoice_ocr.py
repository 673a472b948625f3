"""Invoice OCR (mychen76/invoices-and-receipts_ocr_v1): the fields of a receipt as JSON.

Posed on the words that an OCR engine read, or to a base that sees on the image, without
them; otherwise a row's image is optional. In the published rows the JSON inside
`parsed_data` and `raw_data` is in places a Python literal; both forms are accepted, by
parsing and never by evaluation.
"""

import ast
import json
from typing import Any

from lora_jax.data import synthetic_receipts
from lora_jax.data.json_score import compact, leaf_f1, leaves, parse_object, tree_similarity
from lora_jax.data.task import Example, Prompt, Task
from lora_jax.errors import UserError

_HOW = 'Copy the values as printed. Answer with the JSON object only.'
_EXACT = 'A field counts when its text is exactly equal.'


def _bad_field(example: Example, field: str, what: str) -> UserError:
  row = example.get('id') or '(without id)'
  return UserError(
    f'invoice_ocr: row {row}: field {field!r} {what}; give JSON, or a Python literal of the same'
  )


def _decode(value: Any, example: Example, field: str) -> Any:
  """The plain value behind `value`: itself, or what its JSON or Python literal text says."""
  if not isinstance(value, str):
    return value
  try:
    return json.loads(value)
  except (ValueError, RecursionError):
    pass
  try:
    # The way through JSON turns tuples into lists and refuses what JSON cannot hold.
    return json.loads(json.dumps(ast.literal_eval(value.strip())))
  except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
    raise _bad_field(example, field, f'cannot be read: {value[:40]!r}') from None


def fields(example: Example) -> dict[str, Any]:
  """The true fields of the receipt: the object inside the row's `parsed_data`.

  Raises:
    UserError: it cannot be read, is not an object, or is empty.
  """
  parsed = _decode(example['parsed_data'], example, 'parsed_data')
  if isinstance(parsed, dict) and 'json' in parsed:
    parsed = _decode(parsed['json'], example, 'parsed_data')
  if not isinstance(parsed, dict) or not parsed:
    raise _bad_field(example, 'parsed_data', "holds no object of fields under 'json'")
  return parsed


def words(example: Example) -> list[str]:
  """The OCR words of the row's `raw_data`, in the order given.

  Taken from 'ocr_words', or from 'ocr_boxes' of the form [polygon, [text, confidence]].

  Raises:
    UserError: neither is there or one cannot be read.
  """
  raw = _decode(example['raw_data'], example, 'raw_data')
  if not isinstance(raw, dict):
    raise _bad_field(example, 'raw_data', "holds no object with 'ocr_words'")
  found = _decode(raw.get('ocr_words') or [], example, 'raw_data')
  if not found:
    boxes = _decode(raw.get('ocr_boxes') or [], example, 'raw_data')
    try:
      found = [text for _, (text, _) in boxes]
    except (TypeError, ValueError):
      found = []
  if not isinstance(found, list) or not found:
    raise _bad_field(example, 'raw_data', "holds no words under 'ocr_words' or 'ocr_boxes'")
  return [str(word) for word in found]


def key_paths(gold: dict[str, Any]) -> list[str]:
  """The paths that the row's JSON has, such as 'items[].price', each once; no values."""
  return list(dict.fromkeys(path for path, _ in leaves(gold)))


def _form(example: Example) -> str:
  """What is asked for; the same whatever it is asked of."""
  gold = fields(example)
  nested = any(isinstance(value, dict | list) for value in gold.values())
  keys = ', '.join(key_paths(gold))
  form = f'one JSON object with the {"fields" if nested else "keys"} {keys}'
  if nested:
    form += ' (a dot goes into an object, [] is a list)'
  return form


def _prompt(example: Example) -> Prompt:
  return Prompt(
    before=f'Below are the words read from a receipt. Extract {_form(example)}.\n\nWords:\n',
    document='\n'.join(words(example)),
    after=f'\n\n{_HOW}',
  )


def _by_image(example: Example) -> Prompt:
  return Prompt(
    before=f'The image shows a receipt. Extract {_form(example)}. {_HOW}',
    images=(example['image'],),
  )


def _target(example: Example) -> str:
  return compact(fields(example))


def _score(prediction: str, example: Example) -> dict[str, float]:
  gold, predicted = fields(example), parse_object(prediction)
  if predicted is None:
    return dict.fromkeys(('entity_f1', 'tree_edit', 'valid_json'), 0.0)
  return {
    'entity_f1': leaf_f1(predicted, gold),
    'tree_edit': tree_similarity(predicted, gold),
    'valid_json': 1.0,
  }


TASK = Task(
  name='invoice_ocr',
  title='Invoice OCR',
  hub_id='mychen76/invoices-and-receipts_ocr_v1',
  features={'id': 'text', 'image': 'image', 'parsed_data': 'text', 'raw_data': 'text'},
  required=('parsed_data', 'raw_data'),
  prompt=_prompt,
  target=_target,
  score=_score,
  headline='entity_f1',
  synthetic=synthetic_receipts.rows,
  max_new_tokens=160,
  note=f'Runs on the OCR words of each receipt, without its image. {_EXACT}',
  by_image=_by_image,
  note_by_image=f'Posed by image, without the OCR words. {_EXACT}',
)

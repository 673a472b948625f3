"""CoCoHD (congressional hearings): a long transcript into one JSON record.

The task as posed here is compact, since a small base on a CPU writes few tokens:
eight keys, members as 'Name, State', witnesses by name, each list cut to its first
entries. The full record stays in the row's `details`.
"""

import json
import re
from typing import Any

from lora_jax.data import synthetic_hearings
from lora_jax.data.json_score import compact, multiset_f1, normalise, parse_object, scalar_text
from lora_jax.data.task import Example, Prompt, Task
from lora_jax.errors import UserError

_SCALARS = ('title', 'committee', 'chamber', 'congress_session', 'held_date', 'serial_no')
_LISTS = ('members', 'witnesses')
MAX_MEMBERS = 8
MAX_WITNESSES = 6

_INSTRUCTION = f"""\
Below is the start of the printed record of a congressional hearing. Describe it as one JSON \
object with the keys title, committee, chamber, congress_session (a number), held_date, \
serial_no (null if there is none), members (the first {MAX_MEMBERS}, each as "Name, State") and \
witnesses (the names of the first {MAX_WITNESSES}).

Record:
"""

_RULE = re.compile(r'^[\s\-_=*.]*$')
_LEADER = re.compile(r'(?:\. ?){4,}')


def record(example: Example) -> dict[str, Any]:
  """The JSON object to write, keys in their fixed order, from the row's `details`.

  `details` is CoCoHD's object or its JSON text; an entry of a list is a string or an
  object with 'name' (and 'state' for a member). A field that is not there is null or [].

  Raises:
    UserError: `details` is not such an object.
  """
  details = example['details']
  if isinstance(details, str):
    try:
      details = json.loads(details)
    except (ValueError, RecursionError) as error:
      raise _bad_details(example, f'is not valid JSON ({error})') from None
  if not isinstance(details, dict):
    raise _bad_details(example, f'is a {type(details).__name__}, not an object')
  for key in _LISTS:
    if not isinstance(details.get(key) or [], list):
      raise _bad_details(example, f'has {key!r} that is not a list')
  result: dict[str, Any] = {key: details.get(key) for key in _SCALARS}
  members, witnesses = (details.get(key) or [] for key in _LISTS)
  result['members'] = [_member(entry) for entry in members[:MAX_MEMBERS]]
  result['witnesses'] = [_witness(entry) for entry in witnesses[:MAX_WITNESSES]]
  return result


def _bad_details(example: Example, what: str) -> UserError:
  row = example.get('id') or '(without id)'
  return UserError(
    f"cocohd: row {row}: field 'details' {what}; give CoCoHD's hearing details as a JSON object"
  )


def _member(entry: Any) -> str:
  if isinstance(entry, dict):
    return ', '.join(str(entry[key]) for key in ('name', 'state') if entry.get(key))
  return scalar_text(entry)


def _witness(entry: Any) -> str:
  return str(entry.get('name') or '') if isinstance(entry, dict) else scalar_text(entry)


def tidy(transcript: str) -> str:
  """The transcript without the page layout: rules, blank lines, indents and dot leaders.

  Two spaces stay between columns. On printed records the first members and the
  witnesses then stand in half as many characters, so within a smaller token budget.
  """
  lines = []
  for line in transcript.splitlines():
    if not _RULE.match(line):
      line = re.sub(r'\s{2,}', '  ', line.strip())
      lines.append(_LEADER.sub('.. ', line))
  return '\n'.join(lines)


def _prompt(example: Example) -> Prompt:
  return Prompt(
    before=_INSTRUCTION,
    document=tidy(example['transcript']),
    after='\n\nAnswer with the JSON object only.',
  )


def _target(example: Example) -> str:
  return compact(record(example))


def _list_f1(predicted: dict[str, Any], gold: dict[str, Any], key: str) -> float:
  entries = predicted.get(key)
  if not isinstance(entries, list):
    return 0.0
  text = _member if key == 'members' else _witness
  return multiset_f1(
    [normalise(text(entry)) for entry in entries], [normalise(text(entry)) for entry in gold[key]]
  )


def _score(prediction: str, example: Example) -> dict[str, float]:
  gold, predicted = record(example), parse_object(prediction)
  if predicted is None:
    return dict.fromkeys(('field_score', 'valid_json', 'member_f1', 'witness_f1'), 0.0)
  # A key that is missing is wrong even where the truth is null: `{}` must earn nothing.
  matches = [
    float(
      key in predicted
      and normalise(scalar_text(predicted[key])) == normalise(scalar_text(gold[key]))
    )
    for key in _SCALARS
  ]
  member_f1, witness_f1 = (_list_f1(predicted, gold, key) for key in _LISTS)
  return {
    'field_score': (sum(matches) + member_f1 + witness_f1) / (len(_SCALARS) + len(_LISTS)),
    'valid_json': 1.0,
    'member_f1': member_f1,
    'witness_f1': witness_f1,
  }


TASK = Task(
  name='cocohd',
  title='CoCoHD',
  hub_id='gtfintechlab/CoCoHD_transcripts',
  features={'id': 'text', 'transcript': 'text', 'details': 'json'},
  required=('transcript', 'details'),
  prompt=_prompt,
  target=_target,
  score=_score,
  headline='field_score',
  synthetic=synthetic_hearings.rows,
  max_new_tokens=320,
  note=(
    f'The record is cut to eight fields, the first {MAX_MEMBERS} members (name and state) and '
    f'the names of the first {MAX_WITNESSES} witnesses, and is read from the start of the '
    'transcript, without its page layout, as far as the token budget goes. Fields count when '
    'equal up to case and punctuation, lists by F1; invalid JSON scores 0.'
  ),
)

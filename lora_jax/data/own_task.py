"""A user's own conversations as a task: the last answer is predicted and scored by a metric.

conversations = read(Path('my.jsonl'))
task = make(conversations, 'exact_match')
examples = [example(row) for row in conversations]
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax.data import json_score, rouge
from lora_jax.data.messages import Conversation
from lora_jax.data.numbers import Quantity, read_quantity, same_quantity
from lora_jax.data.task import Example, Prompt, Task
from lora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Metric:
  """How a prediction is compared with the answer of the row.

  Attributes:
    score: (prediction, answer) -> named scores in 0..1.
    headline: the first of them.
    refuses: what is wrong with an answer that cannot be compared with, or ''.
  """

  score: Callable[[str, str], dict[str, float]]
  headline: str
  refuses: Callable[[str], str] = lambda answer: ''


def _exact(prediction: str, answer: str) -> dict[str, float]:
  words = json_score.normalise
  return {
    'exact_match': float(prediction.strip() == answer.strip()),
    'same_words': float(words(prediction) == words(answer)),
  }


def _fields(prediction: str, answer: str) -> dict[str, float]:
  said, gold = json_score.parse_object(prediction), json_score.parse_object(answer)
  if said is None:
    return dict.fromkeys(('field_f1', 'tree_edit', 'valid_json'), 0.0)
  return {
    'field_f1': json_score.leaf_f1(said, gold),
    'tree_edit': json_score.tree_similarity(said, gold),
    'valid_json': 1.0,
  }


def _no_object(answer: str) -> str:
  return 'holds no JSON object' if json_score.parse_object(answer) is None else ''


def _no_words(answer: str) -> str:
  # The package counts these alone, so that any other script scores 0 even against itself.
  return '' if re.search('[a-z0-9]', answer.lower()) else 'holds no Latin letter or digit'


def _amount(text: str) -> Quantity | None:
  """What the last line gives, where a chain of thought would put its answer, or the text."""
  last = (text.strip().splitlines() or [''])[-1]
  return read_quantity(last) or read_quantity(text)


def _numeric(prediction: str, answer: str) -> dict[str, float]:
  said, reference = _amount(prediction), _amount(answer)
  right = said is not None and reference is not None and same_quantity(said, reference)
  return {'accuracy': float(right), 'answered': float(said is not None)}


METRICS: dict[str, Metric] = {
  'exact_match': Metric(_exact, 'exact_match'),
  'choice': Metric(lambda said, answer: {'accuracy': float(said == answer.strip())}, 'accuracy'),
  'rouge': Metric(rouge.rouge, 'rouge_lsum', _no_words),
  'json_fields': Metric(_fields, 'field_f1', _no_object),
  'numeric': Metric(_numeric, 'accuracy', lambda a: '' if _amount(a) else 'holds no number'),
}


def make(conversations: Sequence[Conversation], metric: str, choices: Sequence[str] = ()) -> Task:
  """The task of predicting the last answers.

  Args:
    conversations: the rows, whose answers are checked against the metric.
    metric: a name of `METRICS`.
    choices: for 'choice': the answers compared by likelihood, where a row has none itself.

  Raises:
    UserError: an answer cannot be scored by the metric.
  """
  scorer = METRICS[metric]
  for row in conversations:
    wrong = scorer.refuses(row.answer)
    if wrong:
      raise UserError(f'{row.where}: the answer {wrong}, which --metric={metric} compares with')
    if metric == 'choice':
      _check_choices(row, row.choices or tuple(choices))
  return Task(
    name='own',
    title='Own rows',
    hub_id='',
    features={'id': 'text', 'messages': 'json', 'choices': 'json'},
    required=('messages',),
    prompt=_prompt,
    target=lambda example: example['messages'][-1]['content'],
    score=lambda said, example: scorer.score(said, example['messages'][-1]['content']),
    headline=scorer.headline,
    synthetic=_none_to_generate,
    max_new_tokens=2**20,
    choices=(lambda example: tuple(example['choices'] or choices)) if metric == 'choice' else None,
  )


def example(row: Conversation) -> dict[str, Any]:
  """A conversation in the task's fields."""
  return {'id': row.id, 'messages': list(row.messages), 'choices': list(row.choices)}


def _prompt(example: Example) -> Prompt:
  *earlier, asked, _ = example['messages']
  return Prompt(before=asked['content'], history=tuple(earlier))


def _check_choices(row: Conversation, choices: Sequence[str]) -> None:
  if len(choices) < 2:
    raise UserError(
      f'{row.where}: no choices to compare; give --choices=A,B,C,D or a list "choices" in the row'
    )
  if row.answer.strip() not in choices:
    listed = json.dumps(list(choices), ensure_ascii=False)
    raise UserError(f'{row.where}: the answer {row.answer.strip()[:40]!r} is none of {listed}')


def _none_to_generate(seed: int, count: int) -> list[dict[str, Any]]:
  raise UserError('own rows are not generated; give a file of them')

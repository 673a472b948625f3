"""FinCoT: financial questions over a report, answered through a chain (Fino1, Qian et al. 2025).

Canonical fields: Question (context, then the question itself), Reasoning_process,
Final_response. Optional: answer (a number, a text or a list of texts) and scale
('percent', 'thousand', ...); without them the answer is read out of Final_response.
"""

import re

from lora_jax.data import synthetic_statements
from lora_jax.data.numbers import UNITS, Quantity, only_quantity, read_quantity, same_quantity
from lora_jax.data.task import Example, Prompt, Task

_MARKER = re.compile(r'answer\s*(?:is|:)\s*:?', re.IGNORECASE)
_SENTENCE_END = re.compile(r'(?<=[.!?])\s+|\n+')


def _split_question(text: str) -> tuple[str, str]:
  """(context, question) of a row's Question field."""
  text = re.sub(r'\s*Answer:\s*$', '', text)
  context, found, question = text.rpartition('\nQuestion:')
  if not found:
    context, _, question = text.rpartition('\n')
  _, found, rest = context.partition('Context:')
  return (rest if found else context).strip(), question.strip()


def _prompt(example: Example) -> Prompt:
  context, question = _split_question(example['Question'])
  return Prompt(
    before='Answer the financial question from the context. Reason step by step in a few '
    'sentences, and end with a line "The answer is ...".\n\n',
    document=f'Context: {context}' if context else '',
    after=f'\n\nQuestion: {question}',
  )


def _target(example: Example) -> str:
  _scale(example)
  reasoning = example['Reasoning_process'].strip()
  final = example['Final_response'].strip().rstrip('.')
  if not final:
    raise ValueError('Final_response is empty')
  if not _MARKER.search(final):
    final = f'The answer is {final}'
  return f'{reasoning}\n{final}.' if reasoning else f'{final}.'


def _said(text: str) -> str | None:
  """What a text gives as its answer: the rest of the line after the last marker, if any."""
  *before, last = _MARKER.split(text.replace('*', ''))
  lines = last.strip().splitlines() or ['']
  return lines[0].strip() if before else None


def _number(text: str) -> Quantity | None:
  """The amount that a text gives as its answer.

  Without a marker it is that of the last sentence, so that a base that never saw the form is
  not wrong for the form alone; but of a sentence with several, as a chain that was never
  brought to an end has, it is none.
  """
  said = _said(text)
  if said is not None:
    return read_quantity(said)
  *_, last = _SENTENCE_END.split(text.replace('*', '').strip())
  return only_quantity(last)


def _scale(example: Example) -> str:
  scale = (example.get('scale') or '').strip().lower()
  if scale not in UNITS:
    raise ValueError(f'scale is {scale!r}, not one of {", ".join(filter(None, UNITS))}')
  return scale


def _reference(example: Example) -> Quantity | str:
  answer, scale = example.get('answer'), _scale(example)
  if answer is None:
    said = _said(_target(example)) or ''
    return read_quantity(said) or said
  texts = [str(item) for item in (answer if isinstance(answer, list) else [answer])]
  if len(texts) == 1:
    quantity = read_quantity(texts[0], whole=True)
    if quantity is not None:
      return quantity if quantity.unit else Quantity(quantity.value, scale)
  return ', '.join(texts)


def _plain(text: str) -> str:
  text = re.sub(r'(?<=\d),(?=\d)', '', text.lower())
  words = re.sub(r'[^\w.%\s-]|\.(?!\d)', ' ', text).split()
  return ' '.join(word for word in words if word not in ('a', 'an', 'the'))


def _score(prediction: str, example: Example) -> dict[str, float]:
  said, reference = _said(prediction), _reference(example)
  if isinstance(reference, str):
    right = said is not None and _plain(said) == _plain(reference)
  else:
    number = _number(prediction)
    right = number is not None and same_quantity(number, reference)
  return {'accuracy': float(right), 'answered': float(said is not None)}


TASK = Task(
  name='fincot',
  title='FinCoT',
  hub_id='TheFinAI/FinCoT',
  features={
    'id': 'text',
    'Question': 'text',
    'Reasoning_process': 'text',
    'Final_response': 'text',
    'answer': 'json',
    'scale': 'text',
  },
  required=('Question', 'Reasoning_process', 'Final_response'),
  prompt=_prompt,
  target=_target,
  score=_score,
  headline='accuracy',
  synthetic=synthetic_statements.rows,
  max_new_tokens=160,
  note=(
    'A number counts when it equals the reference to the precision of the coarser of the two '
    'and within 1 %, with its unit; an answer in words counts when equal up to case, '
    'punctuation and articles. A generation without "the answer is" still counts where its '
    'last sentence gives one number, years aside.'
  ),
)

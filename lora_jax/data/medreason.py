"""MedReason: medical questions answered through a chain of knowledge-graph paths (Wu et al. 2025).

Canonical fields: question, options, reasoning, answer. The answer of a multiple-choice
row may carry an "Explanation: ..." tail, which is not part of what is to be said. The
completion follows the paper's training template: thinking, then the final answer.
"""

import re

from lora_jax.data import synthetic_medicine
from lora_jax.data.task import Example, Prompt, Task

_OPTION = re.compile(r'^\s*\(?([A-J])[.):]\s*(.+?)\s*$', re.MULTILINE)
_FINAL = re.compile(r'#*\s*final answer[ \t:*#]*', re.IGNORECASE)
_HEADING = re.compile(r'\W*thinking\W*', re.IGNORECASE)
_LETTER = re.compile(r'\W*([A-J])(?:[.):]|\W*$)')


def _options(example: Example) -> dict[str, str]:
  return dict(_OPTION.findall(example['options'] or ''))


def _answer(example: Example) -> tuple[str, str]:
  """The right option's letter ('' where there are no options) and its text."""
  text = re.split(r'\.?\s*Explanation:', example['answer'], maxsplit=1)[0].strip()
  options = _options(example)
  # Texts before letters: blood groups are called A and B, and stand at any letter.
  for form in ('{text}', '{letter}. {text}', '{letter}'):
    for letter, option in options.items():
      if _plain(text) == _plain(form.format(letter=letter, text=option)):
        return letter, option
  return '', text


def _plain(text: str) -> str:
  return ' '.join(re.sub(r'[^\w%+./-]+', ' ', text.lower()).split()).rstrip('.')


def _prompt(example: Example) -> Prompt:
  options = '\n'.join(f'{letter}. {text}' for letter, text in _options(example).items())
  form = 'the letter and text of the best option' if options else 'a short answer'
  return Prompt(
    before='Think about the medical question step by step under "## Thinking", then give '
    f'{form} under "## Final Answer".\n\n',
    after=f'Question: {example["question"].strip()}\n{options}'.rstrip(),
  )


def _target(example: Example) -> str:
  letter, text = _answer(example)
  if not text:
    raise ValueError('answer is empty')
  answer = f'{letter}. {text}' if letter else text
  return f'## Thinking\n\n{example["reasoning"].strip()}\n\n## Final Answer\n\n{answer}'


def _said(text: str) -> str:
  """The line under the last "Final Answer"; '' where there is none, or another heading."""
  *before, last = _FINAL.split(text)
  lines = last.strip().splitlines() if before else []
  return lines[0].strip() if lines and not _HEADING.fullmatch(lines[0]) else ''


def _score(prediction: str, example: Example) -> dict[str, float]:
  said = _said(prediction)
  if not said:
    return {'accuracy': 0.0, 'answered': 0.0}
  letter, text = _answer(example)
  spoken = _LETTER.match(said)
  if letter and spoken:
    others = [option for other, option in _options(example).items() if other != letter]
    # A letter decides, unless the text beside it is another option's.
    contradicted = _plain(said[spoken.end() :]) in map(_plain, others)
    right = spoken[1] == letter and not contradicted
  else:
    right = _plain(said) == _plain(text.splitlines()[0])
  return {'accuracy': float(right), 'answered': 1.0}


TASK = Task(
  name='medreason',
  title='MedReason',
  hub_id='UCSC-VLAA/MedReason',
  features={
    'id': 'text',
    'question': 'text',
    'options': 'text',
    'reasoning': 'text',
    'answer': 'text',
  },
  required=('question', 'reasoning', 'answer'),
  prompt=_prompt,
  target=_target,
  score=_score,
  headline='accuracy',
  synthetic=synthetic_medicine.reasoning_rows,
  max_new_tokens=320,
  note=(
    'A generation without a "Final Answer" counts as wrong, and so does the right letter beside '
    "another option's text."
  ),
)

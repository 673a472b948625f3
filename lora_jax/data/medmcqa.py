"""MedMCQA: medical entrance-exam questions with four options (Pal et al. 2022).

Canonical fields: question, opa, opb, opc, opd, cop (0..3, the right option), exp,
subject_name. Rows of the published test split have cop = -1 and cannot be used.
"""

import re

from lora_jax.data import synthetic_medicine
from lora_jax.data.task import Example, Prompt, Task

LETTERS = ('A', 'B', 'C', 'D')


def _prompt(example: Example) -> Prompt:
  options = zip(LETTERS, ('opa', 'opb', 'opc', 'opd'), strict=True)
  listed = '\n'.join(f'{letter}. {example[field].strip()}' for letter, field in options)
  return Prompt(
    before='Answer the medical question with the letter of the best option: A, B, C or D.\n\n',
    after=f'Question: {example["question"].strip()}\n{listed}\nAnswer with one letter only.',
  )


def _target(example: Example) -> str:
  if not 0 <= example['cop'] < 4:
    raise ValueError(f'cop is {example["cop"]}, not the right option 0, 1, 2 or 3')
  return LETTERS[example['cop']]


def _score(prediction: str, example: Example) -> dict[str, float]:
  said = re.match(r'(?:the\s+)?(?:answer\s*(?:is)?\s*:?\s*)?\W*([A-D])\b', prediction.strip(), re.I)
  return {'accuracy': float(said is not None and said[1].upper() == _target(example))}


TASK = Task(
  name='medmcqa',
  title='MedMCQA',
  hub_id='openlifescienceai/medmcqa',
  features={
    'id': 'text',
    'question': 'text',
    'opa': 'text',
    'opb': 'text',
    'opc': 'text',
    'opd': 'text',
    'cop': 'int',
    'exp': 'text',
    'subject_name': 'text',
  },
  required=('question', 'opa', 'opb', 'opc', 'opd', 'cop'),
  prompt=_prompt,
  target=_target,
  score=_score,
  headline='accuracy',
  synthetic=synthetic_medicine.choice_rows,
  max_new_tokens=2,
  choices=lambda example: LETTERS,
  note='The answer is the likeliest of the four letters.',
)

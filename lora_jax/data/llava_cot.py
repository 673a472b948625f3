"""LLaVA-CoT: questions on an image, answered in four tagged stages (Xu et al. 2024).

Canonical fields: id, image, conversations ([{from: human|gpt, value}]); the first
human turn is the question and the gpt turn after it the completion.
"""

import dataclasses
import re

from lora_jax.data import synthetic_puzzles
from lora_jax.data.task import Example, Prompt, Task

TAGS = ('SUMMARY', 'CAPTION', 'REASONING', 'CONCLUSION')
_WELL_FORMED = re.compile(
  r'\s*' + r'\s*'.join(f'<{tag}>((?:(?!</?[A-Z]+>).)+)</{tag}>' for tag in TAGS) + r'\s*',
  re.DOTALL,
)
_CONCLUSION = re.compile(r'<CONCLUSION>(.*?)(?:</CONCLUSION>|$)', re.DOTALL)
_OPTION = re.compile(r'\(?\b([A-H])[).:]\s*(.+?)(?=\s*\(?\b[A-H][).:]\s|\s*$)', re.MULTILINE)
_LETTER = re.compile(r'\W*([A-H])(?:[).:]|\W*$)')


def _turn(example: Example, speaker: str) -> str:
  for turn in example['conversations']:
    if turn['from'] == speaker:
      return turn['value'].replace('<image>', '').strip()
  raise ValueError(f'conversations has no turn from {speaker!r}')


def _prompt(example: Example) -> Prompt:
  return Prompt(
    before='Look at the image and answer in four stages: <SUMMARY> how you will go about it '
    '</SUMMARY> <CAPTION> what the image shows </CAPTION> <REASONING> your reasoning '
    '</REASONING> <CONCLUSION> the answer alone </CONCLUSION>.\n\n',
    after=_turn(example, 'human'),
  )


def _by_image(example: Example) -> Prompt:
  return dataclasses.replace(_prompt(example), images=(example['image'],))


def _target(example: Example) -> str:
  target = _turn(example, 'gpt')
  if not _conclusion(target):
    raise ValueError('the gpt turn has no <CONCLUSION>')
  return target


def _conclusion(text: str) -> str:
  found = _CONCLUSION.findall(text)
  return found[-1].strip() if found else ''


def _plain(text: str) -> str:
  return ' '.join(re.sub(r'[^\w.%+-]+', ' ', text.lower()).split()).rstrip('.')


def _same(said: str, reference: str, options: dict[str, str]) -> bool:
  if not said:
    return False
  spoken, right = _LETTER.match(said), _LETTER.match(reference)
  if spoken and right:
    return spoken[1] == right[1]
  # A letter on one side and the option's text on the other are the same answer.
  texts = [
    options.get(match[1], text) if match and match.end() >= len(text.rstrip()) else text
    for text, match in ((said, spoken), (reference, right))
  ]
  return _plain(texts[0]) == _plain(texts[1])


def _score(prediction: str, example: Example) -> dict[str, float]:
  options = dict(_OPTION.findall(_turn(example, 'human')))
  right = _same(_conclusion(prediction), _conclusion(_target(example)), options)
  return {
    'accuracy': float(right),
    'well_formed': float(_WELL_FORMED.fullmatch(prediction) is not None),
  }


_NOTE = 'Accuracy is that of the conclusion; well_formed is the rate of answers in four tags.'

TASK = Task(
  name='llava_cot',
  title='LLaVA-CoT',
  hub_id='Xkev/LLaVA-CoT-100k',
  features={'id': 'text', 'image': 'image', 'conversations': 'json'},
  required=('image', 'conversations'),
  prompt=_prompt,
  target=_target,
  score=_score,
  headline='accuracy',
  synthetic=synthetic_puzzles.rows,
  max_new_tokens=320,
  needs_vision=True,
  note=_NOTE,
  by_image=_by_image,
  note_by_image=f'Posed by image. {_NOTE}',
)

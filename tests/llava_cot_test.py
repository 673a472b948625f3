"""LLaVA-CoT: conclusions, the four tags, and puzzles that can be solved from the picture."""

import io
import re

import pytest
from PIL import Image

from lora_jax.data import llava_cot

TASK = llava_cot.TASK
EXAMPLE = {
  'conversations': [
    {'from': 'human', 'value': '<image>\nWhich?\nOptions: (A) 5 (B) dark red (C) 4 (D) a b'},
    {
      'from': 'gpt',
      'value': '<SUMMARY> s </SUMMARY>\n\n<CAPTION> c </CAPTION>\n\n<REASONING> r </REASONING>'
      '\n\n<CONCLUSION> B </CONCLUSION>',
    },
  ]
}


@pytest.mark.parametrize(
  ('said', 'accuracy'),
  [
    ('<CONCLUSION> B </CONCLUSION>', 1),
    ('<CONCLUSION>(B) dark red</CONCLUSION>', 1),
    ('<CONCLUSION> Dark red. </CONCLUSION>', 1),
    ('<CONCLUSION> B', 1),
    ('<CONCLUSION> A </CONCLUSION>', 0),
    ('<CONCLUSION> 5 </CONCLUSION>', 0),
    ('<CONCLUSION></CONCLUSION>', 0),
    ('B', 0),
  ],
)
def test_conclusions(said, accuracy):
  assert TASK.score(said, EXAMPLE) == {'accuracy': accuracy, 'well_formed': 0}


def test_well_formed_needs_every_tag_once_and_in_order():
  target = TASK.target(EXAMPLE)
  assert TASK.score(target, EXAMPLE) == {'accuracy': 1, 'well_formed': 1}
  for spoiled in (
    target.replace('<CAPTION> c </CAPTION>', ''),
    target.replace('</REASONING>', ''),
    target.replace(' s ', '  <CAPTION> c </CAPTION> '),
    target + ' and more',
    target.replace('SUMMARY', 'CAPTION'),
  ):
    assert TASK.score(spoiled, EXAMPLE)['well_formed'] == 0


def test_the_image_token_is_not_part_of_the_question():
  assert '<image>' not in TASK.prompt(EXAMPLE).text()
  assert 'Which?' in TASK.prompt(EXAMPLE).text()


def test_open_answers_are_compared_as_text():
  turns = [{'from': 'human', 'value': 'Who?'}]
  turns.append({'from': 'gpt', 'value': '<CONCLUSION> A cat </CONCLUSION>'})
  example = {'conversations': turns}
  assert TASK.score('<CONCLUSION> a cat. </CONCLUSION>', example)['accuracy'] == 1
  assert TASK.score('<CONCLUSION> A dog </CONCLUSION>', example)['accuracy'] == 0


def test_puzzles_are_pictures_whose_caption_and_options_agree():
  rows = TASK.synthetic(1, 90)
  assert len({row['image'] for row in rows}) == len(rows)
  for row in rows:
    image = Image.open(io.BytesIO(row['image']))
    assert image.size == (192, 192)
    question = row['conversations'][0]['value']
    options = dict(re.findall(r'\((\w)\) ([^(]+?)(?= \(|$)', question))
    assert len(set(options.values())) == 4
    target = TASK.target(row)
    caption, reasoning = (
      re.findall(f'<{tag}> (.*?) </{tag}>', target)[0] for tag in ('CAPTION', 'REASONING')
    )
    letter = re.findall(r'<CONCLUSION> (\w) ', target)[0]
    if 'grid' in caption:
      grid = [line.split(', ') for line in caption.removesuffix('.')[21:].split('; ')]
      totals = {sum(map(int, line)) for line in grid if '?' not in line}
      (gap,) = [line for line in grid if '?' in line]
      assert len(totals) == 1
      known = sum(int(cell) for cell in gap if cell != '?')
      assert options[letter] == str(totals.pop() - known)
    elif 'Six places' in caption:
      places = caption.removesuffix('.').removeprefix('Six places: ').split(', ')
      places[places.index('?')] = options[letter]
      assert any(
        all(place == places[i % period] for i, place in enumerate(places)) for period in (2, 3)
      )
    else:
      color = re.findall(r'How many (\w+) shapes', question)[0]
      counts = re.findall(rf'(\d) {color} ', caption)
      assert options[letter] == str(sum(map(int, counts)))
    assert reasoning.endswith('.')

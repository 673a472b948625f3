"""MedMCQA and MedReason: letters, final answers, and a graph that has one right option."""

import re

import pytest

from lora_jax.data import medicine_facts, medmcqa, medreason, synthetic_medicine

EXAMPLE = {
  'question': 'Which planet is red?',
  'options': '\nAnswer Choices:\nA. Venus\nB. Mars\nC. Saturn\nD. Neptune',
  'reasoning': 'Iron oxide.',
  'answer': 'Mars. Explanation: its dust holds iron oxide.',
}


@pytest.mark.parametrize(
  ('said', 'right'),
  [
    ('B', True),
    (' b.', True),
    ('(B)', True),
    ('**B**', True),
    ('B. Mars', True),
    ('The answer is B', True),
    ('Answer: B', True),
    ('A', False),
    ('Because', False),
    ('Both A and B', False),
    ('E', False),
  ],
)
def test_medmcqa_letters(said, right):
  example = {'cop': 1}
  assert medmcqa.TASK.score(said, example)['accuracy'] == right


@pytest.mark.parametrize(
  ('said', 'right'),
  [
    ('## Thinking\n\nx\n\n## Final Answer\n\nB. Mars', 1),
    ('## Final Answer\nB', 1),
    ('## Final Answer: Mars', 1),
    ('**Final answer:** (B) Mars.\nThat is all, A aside.', 1),
    ('## Final Answer\nA. Mars', 0),
    ('## Final Answer\nA\n## Final Answer\nB', 1),
    ('## Final Answer\nVenus', 0),
    ('## Final Answer\nB. Venus', 0),
    ('## Final Answer\nB. Mars, for its rust', 1),
    ('## Final Answer\n\n### **B. Mars**', 1),
    ('## Final Answer\n', 0),
    ('B. Mars', 0),
  ],
)
def test_medreason_final_answers(said, right):
  assert medreason.TASK.score(said, EXAMPLE)['accuracy'] == right


@pytest.mark.parametrize('said', ['B. Mars', '## Final Answer\n', '## Final Answer\n\n## Thinking'])
def test_medreason_without_a_final_answer(said):
  assert medreason.TASK.score(said, EXAMPLE) == {'accuracy': 0, 'answered': 0}


@pytest.mark.parametrize('answer', ['', ' ', 'Explanation: it is red.'])
def test_medreason_an_empty_answer_is_refused(answer):
  with pytest.raises(ValueError, match='answer is empty'):
    medreason.TASK.target({**EXAMPLE, 'answer': answer})


def test_medreason_target_follows_the_template_without_the_explanation():
  target = medreason.TASK.target(EXAMPLE)
  assert target == '## Thinking\n\nIron oxide.\n\n## Final Answer\n\nB. Mars'
  assert 'B. Mars' in medreason.TASK.prompt(EXAMPLE).text()
  assert 'Answer Choices' not in medreason.TASK.prompt(EXAMPLE).text()


def test_medreason_options_that_are_named_like_letters():
  example = {**EXAMPLE, 'options': 'A. B\nB. A\nC. AB\nD. O', 'answer': 'A'}
  assert medreason.TASK.target(example).endswith('\n\nB. A')
  assert medreason.TASK.target({**example, 'answer': 'D'}).endswith('\n\nD. O')


@pytest.mark.parametrize('answer', ['-5 mmol/L', '+2', 'Rest.\nThen heat.', '0.5 %', 'Mars'])
def test_medreason_a_target_is_right_whatever_the_answer_looks_like(answer):
  example = {**EXAMPLE, 'options': None, 'answer': answer}
  assert medreason.TASK.score(medreason.TASK.target(example), example)['accuracy'] == 1


def test_medreason_without_options():
  example = {**EXAMPLE, 'options': None}
  assert medreason.TASK.target(example).endswith('\n\nMars')
  assert medreason.TASK.score('## Final Answer\nmars', example)['accuracy'] == 1


@pytest.mark.parametrize('relation', medicine_facts.RELATIONS, ids=lambda r: r.statement)
def test_relations_are_functions_with_room_for_distractors(relation):
  names = [x for x, _ in relation.facts]
  assert len(set(names)) == len(names)
  assert len({y for _, y in relation.facts}) >= 4
  for wording in relation.forward:
    assert '{x}' in wording
    assert '{y}' not in wording
  for wording in relation.reverse:
    assert '{y}' in wording
    assert '{x}' not in wording


def test_the_graph_holds_enough():
  assert sum(len(relation.facts) for relation in medicine_facts.RELATIONS) >= 200


def test_choices_have_one_option_that_the_graph_supports():
  facts = {(x, y) for relation in medicine_facts.RELATIONS for x, y in relation.facts}
  known = {x for x, _ in facts} | {y for _, y in facts}
  for row in synthetic_medicine.choice_rows(2, 400):
    options = [row[field] for field in ('opa', 'opb', 'opc', 'opd')]
    assert len(set(options)) == 4
    question = row['question'].lower()
    named = [name for name in known if name.lower() in question]
    linked = [
      index
      for index, option in enumerate(options)
      if any((name, option) in facts or (option, name) in facts for name in named)
    ]
    assert row['cop'] in linked


def test_wordings_are_used_once_before_any_comes_back():
  rows = synthetic_medicine.choice_rows(0, 600)
  assert len({row['question'] for row in rows}) == 600
  rows = synthetic_medicine.reasoning_rows(0, 280)
  assert len({row['question'] for row in rows}) == 280
  letters = [medmcqa.TASK.target(row) for row in synthetic_medicine.choice_rows(0, 600)]
  assert all(110 < letters.count(letter) < 190 for letter in 'ABCD')


def test_chains_end_in_the_answer():
  for row in synthetic_medicine.reasoning_rows(1, 200):
    *_, last = re.findall(r'-> (.+)', row['reasoning'])
    assert row['answer'].startswith(last.split(' -> ')[-1] + '. Explanation:')
    assert medreason.TASK.target(row).endswith(last.split(' -> ')[-1])
    assert row['options'].count(last.split(' -> ')[-1]) == 1

import random

import pytest

from lora_jax.data import rouge
from lora_jax.data.govreport import TASK


@pytest.fixture(scope='module')
def rows():
  return TASK.synthetic(3, 40)


def test_the_summary_itself_scores_one_and_noise_nothing(rows):
  for row in rows:
    assert set(TASK.score(TASK.target(row), row)) == {'rouge1', 'rouge2', 'rouge_lsum'}
    assert all(value == 1.0 for value in TASK.score(TASK.target(row), row).values())
    assert all(value == 0.0 for value in TASK.score('', row).values())
    assert all(value == 0.0 for value in TASK.score('zzq qqz ... ?!', row).values())


def test_dropping_sentences_lowers_the_headline(rows):
  row = rows[0]
  sentences = rouge.split_sentences(row['summary'])
  scores = [
    TASK.score(' '.join(sentences[:kept]), row)['rouge_lsum'] for kept in range(len(sentences) + 1)
  ]
  assert scores == sorted(scores)
  assert len(set(scores)) == len(scores)


def test_sentence_order_matters_to_no_rouge_but_bigrams(rows):
  summary = rows[1]['summary']
  turned = ' '.join(reversed(rouge.split_sentences(summary)))
  scores = rouge.rouge(turned, summary)
  assert scores['rouge1'] == scores['rouge_lsum'] == 1.0
  assert scores['rouge2'] < 1.0


def test_rouge_of_a_worked_example():
  # Unigrams: 3 of 4 match 3 of 6. Bigrams: 'the cat' alone, 1 of 3 and 1 of 5.
  scores = rouge.rouge('The cat lay there.', 'The cat sat. It lay quietly.')
  assert scores['rouge1'] == pytest.approx(2 * 3 / (4 + 6))
  assert scores['rouge2'] == pytest.approx(2 * 1 / (3 + 5))


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('One. Two! Three?', ['One.', 'Two!', 'Three?']),
    (
      'It cost $1.9 billion. It fell 3.5 percent.',
      ['It cost $1.9 billion.', 'It fell 3.5 percent.'],
    ),
    (
      'Dr. A. Ames of the U.S. Navy met us. He left.',
      ['Dr. A. Ames of the U.S. Navy met us.', 'He left.'],
    ),
    ('See fig. 2 now. "Why?" (No one knew.)', ['See fig. 2 now.', '"Why?"', '(No one knew.)']),
    ('First line\nsecond line.\n\n', ['First line', 'second line.']),
    ('', []),
  ],
)
def test_split_sentences(text, expected):
  assert rouge.split_sentences(text) == expected


def test_splitting_loses_no_word(rows):
  for row in rows:
    assert ' '.join(rouge.split_sentences(row['report'])).split() == row['report'].split()


def test_rows_are_a_pure_function_of_seed_and_index():
  assert TASK.synthetic(5, 6) == TASK.synthetic(5, 12)[:6]
  assert TASK.synthetic(5, 6) != TASK.synthetic(6, 6)


def test_summaries_differ_and_their_figures_stand_in_the_report(rows):
  assert len({row['summary'] for row in rows}) == len(rows)
  for row in rows:
    figures = [word.strip('.,') for word in row['summary'].split() if any(map(str.isdigit, word))]
    assert len(figures) >= 6
    for figure in figures:
      assert figure.removesuffix('-year-old') in row['report']


def test_another_rows_summary_is_far_from_full_marks(rows):
  rng = random.Random(0)
  scores = []
  for row in rows:
    other = rng.choice([candidate for candidate in rows if candidate is not row])
    scores.append(TASK.score(TASK.target(other), row)[TASK.headline])
  assert sum(scores) / len(scores) < 0.55


def test_the_prompt_holds_the_report_and_not_the_summary(rows):
  for row in rows:
    assert TASK.prompt(row).document == row['report']
    assert row['summary'] not in TASK.prompt(row).text()

import dataclasses
import functools
import string

import jax
import numpy as np
import pytest

from lora_jax import evaluate, lora, packs
from lora_jax.config import LoraConfig
from lora_jax.data.encode import encode_prompt
from lora_jax.data.task import Prompt, Task
from lora_jax.errors import UserError
from lora_jax.generate import generate
from lora_jax.hub import bases
from lora_jax.transformer import Transformer

BATCH_ROWS, NEW, LIMIT = 4, 8, 128
LETTERS = string.ascii_letters

CHOOSE = Task(
  name='choose',
  title='Choose',
  hub_id='',
  features={},
  required=(),
  prompt=lambda example: Prompt(example['question']),
  target=lambda example: example['answer'],
  score=lambda said, example: {
    'right': float(said == example['answer']),
    'long': float(len(said) > 1),
  },
  headline='right',
  synthetic=lambda seed, count: [],
  max_new_tokens=2,
  choices=lambda example: tuple(LETTERS),
)
WRITE = dataclasses.replace(CHOOSE, name='write', choices=None, max_new_tokens=8)


@functools.cache
def base():
  """The tiny base with an adapter so strong that it says different things."""
  tiny = bases.load('tiny')
  params = jax.tree.map(jax.numpy.asarray, tiny.params)
  adapters = lora.init(jax.random.key(0), params, lora.resolve('all', params), 4)
  noise = lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape)
  strong = jax.tree.map(noise, adapters)
  return Transformer(tiny.config), params, strong, tiny.tokenizer


def examples(count=6, seed=0):
  rng = np.random.default_rng(seed)
  letters = lambda n: ''.join(rng.choice(list('abcdef ghi'), n))
  return [
    {'id': f'row-{i}', 'question': letters(int(rng.integers(1, 40))), 'answer': 'ABCD'[i % 4]}
    for i in range(count)
  ]


def run(task, rows, new=NEW, params=None):
  model, weights, adapters, tokenizer = base()
  params = lora.attach(weights, adapters, 2.0) if params is None else params
  prompts = [encode_prompt(task, row, tokenizer, LIMIT) for row in rows]
  questions = evaluate.Questions(task, rows, prompts, tokenizer, new)
  return evaluate.score_task(model, params, questions, BATCH_ROWS)


def test_few_rows_are_not_filled_up_to_a_whole_batch(monkeypatch):
  shapes = []
  pad = lambda prompts, rows: shapes.append(rows) or pad_prompts(prompts, rows)
  pad_prompts = evaluate.pad_prompts
  monkeypatch.setattr(evaluate, 'pad_prompts', pad)
  run(WRITE, examples(2))
  run(WRITE, examples(BATCH_ROWS + 2))
  assert shapes == [2, BATCH_ROWS, BATCH_ROWS]


@pytest.mark.parametrize('task', [CHOOSE, WRITE])
def test_company_does_not_change_a_prediction_and_order_is_kept(task):
  rows = examples()
  scores = run(task, rows)
  assert [row.id for row in scores.rows] == [row['id'] for row in rows]
  assert run(task, rows[::-1]).rows == scores.rows[::-1]
  assert run(task, rows[2:3]).rows == scores.rows[2:3]
  assert len({row.prediction for row in scores.rows}) > 1


def test_the_choice_is_the_likeliest_next_token():
  model, weights, adapters, tokenizer = base()
  params = lora.attach(weights, adapters, 2.0)
  for row, example in zip(run(CHOOSE, examples()).rows, examples(), strict=True):
    ids = encode_prompt(CHOOSE, example, tokenizer, LIMIT)
    padded = np.pad(ids, (0, LIMIT - len(ids)))[None]
    hidden_BTD, _ = jax.jit(model.apply)({'params': params}, padded)
    logits_V = model.apply({'params': params}, hidden_BTD[0, len(ids) - 1], method='head')
    letters = [tokenizer.encode_plain(letter)[0] for letter in LETTERS]
    assert row.prediction == LETTERS[int(np.argmax(logits_V[np.asarray(letters)]))]
    assert row.scores == CHOOSE.score(row.prediction, example)


def test_predictions_are_what_generation_says_without_its_end():
  model, weights, adapters, tokenizer = base()
  params = lora.attach(weights, adapters, 2.0)
  scores, generated, unfinished = run(WRITE, examples()), 0, 0
  for row, example in zip(scores.rows, examples(), strict=True):
    prompt = encode_prompt(WRITE, example, tokenizer, LIMIT)
    tokens, lengths = evaluate.pad_prompts([prompt], BATCH_ROWS)
    out = generate(model, params, tokens, lengths, NEW, tokenizer.eos_id)[0].tolist()
    length = out.index(tokenizer.eos_id) if tokenizer.eos_id in out else NEW
    assert row.prediction == tokenizer.decode(out[:length])
    generated += min(length + 1, NEW)
    unfinished += length == NEW
  assert (scores.generated_tokens, scores.unfinished) == (generated, unfinished)


def test_a_shorter_limit_cuts_predictions():
  short = run(WRITE, examples(), 3)
  for row, whole in zip(short.rows, run(WRITE, examples()).rows, strict=True):
    assert whole.prediction.startswith(row.prediction.rstrip('\ufffd'))
  assert short.generated_tokens <= 3 * len(examples())


@pytest.mark.parametrize('task', [CHOOSE, WRITE])
def test_unmerged_adapters_score_as_merged_ones(task):
  _, weights, adapters, _ = base()
  merged = run(task, examples(), params=lora.merge(weights, adapters, 2.0))
  assert merged.rows == run(task, examples()).rows


@pytest.mark.parametrize('task', [CHOOSE, WRITE])
def test_a_pack_scores_as_its_cells_alone(task):
  model, weights, adapters, tokenizer = base()
  others = [
    adapters,
    jax.tree.map(lambda x: 0.5 * x, adapters),
    jax.tree.map(lambda x: 0 * x, adapters),
  ]
  scales = packs.scales(adapters, LoraConfig(rank=4, alpha=8.0), packs.union([adapters]))
  pack = packs.stack([packs.Pack(other, scales) for other in others])
  prompts = [encode_prompt(task, row, tokenizer, LIMIT) for row in examples()]
  questions = evaluate.Questions(task, examples(), prompts, tokenizer, NEW)
  scored = evaluate.score_pack(model, weights, pack, 2, questions, 3 * BATCH_ROWS)
  assert len(scored) == 2
  for other, scores in zip(others, scored, strict=False):
    alone = run(task, examples(), params=lora.attach(weights, other, 2.0))
    assert scores.rows == alone.rows
    assert (scores.means, scores.generated_tokens) == (alone.means, alone.generated_tokens)
    assert scores.unfinished == alone.unfinished
  assert scored[0].rows != scored[1].rows


def test_means_are_percentages_of_the_rows():
  scores = run(CHOOSE, examples())
  assert scores.means.keys() == {'right', 'long'}
  assert scores.headline == 'right'
  for name, mean in scores.means.items():
    assert mean == pytest.approx(100 * sum(row.scores[name] for row in scores.rows) / 6)


def test_a_choice_of_more_than_one_token_is_named():
  task = dataclasses.replace(CHOOSE, choices=lambda example: ('A', 'maybe'))
  with pytest.raises(UserError, match='choose row row-') as error:
    run(task, examples())
  assert '\n' not in str(error.value)


def test_choices_are_looked_up_once_a_row_however_often_they_are_scored(monkeypatch):
  model, weights, _, tokenizer = base()
  prompts = [encode_prompt(CHOOSE, row, tokenizer, LIMIT) for row in examples()]
  questions = evaluate.Questions(CHOOSE, examples(), prompts, tokenizer, NEW)
  looked_up = []
  monkeypatch.setattr(tokenizer, 'encode_plain', looked_up.append)
  for _ in range(2):
    evaluate.score_task(model, weights, questions, BATCH_ROWS)
  assert not looked_up


def test_prompts_are_padded_to_few_shapes():
  shapes = set()
  for longest in range(1, 1500, 7):
    prompts = [[5] * longest, [6]]
    tokens, lengths = evaluate.pad_prompts(prompts, 3)
    assert lengths.tolist() == [longest, 1, 0]
    assert tokens[0, :longest].tolist() == prompts[0]
    assert tokens.sum() == 5 * longest + 6
    assert tokens.shape[1] < longest + 256
    shapes.add(tokens.shape)
  assert len(shapes) <= 8

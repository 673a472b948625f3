"""A user's own file: what is read, what is refused, and which tokens are learned."""

import json
import random

import numpy as np
import pytest

from lora_jax.config import METRICS
from lora_jax.data import encode, messages, own_task
from lora_jax.errors import UserError
from lora_jax.hub import bases
from lora_jax.hub.chat_template import ChatTemplate
from lora_jax.hub.tokenizer import ChatTokenizer

LONG = 10_000
WORDS = ['the', 'sum', '37.5', 'naïve', '\n\n', '  ', '“q”', '表', '🙂', '{"a": 1}', '<|im_end|>']


@pytest.fixture(scope='module')
def tokenizer():
  return bases.load('tiny').tokenizer


def with_template(tokenizer, source):
  """The same vocabulary under another template."""
  template = ChatTemplate(source, tokenizer.template.names)
  return ChatTokenizer(
    tokenizer._full,
    tokenizer._plain,
    template,
    eos_id=tokenizer.eos_id,
    pad_id=tokenizer.pad_id,
    bos_id=tokenizer.bos_id,
  )


def turn(role, content):
  return {'role': role, 'content': content}


CHAT = [turn('user', 'a?'), turn('assistant', 'b.'), turn('user', 'c?'), turn('assistant', 'd.')]


def read(tmp_path, *records):
  path = tmp_path / 'my.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return messages.read(path)


def of(turns, given=0):
  return messages.Conversation('my.jsonl:1', '1', tuple(turns), given)


def random_chat(rng, turns=None):
  text = lambda: 'x' + ' '.join(rng.choices(WORDS, k=rng.randint(1, 12)))
  chat = [turn('system', text())] if rng.random() < 0.5 else []
  for _ in range(turns or rng.randint(1, 4)):
    chat += [turn('user', text()), turn('assistant', text())]
  return chat


def learned(row):
  """Runs of learned targets, and where each begins among the row's ids."""
  ids = np.append(row.arrays['tokens'][:1], row.arrays['targets'])
  weights = np.append(0, row.arrays['weights'])
  assert set(weights) <= {0, 1}
  edges = np.flatnonzero(np.diff(np.append(weights, 0)))
  starts, ends = edges[::2] + 1, edges[1::2] + 1
  return ids.tolist(), [(int(s), int(e)) for s, e in zip(starts, ends, strict=True)]


def test_the_forms_say_the_same(tmp_path):
  forms = [
    {'messages': [turn('user', 'a?'), turn('assistant', 'b.')]},
    {'prompt': 'a?', 'completion': 'b.'},
    {'prompt': [turn('user', 'a?')], 'completion': [turn('assistant', 'b.')]},
    {'instruction': 'a?', 'output': 'b.'},
  ]
  for row in read(tmp_path, *forms):
    assert row.messages == (turn('user', 'a?'), turn('assistant', 'b.'))
    assert row.learned() == [1]
    assert row.answer == 'b.'


def test_answers_of_a_prompt_are_given_and_those_of_messages_learned(tmp_path):
  *prompt, last = CHAT
  whole, cut = read(tmp_path, {'messages': CHAT}, {'prompt': prompt, 'completion': [last]})
  assert whole.messages == cut.messages
  assert (whole.learned(), cut.learned()) == ([1, 3], [3])
  assert whole.learned(last_only=True) == [3]


def test_rows_are_named_by_their_id_or_line(tmp_path):
  one = {'prompt': 'a', 'completion': 'b'}
  path = tmp_path / 'my.jsonl'
  # A blank line, and a byte order mark as Windows writes.
  path.write_bytes(b'\xef\xbb\xbf' + json.dumps(one).encode() + b'\n\n')
  with path.open('a') as file:
    file.write(json.dumps({**one, 'id': 'x'}) + '\n' + json.dumps({**one, 'id': 7}))
  assert [row.id for row in messages.read(path)] == ['1', 'x', '7']


@pytest.mark.parametrize(
  ('line', 'says'),
  [
    ('{"messages": [', 'not valid JSON'),
    ('[1]', 'found a list'),
    ('{"text": "x"}', "has 'text'"),
    ('{}', 'has nothing'),
    ('{"messages": []}', "'messages' must be a list"),
    ('{"messages": ["x"]}', 'messages[0] must be'),
    ('{"messages": [{"content": "x"}]}', 'messages[0] has no role'),
    ('{"messages": [{"role": "gpt", "content": "x"}]}', "has role 'gpt'"),
    ('{"messages": [{"role": "user"}]}', 'content is missing'),
    ('{"messages": [{"role": "user", "content": null}]}', 'content is None'),
    ('{"messages": [{"role": "user", "content": " "}]}', 'content is empty'),
    ('{"messages": [{"role": "user", "content": "x"}]}', "the last turn is the user's"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', 'answer to no user turn'),
    ('{"prompt": "x"}', "'completion' is missing"),
    ('{"completion": "x"}', "'prompt' is missing"),
    ('{"prompt": "x", "completion": ""}', "'completion' is empty"),
    ('{"prompt": 3, "completion": "x"}', "'prompt' must be a string"),
    ('{"instruction": "x"}', "'output' is missing"),
    ('{"prompt": "x", "completion": "y", "choices": "AB"}', "'choices' must be"),
    (r'{"prompt": "x", "completion": "y\ud83d"}', r'holds \ud83d, half of a character'),
  ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, line, says):
  path = tmp_path / 'my.jsonl'
  path.write_text('{"prompt": "a", "completion": "b"}\n' + line + '\n')
  with pytest.raises(UserError) as error:
    messages.read(path)
  assert str(error.value).startswith(f'{path}:2: ')
  assert says in str(error.value)
  assert '\n' not in str(error.value)


def test_a_surrogate_pair_is_one_character(tmp_path):
  path = tmp_path / 'my.jsonl'
  path.write_text(r'{"prompt": "x", "completion": "\ud83d\ude00"}')
  assert messages.read(path)[0].answer == '\U0001f600'


def test_turns_out_of_order_are_named(tmp_path):
  system = turn('system', 'Be brief.')
  for chat, says in (
    ([CHAT[0], system, CHAT[1]], 'turn 2 is a system turn'),
    ([*CHAT[:2], CHAT[1]], 'turn 3 is an answer to no user turn'),
  ):
    with pytest.raises(UserError, match=says):
      read(tmp_path, {'messages': chat})


def test_files_that_are_none_are_named(tmp_path):
  (tmp_path / 'empty.jsonl').write_text('\n \n')
  (tmp_path / 'latin.jsonl').write_bytes(b'{"prompt": "caf\xe9", "completion": "x"}\n')
  for name, says in (
    ('missing.jsonl', 'is not there'),
    ('', 'is a directory'),
    ('empty.jsonl', 'is empty'),
    ('latin.jsonl', ':1: not UTF-8'),
  ):
    with pytest.raises(UserError, match=says):
      messages.read(tmp_path / name)


def test_each_answer_follows_what_inference_renders(tokenizer):
  rng = random.Random(0)
  for _ in range(30):
    chat = random_chat(rng)
    (row,) = messages.encode([of(chat)], tokenizer, LONG).rows
    ids, spans = learned(row)
    answers = [i for i, message in enumerate(chat) if message['role'] == 'assistant']
    assert len(spans) == len(answers)
    for i, (start, end) in zip(answers, spans, strict=True):
      assert ids[:start] == tokenizer.encode_chat(chat[:i])
      assert ids[start:end] == [*tokenizer.encode_plain(chat[i]['content']), tokenizer.eos_id]
    (last,) = messages.encode([of(chat)], tokenizer, LONG, last_only=True).rows
    assert learned(last)[1] == spans[-1:]


def test_special_tokens_in_data_end_no_turn(tokenizer):
  chat = [turn('user', 'x<|im_end|>\n<|im_start|>system\n'), turn('assistant', 'y<|im_end|>z')]
  (row,) = messages.encode([of(chat)], tokenizer, LONG).rows
  ids, [(start, end)] = learned(row)
  assert ids[start:end].index(tokenizer.eos_id) == end - start - 1
  plain = [turn('user', 'hello'), turn('assistant', 'you')]
  (other,) = messages.encode([of(plain)], tokenizer, LONG).rows
  specials = set(tokenizer.special_tokens.values())
  count = lambda held: sum(i in specials for i in held)
  assert count(ids) == count(learned(other)[0])


# As Qwen 3 does with what it thought: earlier answers are rendered otherwise than they were said.
FORGETS = """
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content if loop.last or m.role == 'user' else '...' }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
STRIPS = FORGETS.replace("m.content if loop.last or m.role == 'user' else '...'", 'm.content|trim')


def test_a_template_that_rewrites_earlier_turns_gets_a_row_an_answer(tokenizer):
  odd = with_template(tokenizer, FORGETS)
  encoded = messages.encode([of(CHAT), of(CHAT[:2])], odd, LONG)
  assert (len(encoded.rows), encoded.split) == (3, 1)
  for row, asked in zip(encoded.rows, (CHAT[:1], CHAT[:3], CHAT[:1]), strict=True):
    ids, [(start, end)] = learned(row)
    assert ids[:start] == odd.encode_chat(asked)
    assert end == len(ids)
  assert 'the chat template changes earlier turns' in encoded.notes(LONG)[0]


def test_a_template_that_strips_answers_keeps_one_row(tokenizer):
  odd = with_template(tokenizer, STRIPS)
  chat = [turn('user', 'a?'), turn('assistant', ' b. \n'), *CHAT]
  encoded = messages.encode([of(chat)], odd, LONG)
  assert (len(encoded.rows), encoded.split) == (1, 0)
  ids, spans = learned(encoded.rows[0])
  assert [odd.decode(ids[s : e - 1]) for s, e in spans] == ['b.', 'b.', 'd.']


def test_what_a_template_refuses_is_named_by_line(tokenizer):
  odd = with_template(tokenizer, "{{ raise_exception('no system turns') }}")
  with pytest.raises(UserError, match=r'^my.jsonl:1: .*no system turns'):
    messages.encode([of(CHAT)], odd, LONG)


def test_long_chats_lose_their_oldest_turns_and_no_more(tokenizer):
  rng = random.Random(1)
  for _ in range(20):
    chat = random_chat(rng, turns=4)
    (whole,) = messages.encode([of(chat)], tokenizer, LONG).rows
    limit = rng.randint(30, len(whole))
    encoded = messages.encode([of(chat)], tokenizer, limit)
    if encoded.left_out:
      assert not encoded.rows
      exchange = [*(chat[:1] if chat[0]['role'] == 'system' else []), *chat[-2:]]
      (alone,) = messages.encode([of(exchange)], tokenizer, LONG).rows
      assert len(alone) >= limit
      continue
    (row,) = encoded.rows
    assert len(row) < limit
    assert encoded.shortened == (len(row) < len(whole))
    kept = chat
    while len(messages.encode([of(kept)], tokenizer, LONG).rows[0]) >= limit:
      kept = messages.without_oldest(tuple(kept))
    (expected,) = messages.encode([of(kept)], tokenizer, LONG).rows
    np.testing.assert_array_equal(row.arrays['tokens'], expected.arrays['tokens'])
    np.testing.assert_array_equal(row.arrays['weights'], expected.arrays['weights'])


def test_rows_kept_out_are_drawn_by_the_seed():
  rows = [of([turn('user', f'{i}?'), turn('assistant', str(i))]) for i in range(50)]
  train, watched = messages.keep_out(rows, 0.2, 100, seed=3)
  assert len(watched) == 10
  assert sorted(map(rows.index, train + watched)) == list(range(50))
  assert messages.keep_out(rows, 0.2, 100, seed=3) == (train, watched)
  assert messages.keep_out(rows, 0.2, 100, seed=4) != (train, watched)
  assert len(messages.keep_out(rows, 0.2, 4, seed=3)[1]) == 4
  assert messages.keep_out(rows[:3], 0.2, 100, seed=3) == (rows[:3], [])


def test_the_task_of_own_rows_poses_what_training_saw(tokenizer):
  rng = random.Random(2)
  rows = [of(random_chat(rng)) for _ in range(10)]
  task = own_task.make(rows, 'exact_match')
  for row in rows:
    posed = encode.encode_prompt(task, own_task.example(row), tokenizer, LONG)
    assert posed == messages.fit_prompt(row.messages[:-1], tokenizer, LONG)[0]
    assert task.target(own_task.example(row)) == row.answer


def test_every_metric_can_be_asked_for():
  assert set(METRICS) == {*own_task.METRICS}


@pytest.mark.parametrize(
  ('metric', 'answer', 'right', 'wrong'),
  [
    ('exact_match', 'b.', ' b.\n', 'b'),
    ('choice', 'B', 'B', 'A'),
    ('rouge', 'Bile is made by the liver.', 'Bile is made by the liver.', 'No idea at all.'),
    ('json_fields', '{"a": 1}', 'Sure: {"a": "1"}', '{"a": 2}'),
    ('json_fields', '{}', 'Nothing: {}', '{"a": 2}'),
    ('numeric', '6 + 6 = 12\nSo 12', 'It is 12.0', 'It is 13'),
  ],
)
def test_metrics_tell_right_from_wrong(metric, answer, right, wrong):
  row = of([turn('user', 'q'), turn('assistant', answer)])
  task = own_task.make([row], metric, choices=('A', 'B'))
  example = own_task.example(row)
  assert task.score(right, example)[task.headline] == 1.0
  assert task.score(wrong, example)[task.headline] < 0.5
  assert (task.choices is None) == (metric != 'choice')


@pytest.mark.parametrize(
  ('metric', 'answer', 'choices', 'says'),
  [
    ('json_fields', 'b', (), 'holds no JSON object'),
    ('numeric', 'b', (), 'holds no number'),
    ('choice', 'b', (), 'no choices'),
    ('choice', 'b', ('A', 'B'), "'b' is none of"),
  ],
)
def test_answers_that_a_metric_cannot_use_are_named(metric, answer, choices, says):
  with pytest.raises(UserError, match=says) as error:
    own_task.make([of([turn('user', 'q'), turn('assistant', answer)])], metric, choices)
  assert str(error.value).startswith('my.jsonl:1: ')

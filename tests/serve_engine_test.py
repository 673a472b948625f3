"""The engine: what it answers, whatever else it is answering."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import served
from served import CONFIG, KINDS, LONGEST, MODEL, NEW, TOKENIZER

from benchmarks.serve_soak import Soak
from lora_jax import lora
from lora_jax.bank_kernel import NONE
from lora_jax.errors import UserError
from lora_jax.hub import peft
from lora_jax.programs import Programs
from lora_jax.sampling import GREEDY, Sampling
from lora_jax.serve import engine as engine_module
from lora_jax.serve.answer import Request
from lora_jax.serve.engine import Engine
from lora_jax.serve.rows import Asked, Rows, Seat, decode, read_prompts
from lora_jax.text_stream import Until

NAMES = [*KINDS, 'all.1', 'dora.1', 'ragged.1', 'o_proj.1']


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return served.write(tmp_path_factory.mktemp('adapters'), NAMES)


@pytest.fixture(scope='module')
def warm(root):
  engine = Engine(MODEL, served.params(), TOKENIZER, CONFIG, root)
  engine.warm_up()
  return engine


@pytest.fixture
def engine(warm):
  """The warm one, which every test has to leave free of requests."""
  yield warm
  assert served.is_free(warm)


@pytest.fixture(scope='module')
def requests():
  """Greedy requests of all lengths, to the base and to every adapter, and their answers."""
  found = served.clear(['', *NAMES], [1, 8, 13, LONGEST])
  assert len(found) > 3 * len(NAMES)
  return found


def ask(engine, *asked, **changes):
  answers = [engine.submit(dataclasses.replace(one, **changes)) for one in asked]
  served.run(engine)
  return answers


def test_rows_of_a_mixed_batch_are_answered_as_alone_and_merged(engine, requests):
  # One of each adapter first, so that batches are as mixed as they can be.
  order = sorted(range(len(requests)), key=lambda i: (i % 4, i))
  answers = ask(engine, *(requests[i][0] for i in order))
  for i, answer in zip(order, answers, strict=True):
    assert answer.ids == requests[i][1], requests[i][0]
    assert answer.finish == 'length'
  assert len({tuple(ids) for _, ids in requests}) > 0.9 * len(requests)


def test_prompts_of_a_length_that_come_together_are_read_together(engine, requests, monkeypatch):
  shapes = []

  def noted(*arguments):
    shapes.append(arguments[6].shape)
    return read_prompts(*arguments)

  monkeypatch.setattr(engine_module, 'read_prompts', noted)
  short = [found for found in requests if len(found[0].prompt) <= CONFIG.shortest]
  (long,) = [f for f in requests if len(f[0].prompt) == LONGEST and f[0].adapter == 'all']
  for count, expected in ((4, [(4, 8)]), (3, [(4, 8)]), (1, [(1, 8)])):
    shapes.clear()
    answers = ask(engine, *(request for request, _ in short[:count]))
    assert [answer.ids for answer in answers] == [ids for _, ids in short[:count]]
    assert shapes == expected
  shapes.clear()
  answers = ask(engine, *(request for request, _ in (short[0], long, short[1])))
  assert [answer.ids for answer in answers] == [short[0][1], long[1], short[1][1]]
  # No more is read in a step than one row holds.
  assert shapes == [(1, 8), (1, 32), (1, 8)]


def test_hundreds_of_steps_compile_nothing_and_leave_nothing_behind(engine, requests):
  memory = sum(array.nbytes for array in jax.live_arrays())
  record = Soak(engine, requests).run(400)
  assert record.wrong == []
  # Far more adapters than slots: most had to be written again and again.
  assert record.loads > 2 * len(NAMES)
  assert record.finished.keys() == {'length', 'cancelled'}
  assert min(record.finished['cancelled'], record.reloaded) > 5
  assert record.greedy > 50
  assert record.again > 10
  assert max(record.live) <= memory


def test_an_adapter_of_other_shapes_than_all_before_compiles_nothing(engine, root):
  paths = lora.resolve('o_proj,fc1', served.params())
  for rank in (5, 7):
    fresh = lora.init(jax.random.key(0), served.params(), paths, rank)
    peft.save(root / f'rank-{rank}', peft.uniform(fresh, rank, 8.0))
  with Programs() as programs:
    for name in ('rank-5', 'rank-7'):
      engine.library.add(name, name)
      ask(engine, Request((3, 4), name, 2))
      engine.unload(name)
  assert programs.count == 0


def test_a_soak_finds_what_is_wrong(tmp_path, requests):
  engine = Engine(MODEL, served.params(), TOKENIZER, CONFIG, served.write(tmp_path, NAMES))
  # Somebody who never lets go, and answers that are none.
  engine._slots.acquire(engine.library.find('all'))
  other = [(request, [ids[0], *ids[:-1]]) for request, ids in requests[:6]]
  wrong = '; '.join(Soak(engine, other).run(40).wrong)
  for says in ('the base said something else', 'slots are in use', "('all',) are still in slots"):
    assert says in wrong


def test_an_adapter_that_overflows_harms_nobody_after_it(tmp_path, requests):
  root = served.write(tmp_path, ['o_proj'])
  adapter = served.adapter('all')
  huge = jax.tree.map(lambda leaf: leaf * np.float32(3e38), adapter.params)
  peft.save(root / 'huge', dataclasses.replace(adapter, params=huge))
  engine = Engine(MODEL, served.params(), TOKENIZER, CONFIG, root)
  for request, ids in requests:
    if request.adapter in ('', 'o_proj') and len(request.prompt) < LONGEST:
      (before,) = ask(engine, Request(served.prompt(LONGEST), 'huge', NEW))
      assert before.finish == 'length'
      # The row and the slot that are free last are taken first.
      engine.unload('huge')
      assert ask(engine, request)[0].ids == ids
      engine.unload('o_proj')
      for name in ('huge', 'o_proj'):
        engine.library.add(name, name)


def test_what_is_drawn_depends_on_no_other_request(engine, requests):
  drawn = Sampling(temperature=1.5, top_p=0.95, top_k=40, seed=7)
  asked = [request for request, _ in requests if len(request.prompt) == 8]
  alone = [
    ask(engine, one, sampling=dataclasses.replace(drawn, seed=seed))[0].ids
    for seed, one in enumerate(asked)
  ]
  again = [
    engine.submit(dataclasses.replace(one, sampling=dataclasses.replace(drawn, seed=seed)))
    for seed, one in reversed([*enumerate(asked)])
  ]
  greedy = engine.submit(asked[0])
  served.run(engine)
  assert [answer.ids for answer in reversed(again)] == alone
  assert greedy.ids == next(ids for request, ids in requests if request is asked[0])
  other = ask(engine, asked[0], sampling=dataclasses.replace(drawn, seed=2**40 + 1))[0]
  assert len({tuple(other.ids), tuple(alone[0]), tuple(greedy.ids)}) == 3


def test_drawing_among_one_is_greedy(engine, requests):
  for few in ({'top_k': 1}, {'top_p': 0.0}):
    request, ids = requests[0]
    assert ask(engine, request, sampling=Sampling(temperature=2.0, **few))[0].ids == ids


def test_text_streams_as_it_decodes_and_ends_once(engine, requests):
  told, ends = {}, {}

  def deliver(answer, piece):
    assert answer not in ends
    told[answer] = told.get(answer, '') + piece
    assert told[answer] == answer.text
    if answer.finish is not None:
      ends[answer] = answer.finish

  answers = [engine.submit(request, deliver) for request, _ in requests[:12]]
  served.run(engine)
  assert {*ends} == {*answers}
  for answer, (_, ids) in zip(answers, requests, strict=False):
    assert told[answer] == TOKENIZER.decode(ids)


def test_an_answer_stops_before_its_stop_string_wherever_tokens_end(engine, requests):
  rng, met = np.random.default_rng(0), 0
  for request, ids in requests[::2]:
    text = TOKENIZER.decode(ids)
    begin, size = int(rng.integers(0, max(len(text) - 3, 1))), int(rng.integers(2, 4))
    stop = (text[begin : begin + size], 'never said')
    until = Until(stop)
    expected = until.push(text)
    if '\ufffd' in stop[0] or not until.met:
      continue
    met += 1
    (answer,) = ask(engine, request, stop=stop)
    assert (answer.text, answer.finish) == (expected, 'stop')
    assert len(answer.ids) <= len(ids)
  assert met > 5


def test_the_token_that_ends_a_turn_is_not_in_the_answer(engine, requests, monkeypatch):
  request, ids = next(found for found in requests if found[1].index(found[1][4]) == 4)
  monkeypatch.setattr(TOKENIZER, 'eos_id', ids[4])
  (answer,) = ask(engine, request)
  assert (answer.ids, answer.finish) == (ids[:4], 'stop')
  assert answer.text == TOKENIZER.decode(ids[:4])


def test_cancelling_frees_the_row_at_once(engine, requests):
  asked = [request for request, _ in requests if len(request.prompt) <= CONFIG.shortest]
  answers = [engine.submit(asked[i % len(asked)]) for i in range(CONFIG.rows + 2)]
  engine.step()
  assert (engine.counts.free_rows, engine.counts.waiting) == (0, 2)
  engine.cancel(answers[1])
  engine.cancel(answers[-1])
  assert (engine.counts.free_rows, engine.counts.waiting) == (1, 1)
  said = list(answers[1].ids)
  engine.step()
  assert (engine.counts.free_rows, engine.counts.waiting) == (0, 0)
  served.run(engine)
  assert answers[1].ids == said
  engine.cancel(answers[0])
  assert [answer.finish for answer in answers] == [
    *('length', 'cancelled', *['length'] * (CONFIG.rows - 1), 'cancelled'),
  ]


def test_more_adapters_than_slots_wait_for_each_other(engine, requests):
  asked = [found for found in requests if found[0].adapter and len(found[0].prompt) == 8]
  answers = [engine.submit(request) for request, _ in asked]
  engine.step()
  counts, slots = engine.counts, CONFIG.slots
  assert CONFIG.rows > slots
  assert (counts.seated, counts.waiting) == (slots, len(asked) - slots)
  assert counts.slots_in_use == slots
  served.run(engine)
  assert [answer.ids for answer in answers] == [ids for _, ids in asked]


def test_a_full_row_answers_to_its_end(engine):
  (found,) = served.clear([''], [LONGEST])
  room = CONFIG.length - LONGEST
  (answer,) = ask(engine, found[0], max_tokens=None)
  assert (len(answer.ids), answer.finish) == (room, 'length')
  assert answer.ids[:NEW] == found[1]


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'prompt': ()}, 'the prompt is empty'),
    ({'prompt': (3,) * CONFIG.length}, 'the prompt has 32 tokens, and there is room for 31'),
    ({'max_tokens': 30}, 'the prompt has 3 tokens and the answer may have 30, and .* 32 together'),
    ({'max_tokens': 0}, 'max_tokens is 0'),
    ({'prompt': (1, served.BASE.vocab_size)}, 'tokens that are not in 0-263'),
    ({'prompt': (1, -1)}, 'tokens that are not in 0-263'),
    ({'adapter': 'nope'}, "no adapter 'nope'; there are "),
    ({'adapter': '../all'}, "no adapter '../all'; there are "),
  ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(engine, changes, match):
  with pytest.raises(UserError, match=match) as refused:
    engine.submit(Request(**{'prompt': (3, 4, 5), 'max_tokens': 4, **changes}))
  assert '\n' not in str(refused.value)


def test_an_adapter_that_is_lost_fails_its_own_requests_alone(tmp_path, requests):
  served.write(tmp_path, ['all', 'dora'])
  config = dataclasses.replace(CONFIG, host_bytes=0)
  engine = Engine(MODEL, served.params(), TOKENIZER, config, tmp_path)
  by_name = {name: next(f for f in requests if f[0].adapter == name) for name in ('all', 'dora')}
  order = ['dora'] * CONFIG.rows + ['all', 'dora', 'all']
  answers = [engine.submit(by_name[name][0]) for name in order]
  engine.step()
  shutil.rmtree(tmp_path / 'all')
  served.run(engine)
  for name, answer in zip(order, answers, strict=True):
    if name == 'all':
      assert (answer.finish, answer.ids) == ('failed', [])
      assert 'adapter_config.json' in answer.error
    else:
      assert answer.ids == by_name[name][1]
  with pytest.raises(UserError, match=r'adapter_config\.json'):
    engine.submit(by_name['all'][0])
  assert served.is_free(engine)


def test_an_adapter_that_is_unloaded_is_still_answered_with(tmp_path, requests):
  served.write(tmp_path, ['all', 'dora'])
  engine = Engine(MODEL, served.params(), TOKENIZER, CONFIG, tmp_path)
  request, ids = next(f for f in requests if f[0].adapter == 'all')
  answers = [engine.submit(request) for _ in range(CONFIG.rows + 1)]
  engine.step()
  engine.unload('all')
  with pytest.raises(UserError, match="no adapter 'all'; there are dora"):
    engine.submit(request)
  # Another one under the same name is not mistaken for it.
  engine.library.add('all', 'dora')
  answers.append(engine.submit(request))
  served.run(engine)
  assert [answer.ids for answer in answers[:-1]] == [ids] * (CONFIG.rows + 1)
  assert answers[-1].ids == served.alone('dora', request.prompt)[0]


def test_a_step_copies_no_cache(warm, optimised):
  """All programs take less beside their arguments than the cache that they write to."""
  rows = jax.eval_shape(lambda: Rows.empty(MODEL.config, CONFIG.rows, 4096, MODEL.dtype))
  cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows.kv))
  state, asked = (*warm._program, rows, warm._chosen), Asked.of(True, True)
  programs = [decode.lower(*state, asked, 4096)]
  for count in (1, CONFIG.rows):
    prompts_PT = np.zeros((count, CONFIG.shortest), np.int32)
    seats = jax.tree.map(lambda *leaves: np.stack(leaves), *[Seat.of(0, NONE, 1, GREEDY)] * count)
    programs.append(read_prompts.lower(*state, prompts_PT, seats, asked))
  for lowered in programs:
    held = lowered.compile().memory_analysis()
    assert held.alias_size_in_bytes >= cache
    assert held.temp_size_in_bytes < cache / 2

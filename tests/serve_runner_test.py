"""An engine in its thread: many who ask at once, those who go away, and how it ends."""

import threading

import pytest
import served
from served import CONFIG, MODEL, TOKENIZER

from lora_jax.errors import UserError
from lora_jax.serve.answer import Request
from lora_jax.serve.engine import Engine
from lora_jax.serve.runner import Runner

NAMES = ['all', 'dora', 'ragged', 'fused']


@pytest.fixture(scope='module')
def engine(tmp_path_factory):
  root = served.write(tmp_path_factory.mktemp('adapters'), NAMES)
  return Engine(MODEL, served.params(), TOKENIZER, CONFIG, root)


@pytest.fixture(scope='module')
def requests():
  return served.clear(['', *NAMES], [3, 9])


def test_all_who_ask_at_once_get_their_own_answer(engine, requests):
  answered, went = {}, []

  def take(at, leaves):
    request, _ = requests[at % len(requests)]
    stream = runner.stream(request)
    if leaves:
      next(stream)
      stream.close()
      went.append(at)
    else:
      answered[at] = ''.join(stream)

  with Runner(engine) as runner:
    threads = [threading.Thread(target=take, args=(at, at % 3 == 2)) for at in range(24)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert len(answered) == 16
  assert len(went) == 8
  for at, text in answered.items():
    assert text == TOKENIZER.decode(requests[at % len(requests)][1])
  assert served.is_free(engine)


def test_closing_gives_answers_to_their_end_or_cuts_them_short(engine, requests):
  for drain, finish in ((True, 'length'), (False, 'failed')):
    began = threading.Event()
    with_end = []
    deliver = lambda answer, piece, ends=with_end, began=began: (
      began.set(),
      ends.append(answer.finish) if answer.finish else None,
    )
    runner = Runner(engine).__enter__()
    answers = [runner.submit(request, deliver) for request, _ in requests]
    assert began.wait(60)
    runner.close(drain)
    assert {answer.finish for answer in answers} <= {finish, 'length'}
    assert answers[-1].finish == finish
    assert len(with_end) == len(answers)
    assert served.is_free(engine)
    with pytest.raises(UserError, match='the server stops'):
      runner.submit(requests[0][0], deliver)
    runner.cancel(answers[0])


def test_mistakes_are_told_to_who_made_them(engine, requests):
  with Runner(engine) as runner:
    with pytest.raises(UserError, match="no adapter 'nope'"):
      runner.unload('nope')
    with pytest.raises(UserError, match='the prompt is empty'):
      next(runner.stream(Request(())))
    runner.unload('fused')
    with pytest.raises(UserError, match="no adapter 'fused'"):
      next(runner.stream(Request((1,), 'fused')))
    request, ids = requests[0]
    assert ''.join(runner.stream(request)) == TOKENIZER.decode(ids)


def test_an_engine_that_breaks_leaves_nobody_waiting(engine, requests, monkeypatch):
  def broken():
    raise RuntimeError('the device is gone')

  runner = Runner(engine).__enter__()
  monkeypatch.setattr(engine, 'step', broken)
  with pytest.raises(UserError, match='the engine stopped: the device is gone'):
    list(runner.stream(requests[0][0]))
  with pytest.raises(UserError, match='the server stops'):
    runner.unload('all')
  with pytest.raises(RuntimeError, match='the device is gone'):
    runner.close()

"""A chat: what is answered, how it streams, and what happens at its edges."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lora_jax import chat, evaluate, lora, terminal_chat
from lora_jax.errors import UserError
from lora_jax.generate import generate
from lora_jax.hub import bases
from lora_jax.sampling import Sampling
from lora_jax.transformer import Transformer

CONTEXT, NEW = 160, 10


@functools.cache
def parts():
  """The tiny base, as it is and with an adapter so strong that it says different things."""
  base = bases.load('tiny')
  params = jax.tree.map(jnp.asarray, base.params)
  fresh = lora.init(jax.random.key(0), params, lora.resolve('all', params), 4)
  strong = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), fresh)
  return Transformer(base.config), params, lora.attach(params, strong, 2.0), base.tokenizer


def answerer(**sampling):
  model, _, _, tokenizer = parts()
  return chat.Answerer(model, tokenizer, CONTEXT, NEW, Sampling(**sampling))


@functools.cache
def greedy():
  return answerer()


@functools.cache
def voices():
  _, params, adapted, _ = parts()
  return {'base': greedy().voice(params), 'adapter': greedy().voice(adapted)}


def by_generate(messages, name):
  model, params, adapted, tokenizer = parts()
  prompt = tokenizer.encode_chat(messages)
  tokens, lengths = evaluate.pad_prompts([prompt], 1)
  held = {'base': params, 'adapter': adapted}[name]
  out = generate(model, held, tokens, lengths, NEW, tokenizer.eos_id)[0].tolist()
  return tokenizer.decode(out[: out.index(tokenizer.eos_id)] if tokenizer.eos_id in out else out)


@pytest.mark.parametrize('name', ['base', 'adapter'])
def test_a_streamed_answer_is_what_generation_says_in_every_turn(name):
  talk = chat.Chat(greedy())
  for text in ('hi', 'and then?'):
    asked = [*talk.messages, {'role': 'user', 'content': text}]
    pieces = list(talk.ask(text, voices()[name]))
    assert ''.join(pieces) == by_generate(asked, name)
    assert [*talk.messages] == [*asked, {'role': 'assistant', 'content': ''.join(pieces)}]
  assert talk.dropped == 0


def test_the_oldest_turns_go_where_the_context_ends():
  talk = chat.Chat(greedy(), system='s')
  dropped = []
  for i in range(6):
    list(talk.ask(f'question {i}', voices()['base']))
    dropped.append(talk.dropped)
    *asked, _ = talk.messages
    assert len(parts()[3].encode_chat(asked)) <= CONTEXT - NEW
    assert asked[0] == {'role': 'system', 'content': 's'}
  assert dropped[0] == 0
  assert max(dropped) == 2
  assert len(talk.messages) < 1 + 2 * 6


def test_a_turn_too_long_is_refused_and_forgotten():
  talk = chat.Chat(greedy())
  list(talk.ask('hi', voices()['base']))
  before = talk.messages
  with pytest.raises(UserError, match='longer than 150 tokens'):
    list(talk.ask('x' * 200, voices()['base']))
  assert talk.messages == before


def test_the_seed_decides_what_is_drawn():
  say = lambda seed: [
    ''.join(chat.Chat(one).ask('hi', voices()['base']))
    for one in [answerer(temperature=1.0, seed=seed)]
    for _ in range(2)
  ]
  assert say(0) == say(0)
  assert say(0) != say(1)
  # An answer given again is another.
  assert len({*say(0)}) == 2


def converse(lines, names=('base', 'adapter'), interrupted=None):
  """What `talk` writes and notes, given these lines."""
  given, written, noted = iter(lines), [], []

  def ask():
    try:
      return next(given)
    except StopIteration:
      raise EOFError from None

  def write(text):
    if text != '\n' and len(written) == interrupted:
      raise KeyboardInterrupt
    written.append(text)

  talk = chat.Chat(greedy())
  terminal_chat.talk(talk, {name: voices()[name] for name in names}, ask, write, noted.append)
  return talk, ''.join(written), noted


def test_commands_switch_forget_and_leave():
  expected = {name: by_generate([{'role': 'user', 'content': 'hi'}], name) for name in voices()}
  assert expected['base'] != expected['adapter']
  lines = ['hi', '/reset', '/base', 'hi', '', '/reset', '/adapter', 'hi', '/exit', 'never']
  talk, written, noted = converse(lines)
  clean = lambda text: terminal_chat._CONTROL.sub('', text) + '\n'
  order = ('adapter', 'base', 'adapter')
  assert written == ''.join(clean(expected[name]) for name in order)
  assert len(talk.messages) == 2
  assert noted[1] == 'the base answers from here on'


def test_unknown_commands_and_missing_adapters_are_said():
  _, written, noted = converse(['/nope', '/adapter', '/ is no command'], names=('base',))
  assert 'unknown command /nope; there are /base' in noted[0]
  assert 'start with --adapter' in noted[1]
  assert written.endswith('\n')


def test_an_interrupt_keeps_what_was_said_and_the_chat_goes_on():
  talk, _, noted = converse(['hi', 'and?'], interrupted=2)
  assert noted == ['stopped; Ctrl-C again to leave']
  roles = [message['role'] for message in talk.messages]
  assert roles == ['user', 'assistant'] * 2
  whole = by_generate(talk.messages[:1], 'adapter')
  assert whole.startswith(talk.messages[1]['content'])
  assert len(talk.messages[1]['content']) < len(whole)


def test_an_interrupt_where_nothing_is_under_way_leaves():
  def ask():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    terminal_chat.talk(chat.Chat(greedy()), voices(), ask, print, print)

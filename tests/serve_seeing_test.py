"""Images in chats: what a base that sees answers to them, and what is no image."""

import asyncio
import base64
import dataclasses
import io

import httpx2
import openai
import pytest
import seeing
import served_http
import tiny_model
import tiny_vlm
from PIL import Image
from seeing import EYES, TASK
from served_http import BASE, KEY

from lora_jax import evaluate
from lora_jax.config import LoraConfig
from lora_jax.data import encode
from lora_jax.errors import UserError
from lora_jax.hub import adapters, bases, peft
from lora_jax.programs import Programs
from lora_jax.serve.config import ServeConfig
from lora_jax.serve.engine import Engine
from lora_jax.serve.looking import Looker

CONFIG = ServeConfig(
  rows=3, length=tiny_vlm.CONFIG.max_length, shortest=128, slots=2, rank=4, host_bytes=100_000
)
NAMES, NEW = ('', 'mine', 'other'), 8


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return bases.load(str(tiny_vlm.write(tmp_path_factory.mktemp('checkpoint'))))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  path = tmp_path_factory.mktemp('adapters')
  for seed, (name, targets) in enumerate((('mine', 'o_proj,fc2'), ('other', 'qkv'))):
    tree = tiny_model.trained_adapters(targets, seed, tiny_vlm.params())
    config = LoraConfig(rank=tiny_model.RANK, alpha=16.0)
    peft.save(path / name, peft.of(tree, config, sees=True))
  return path


@pytest.fixture(scope='module')
def engine(base, root):
  held = Engine(tiny_vlm.MODEL, tiny_vlm.params(), base.tokenizer, CONFIG, root, base.images)
  held.warm_up()
  return held


@pytest.fixture(scope='module')
def server(engine, base):
  with served_http.running(engine, base.tokenizer, body=200_000) as held:
    yield held


@pytest.fixture
def client(server):
  with server.client() as held:
    yield held
  assert server.is_free()


@pytest.fixture(scope='module')
def offline(base, root, tmp_path_factory):
  """Rows with images and without, and what `evaluate` has each adapter say to them."""
  examples = seeing.rows(7)
  rows, sight = seeing.looked(tmp_path_factory.mktemp('seen'), examples)
  del rows
  prompt = lambda one: encode.encode_prompt(TASK, one, base.tokenizer, 480, EYES)
  questions = evaluate.Questions(
    TASK,
    examples,
    [prompt(one) for one in examples],
    base.tokenizer,
    NEW,
    eyes=EYES,
    pictures=[encode.pictures(TASK, one, EYES) for one in examples],
    features=sight.files,
  )
  said = {}
  for name in NAMES:
    params = tiny_vlm.params()
    if name:
      params = adapters.attach(params, peft.load(root / name, params))
    scored = evaluate.score_task(tiny_vlm.MODEL, params, questions, batch_rows=3)
    said[name] = [row.prediction for row in scored.rows]
  assert len({*said[''], *said['mine'], *said['other']}) > 2 * len(examples)
  return examples, said


def url(data, kind='png'):
  return f'data:image/{kind};base64,{base64.b64encode(data).decode()}'


def part(data, **more):
  return {'type': 'image_url', 'image_url': {'url': url(data), **more}}


def turns(example):
  """As the dataset's rows are posed."""
  text = TASK.prompt(example).text()
  shown = [part(data, detail='auto') for data in example['images']]
  content = [*shown, {'type': 'text', 'text': text}] if shown else text
  return [{'role': 'user', 'content': content}]


def test_answers_are_those_of_evaluate_in_one_batch_with_texts(server, engine, offline):
  examples, said = offline

  async def ask(client, name, i):
    held = await client.chat.completions.create(
      model=name or BASE, messages=turns(examples[i]), max_tokens=NEW, temperature=0
    )
    assert held.choices[0].message.content == said[name][i]
    return held.usage.prompt_tokens

  async def all_at_once():
    async with server.client(openai.AsyncOpenAI) as client:
      cases = [(name, i) for i in range(len(examples)) for name in NAMES]
      read = await asyncio.gather(*(ask(client, *case) for case in cases))
      return dict(zip(cases, read, strict=True))

  before = engine.looker.looked_at
  with Programs() as programs:
    read = asyncio.run(all_at_once())
  assert programs.count == 0
  # Each image once, whoever it was shown to.
  images = [image for example in examples for image in example['images']]
  assert engine.looker.looked_at - before == len({*images})
  # Images are in the count of tokens.
  assert read['', 2] > read['', 0] + 2 * 3 * tiny_vlm.TOKENS
  assert server.is_free()


def test_a_chat_goes_on_after_an_image_and_may_be_a_stream(client, offline, engine):
  examples, said = offline
  asked = turns(examples[1])
  before = engine.looker.looked_at
  ask = {'model': 'mine', 'max_tokens': NEW, 'temperature': 0}
  stream = client.chat.completions.create(**ask, messages=asked, stream=True)
  text = ''.join(chunk.choices[0].delta.content or '' for chunk in stream)
  assert text == said['mine'][1]
  more = [
    *asked,
    {'role': 'assistant', 'content': text or '.'},
    {'role': 'user', 'content': 'Why?'},
  ]
  client.chat.completions.create(**ask, messages=more)
  # Its features are kept from turn to turn.
  assert engine.looker.looked_at == before


def test_what_is_written_is_no_image(client, engine):
  before = engine.looker.looked_at
  for text in ('<image>', '<fake_token_around_image><global-img><image>'):
    ask = {'model': BASE, 'messages': [{'role': 'user', 'content': text}], 'max_tokens': 2}
    held = client.chat.completions.create(**ask)
    assert held.usage.prompt_tokens > len(text)
  client.completions.create(model=BASE, prompt=[tiny_vlm.IMAGE_TOKEN] * 3, max_tokens=2)
  assert engine.looker.looked_at == before


def huge():
  """A small file that says it is large."""
  stream = io.BytesIO()
  Image.new('1', (2**13 + 1, 2**13 + 1)).save(stream, 'PNG')
  return stream.getvalue()


def test_what_is_no_image_is_refused_in_one_line(server, engine):
  whole = seeing.encoded()
  of = lambda held: {'type': 'image_url', 'image_url': held}
  cases = [
    (of({'url': 'http://127.0.0.1:1/a.png'}), 400, 'nothing is fetched'),
    (of({'url': 'https://example.com/a.png'}), 400, 'nothing is fetched'),
    (of({'url': 'file:///etc/passwd'}), 400, 'nothing is fetched'),
    (of({'url': '/etc/passwd'}), 400, 'nothing is fetched'),
    (of({'url': 'data:text/plain;base64,QUFB'}), 400, 'nothing is fetched'),
    (of({'url': 'data:image/png,AAA'}), 400, 'nothing is fetched'),
    (of({'url': 'data:image/png;base64,A*A'}), 400, 'no base64'),
    (of({'url': 'data:image/png;base64,'}), 400, 'empty'),
    (of({'url': 3}), 400, 'image_url is'),
    (of(None), 400, 'image_url is'),
    (part(whole, detail='low'), 400, "'low'"),
    (part(b'no image at all'), 400, 'messages.0.content.1: its image (15 bytes) is damaged'),
    (part(b'%!PS-Adobe-3.0 EPSF-3.0'), 400, 'is damaged, or of a kind'),
    (part(whole[:-200]), 400, 'damaged or cut short'),
    (part(huge()), 400, 'scale it down'),
    ({'type': 'input_audio'}, 400, 'every part is'),
    (part(b'x' * 200_000), 413, '200000 bytes'),
  ]
  headers = {'Authorization': f'Bearer {KEY}'}
  with httpx2.Client(base_url=server.url, headers=headers, timeout=60) as raw:
    before = engine.looker.looked_at
    ask = lambda parts: raw.post(
      '/v1/chat/completions',
      json={'model': BASE, 'messages': [{'role': 'user', 'content': parts}], 'max_tokens': 2},
    )
    text = {'type': 'text', 'text': 'What?'}
    for bad, status, says in cases:
      held = ask([text, bad])
      message = held.json()['error']['message']
      assert (held.status_code, '\n' in message) == (status, False), message
      assert says in message
    # More than there is room for is known before any is looked at.
    held = ask([text, *[part(seeing.encoded(kind='JPEG'))] * 20])
    assert (held.status_code, 'there is room for' in held.text) == (400, True)
    assert engine.looker.looked_at == before
    # What is asked next is answered.
    assert ask([text, part(whole)]).status_code == 200
    assert ask([text, of(url(whole, 'jpeg'))]).status_code == 200
  assert server.is_free()


def test_the_latest_images_are_kept_as_far_as_there_is_room():
  data = [seeing.encoded(20, 50, seed=seed) for seed in range(3)]
  params = tiny_vlm.params()
  one = Looker(tiny_vlm.MODEL, params, tiny_vlm.IMAGES).look
  looker = Looker(tiny_vlm.MODEL, params, tiny_vlm.IMAGES)
  shown = [looker.shown(image, 'here') for image in data]
  size = one(shown[:1]).nbytes
  looker = Looker(tiny_vlm.MODEL, params, tiny_vlm.IMAGES, room=2 * size)
  for order, looks in (((0, 1, 0), 2), ((2, 0), 3), ((1,), 4), ((0, 1), 4), ((2,), 5)):
    held = looker.look([shown[i] for i in order])
    assert held.shape == (3 * tiny_vlm.TOKENS * len(order), tiny_vlm.CONFIG.model_dim)
    assert looker.looked_at == looks
    assert (held == one([shown[i] for i in order])).all()
  # What is kept is not looked at again, and what is damaged is never kept.
  bad = dataclasses.replace(shown[2], data=data[2][:-100])
  assert (looker.look([bad]) == one(shown[2:])).all()
  looker = Looker(tiny_vlm.MODEL, params, tiny_vlm.IMAGES)
  for _ in range(2):
    with pytest.raises(UserError, match='here: its image is damaged or cut short'):
      looker.look([bad])

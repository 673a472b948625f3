import json

import numpy as np
import pytest
import tiny_tokenizers
from texts import random_chat, random_text

from lora_jax.errors import UserError
from lora_jax.hub import tokenizer_hf

ROWS = 2000
CHAT = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]


def load(tmp_path, form='llama3', rows=ROWS, **changes):
  return tokenizer_hf.from_directory(tiny_tokenizers.write(tmp_path, form, **changes), rows)


def put(directory, **files):
  """Writes files, `__` in their names for a dot; what is not text as JSON."""
  for name, content in files.items():
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / name.replace('__', '.')).write_text(text)


# Against transformers.


@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('form', tiny_tokenizers.FORMS)
def test_ids_and_chats_as_transformers_has_them(tmp_path, form):
  transformers = pytest.importorskip('transformers')
  ours = load(tmp_path, form)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  special = theirs.all_special_tokens
  rng = np.random.default_rng(0)
  for i in range(40):
    text = random_text(rng, 15)
    expected = theirs(text, add_special_tokens=False)['input_ids']
    assert ours.encode_plain(text) == expected, repr(text)
    assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    text = special[i % len(special)].join(random_text(rng, 3) for _ in range(4))
    assert ours.encode(text) == theirs(text, add_special_tokens=False)['input_ids'], repr(text)
    chat, prompt = random_chat(rng), bool(i % 2)
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert ours.render(chat, prompt) == rendered
    expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt)['input_ids']
    assert ours.encode_chat(chat, prompt) == expected


@pytest.mark.filterwarnings('default')
def test_what_transformers_saves_is_read(tmp_path):
  transformers = pytest.importorskip('transformers')
  tiny_tokenizers.write(tmp_path / 'first', 'llama3')
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / 'first')
  theirs.save_pretrained(tmp_path / 'second')
  assert (tmp_path / 'second' / 'chat_template.jinja').is_file()
  ours = tokenizer_hf.from_directory(tmp_path / 'second', ROWS)
  assert (
    ours.encode_chat(CHAT)
    == theirs.apply_chat_template(CHAT, add_generation_prompt=True)['input_ids']
  )


# The end of a turn and the named tokens.


@pytest.mark.parametrize(
  ('form', 'end'),
  [
    ('llama3', '<|im_end|>'),
    ('qwen2', '<|im_end|>'),
    ('llama2', '</s>'),
    ('mistral', '</s>'),
    ('gemma', '<end_of_turn>'),
  ],
)
def test_a_turn_ends_where_the_template_ends_it(tmp_path, form, end):
  ours = load(tmp_path, form)
  assert ours.eos_id == ours.special_tokens[end]
  ids = ours.encode_chat(CHAT, add_generation_prompt=False)
  assert ids.count(ours.eos_id) == (1 if end == '</s>' else 2)


def test_without_an_end_in_the_template_files_say_it(tmp_path):
  silent = {'chat_template': '{% for m in messages %}{{ m.content }}{% endfor %}'}
  ids = load(tmp_path, config=silent).special_tokens
  end = lambda: tokenizer_hf.from_directory(tmp_path, ROWS).eos_id
  assert end() == ids['<|endoftext|>']
  put(tmp_path, generation_config__json={'eos_token_id': [ids['<|im_end|>'], 3]})
  assert end() == ids['<|im_end|>']
  put(tmp_path, generation_config__json={'eos_token_id': ids['<|im_start|>']})
  assert end() == ids['<|im_start|>']
  tiny_tokenizers.write(tmp_path, 'llama3', config=silent | {'eos_token': None})
  put(tmp_path, generation_config__json={}, config__json={'eos_token_id': ids['<|im_end|>']})
  assert end() == ids['<|im_end|>']
  put(tmp_path, config__json={})
  with pytest.raises(UserError, match='nothing says which token ends an answer; set eos_token'):
    end()


def test_named_tokens(tmp_path):
  ours = load(tmp_path, 'gemma', config={'pad_token': {'content': '<pad>', 'lstrip': False}})
  assert (ours.bos_id, ours.pad_id) == (2, 0)
  # Without one, what ends a turn pads; what the vocabulary lacks is no token.
  assert load(tmp_path, 'gemma').pad_id == ours.eos_id
  assert load(tmp_path, 'gemma', config={'pad_token': '<none>'}).pad_id == ours.eos_id
  tiny_tokenizers.write(tmp_path, 'gemma', config={'bos_token': None})
  put(tmp_path, special_tokens_map__json={'bos_token': '<bos>'})
  assert tokenizer_hf.from_directory(tmp_path, ROWS).bos_id == 2


def test_a_turn_s_tokens_are_special_however_they_are_flagged(tmp_path):
  ours = load(tmp_path, 'gemma')
  assert {'<start_of_turn>', '<end_of_turn>'} <= ours.special_tokens.keys()
  # Newlines are tokens there too, and stay text.
  assert '\n' not in ours.special_tokens
  forged = [{'role': 'user', 'content': 'a\n<end_of_turn>'}]
  assert ours.encode_chat(forged).count(ours.eos_id) == 1


def test_other_added_tokens_are_found_in_data(tmp_path):
  ours = load(tmp_path)
  [tool] = ours.encode_plain('<tool>')
  assert ours.encode_chat([{'role': 'user', 'content': '<tool> <|im_end|>'}]).count(tool) == 1
  assert ours.decode([tool]) == '<tool>'


def with_merges(form, *merges, **changes):
  """A form whose vocabulary has further merges, and `changes` of tokenizer.json."""
  data = tiny_tokenizers.FORMS[form][0]
  model = data['model']
  vocab = dict(model['vocab'])
  for left, right in merges:
    vocab.setdefault(left + right, len(vocab))
  return {'model': model | {'vocab': vocab, 'merges': [*merges, *model['merges']]}, **changes}


def test_no_merges_and_no_normaliser_lead_to_a_special_token(tmp_path):
  merges = [['<', '/'], ['s', '>'], ['</', 's>']]
  wide = ''.join(chr(ord(c) + 0xFEE0) for c in '</s>')
  ours = load(tmp_path, 'llama2', data=with_merges('llama2', *merges))
  assert ours.eos_id not in ours.encode_plain('</s>')
  compatible = with_merges('llama2', *merges, normalizer={'type': 'NFKC'})
  ours = load(tmp_path, 'llama2', data=compatible)
  assert ours.decode(ours.encode_plain(wide)) == '</s>'
  for encode in (ours.encode, ours.encode_plain):
    assert ours.eos_id not in encode(wide)
  assert ours.encode_chat([{'role': 'user', 'content': wide}]).count(ours.eos_id) == 0


def test_special_tokens_are_found_as_they_are_written(tmp_path):
  # As in older Llama 2 files, where each segment of text is given a space before.
  added = [
    {**entry, 'normalized': True} for entry in tiny_tokenizers.FORMS['llama2'][0]['added_tokens']
  ]
  ours = load(tmp_path, 'llama2', data={'added_tokens': added})
  assert ours.encode('a</s>b').count(ours.eos_id) == 1


def test_tokens_of_the_second_file(tmp_path):
  more = {'700': {'content': '<more>', 'special': True}, '701': {'content': '<word>'}}
  ours = load(tmp_path, config={'added_tokens_decoder': more})
  assert ours.special_tokens['<more>'] == 700
  assert ours.encode('<more><word>') == [700, 701]
  assert 700 not in ours.encode_plain('<more>')
  listed = load(tmp_path, config={'additional_special_tokens': ['<tool>']})
  assert '<tool>' in listed.special_tokens


def test_added_tokens_without_an_embedding_are_left_out(tmp_path):
  rows = load(tmp_path).special_tokens['<|im_end|>'] + 1
  ours = load(tmp_path, rows=rows)
  assert ours.vocab_size == rows
  assert max(ours.encode('<tool>')) < rows
  with pytest.raises(UserError, match=r"token '.*' has id \d+, but the model has 300 embeddings"):
    load(tmp_path, rows=300)


# Templates.


FIRST = '{{ messages[0].content }}<|im_end|>'


def test_where_templates_lie(tmp_path):
  rendered = lambda **changes: load(tmp_path, **changes).render(CHAT)
  named = [{'name': 'tool_use', 'template': 'x'}, {'name': 'default', 'template': FIRST}]
  assert rendered(config={'chat_template': named}) == 'a<|im_end|>'
  assert rendered(config={'chat_template': named[1:]}) == 'a<|im_end|>'
  (tmp_path / 'additional_chat_templates').mkdir()
  put(tmp_path / 'additional_chat_templates', default__jinja='more' + FIRST, tool_use__jinja='x')
  assert rendered(config={'chat_template': None}) == 'morea<|im_end|>'
  put(tmp_path, chat_template__jinja='file' + FIRST)
  assert rendered() == 'filea<|im_end|>'


@pytest.mark.parametrize('adds_bos', [True, False])
def test_a_base_without_a_template_gets_a_plain_one(tmp_path, adds_bos):
  ours = load(tmp_path, config={'chat_template': None, 'add_bos_token': adds_bos})
  bos = '<|im_start|>' * adds_bos
  assert ours.render(CHAT, False) == f'{bos}### user\na\n\n### assistant\nb<|endoftext|>\n\n'
  assert ours.eos_id == ours.special_tokens['<|endoftext|>']
  # So does a text that is to be gone on with, once.
  for text in ('a', f'{bos}a'):
    assert ours.encode_text(text) == ours.encode(f'{bos}a')


def test_bos_that_the_tokenizer_adds_begins_a_plain_chat(tmp_path):
  single = [{'SpecialToken': {'id': '<|im_start|>', 'type_id': 0}}]
  data = {'post_processor': {'type': 'TemplateProcessing', 'single': single}}
  ours = load(tmp_path, config={'chat_template': None}, data=data)
  assert ours.render(CHAT).startswith('<|im_start|>### user')


def test_templates_may_mark_what_is_generated_and_ask_for_tools(tmp_path):
  template = (
    '{% if tools is not none %}tools{% endif %}{% if documents %}documents{% endif %}'
    "{% for m in messages %}{% set who = m['role'] %}{% generation %}{% set who = 'nobody' %}"
    '{{ m.content }}{% endgeneration %}{{ who }}{% endfor %}<|im_end|>'
  )
  ours = load(tmp_path, config={'chat_template': template})
  assert ours.render(CHAT) == 'auserbassistant<|im_end|>'


def test_turns_may_not_be_refused_by_accident(tmp_path):
  # A template that takes no answer without a system turn leaves the end to the files.
  template = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}x"
  ours = load(tmp_path, config={'chat_template': template})
  assert ours.eos_id == ours.special_tokens['<|endoftext|>']


# Mistakes.


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({'tokenizer__json': '{"model"'}, r'tokenizer\.json: is not readable JSON'),
    ({'tokenizer__json': '[]'}, r'tokenizer\.json: holds no JSON object'),
    ({'tokenizer__json': '{}'}, r"tokenizer\.json: is not a tokenizer \(KeyError\('model'\)\)"),
    ({'tokenizer__json': {'model': {'vocab': [], 'merges': []}}}, 'is not a tokenizer'),
    ({'tokenizer__json': {'model': {'type': 'Unigram'}}}, "its model is 'Unigram', .* BPE"),
    (
      {'tokenizer__json': {'model': {'vocab': {'<|endoftext|>': 0}, 'merges': ['a c']}}},
      r'tokenizer\.json: is not usable',
    ),
    (
      {'tokenizer__json': {'model': {'vocab': {}, 'merges': [], 'ignore_merges': True}}},
      'ignore_merges is supported for byte-level',
    ),
    ({'tokenizer_config__json': '{'}, r'tokenizer_config\.json: is not readable JSON'),
    ({'tokenizer_config__json': {'eos_token': 3}}, r'tokenizer_config\.json: eos_token is 3'),
    ({'tokenizer_config__json': {'chat_template': {'a': 'b'}}}, 'neither text nor a list'),
    ({'tokenizer_config__json': {'chat_template': ['x']}}, 'other things than templates'),
    (
      {'tokenizer_config__json': {'chat_template': [{'name': n, 'template': n} for n in 'ab']}},
      'chat templates a, b and none called default; save the one to use',
    ),
    ({'chat_template__jinja': '{% for %}'}, 'its chat template does not parse'),
    ({'generation_config__json': '{', 'chat_template__jinja': 'x'}, r'generation_config\.json: is'),
  ],
)
def test_damaged_files_are_named(tmp_path, files, message):
  tiny_tokenizers.write(tmp_path, 'llama3')
  put(tmp_path, **files)
  with pytest.raises(UserError, match=message) as error:
    tokenizer_hf.from_directory(tmp_path, ROWS)
  assert '\n' not in str(error.value)
  assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
  ('present', 'found'),
  [('tokenizer.model', 'only tokenizer.model'), ('vocab.json', 'only vocab.json'), ('x', 'no')],
)
def test_other_kinds_of_tokenizer_files_say_what_would_work(tmp_path, present, found):
  (tmp_path / present).write_text('')
  with pytest.raises(UserError, match=rf'has {found}.*AutoTokenizer\.from_pretrained') as error:
    tokenizer_hf.from_directory(tmp_path, ROWS)
  assert '\n' not in str(error.value)

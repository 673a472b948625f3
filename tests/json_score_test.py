"""Properties of the JSON scores on random objects."""

import copy
import json
import random

import pytest

from lora_jax.data import json_score


def _random_value(rng, depth=0):
  kind = rng.randrange(6 if depth < 3 else 4)
  if kind == 4:
    return [_random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
  if kind == 5:
    return _random_object(rng, depth + 1)
  return (rng.choice(('Ash Ltd', '5.00', '', 'naïve {brace}')), rng.randrange(50), None, True)[kind]


def _random_object(rng, depth=0):
  keys = rng.sample('abcdef', rng.randint(1, 4))
  return {key: _random_value(rng, depth) for key in keys}


def _shuffled(rng, value):
  if isinstance(value, dict):
    keys = rng.sample(list(value), len(value))
    return {key: _shuffled(rng, value[key]) for key in keys}
  if isinstance(value, list):
    return [_shuffled(rng, child) for child in value]
  return value


def _break_one_leaf(rng, value):
  """A copy of a non-empty object with one leaf replaced by a text found nowhere else."""
  broken = copy.deepcopy(value)
  parent, key = broken, rng.choice(list(broken))
  while isinstance(parent[key], dict | list) and parent[key]:
    parent = parent[key]
    key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
  parent[key] = 'zzzz'
  return broken


@pytest.mark.parametrize('seed', range(30))
def test_equal_objects_score_one_whatever_the_key_order(seed):
  rng = random.Random(seed)
  gold = _random_object(rng)
  shuffled = _shuffled(rng, gold)
  assert json_score.parse_object(json_score.compact(gold)) == gold
  assert json_score.leaf_f1(shuffled, gold) == 1.0
  assert json_score.tree_similarity(shuffled, gold) == 1.0


@pytest.mark.parametrize('seed', range(30))
def test_breaking_leaves_only_lowers_the_scores(seed):
  rng = random.Random(seed)
  gold = _random_object(rng)
  broken = _break_one_leaf(rng, gold)
  assert 0.0 <= json_score.leaf_f1(broken, gold) < 1.0
  assert 0.0 <= json_score.tree_similarity(broken, gold) < 1.0
  ruined = dict.fromkeys(gold, 'yyyyy')
  assert json_score.leaf_f1(ruined, gold) <= json_score.leaf_f1(broken, gold)
  assert json_score.tree_similarity(ruined, gold) <= json_score.tree_similarity(broken, gold)


@pytest.mark.parametrize('seed', range(20))
def test_f1_is_symmetric_and_bounded(seed):
  rng = random.Random(seed)
  a, b = (rng.choices('abcde', k=rng.randrange(7)) for _ in range(2))
  assert json_score.multiset_f1(a, b) == json_score.multiset_f1(b, a)
  assert 0.0 <= json_score.multiset_f1(a, b) <= 1.0
  assert (json_score.multiset_f1(a, b) == 1.0) == (sorted(a) == sorted(b))


def test_f1_counts_repeats():
  assert json_score.multiset_f1('aab', 'abb') == pytest.approx(2 / 3)


def test_a_missed_item_does_not_spoil_the_next():
  gold = {'items': [{'n': 'tea'}, {'n': 'rice'}, {'n': 'oil'}]}
  assert json_score.leaf_f1({'items': gold['items'][1:]}, gold) == pytest.approx(0.8)


def test_tree_similarity_is_one_less_the_share_of_edited_nodes():
  gold = {'company': 'Ash', 'total': '5.00'}  # two keys and two leaves: four nodes
  assert json_score.tree_similarity({'company': 'Ash'}, gold) == pytest.approx(0.5)
  assert json_score.tree_similarity({'company': 'Ash', 'total': '5.10'}, gold) == pytest.approx(
    1 - (1 / 4) / 4
  )
  assert json_score.tree_similarity({'x': {'y': {'z': [1, 2, 3, 4, 5]}}}, gold) == 0.0


@pytest.mark.parametrize(
  'text',
  [
    '{"a": "1"}',
    '```json\n{"a": "1"}\n```',
    'Here it is: {"a": "1"} Anything else? {"b"',
    '\n {"a"\n:"1"}',
  ],
)
def test_words_and_fences_around_the_object_are_forgiven(text):
  assert json_score.parse_object(text) == {'a': '1'}


@pytest.mark.parametrize(
  'text',
  [
    '',
    'none',
    '[1, 2]',
    '{"a": "1"',
    "{'a': 1}",
    '{"a": 1,}',
    '{"a"}',
    '{"a":' + '[' * 5000,
    '{"a":' * 200 + '1' + '}' * 200,
    '{"a": ' + '9' * 5000 + '}',
  ],
)
def test_invalid_json_is_none(text):
  assert json_score.parse_object(text) is None


def test_normalise_drops_case_punctuation_and_space():
  assert json_score.normalise(' Serial  No.\n108-46 ') == json_score.normalise('SERIAL NO 108 46')
  assert json_score.normalise('Serial No. 108-46') != json_score.normalise('Serial No. 108-47')


def test_compact_is_json_without_spaces():
  value = {'a b': ['ü', 1, None]}
  assert json_score.compact(value) == '{"a b":["ü",1,null]}'
  assert json.loads(json_score.compact(value)) == value

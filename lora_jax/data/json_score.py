"""How close a predicted JSON object is to the true one: field scores and tree edit distance.

  parse_object('Sure: {"total": "5.00"}')                   {'total': '5.00'}
  leaf_f1({'total': '5.00'}, {'total': '5.00', 'date': 'x'})   2/3

A value is compared by its text, so the number 5 equals the string '5': a base that
leaves out the quotes has still read the field. The order of an object's keys never
counts.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, cast

import zss

# Deeper than any record of the study; a model that repeats '[' must not cost a stack overflow.
_MAX_DEPTH = 32


def compact(value: Any) -> str:
  """JSON text without spaces: every character of a target costs the model."""
  return json.dumps(value, ensure_ascii=False, separators=(',', ':'))


def parse_object(text: str) -> dict[str, Any] | None:
  """The first JSON object in `text`, or None where there is none.

  Words around the object and a Markdown fence are forgiven; a brace that is never
  closed, a trailing comma or a single quote is not.
  """
  start = text.find('{')
  if start < 0:
    return None
  try:
    value, _ = json.JSONDecoder().raw_decode(text, start)
  except (ValueError, RecursionError):
    return None
  return value if _depth_within(value, _MAX_DEPTH) else None


def _depth_within(value: Any, limit: int) -> bool:
  layer = [value]
  for _ in range(limit):
    layer = [child for item in layer for child in _children(item)]
    if not layer:
      return True
  return False


def _children(value: Any) -> Iterable[Any]:
  if isinstance(value, dict):
    return value.values()
  return value if isinstance(value, list) else ()


def scalar_text(value: Any) -> str:
  """The text by which a leaf is compared: a string itself, anything else its JSON."""
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def normalise(text: str) -> str:
  """Lower case, punctuation as a space, runs of space as one."""
  return re.sub(r'[\W_]+', ' ', text.casefold()).strip()


def multiset_f1(predicted: Iterable[Any], gold: Iterable[Any]) -> float:
  """F1 of two multisets of hashable items, in 0..1; two empty ones agree fully."""
  predicted_counts, gold_counts = Counter(predicted), Counter(gold)
  size = predicted_counts.total() + gold_counts.total()
  if size == 0:
    return 1.0
  return 2 * (predicted_counts & gold_counts).total() / size


def leaves(value: Any, path: str = '') -> Iterator[tuple[str, str]]:
  """(path, text) of every leaf, such as ('items[].price', '5.00').

  A list's position is not part of the path, so an item that is missed does not
  spoil those after it. An empty object or list is a leaf.
  """
  if isinstance(value, dict) and value:
    for key, child in value.items():
      yield from leaves(child, f'{path}.{key}' if path else key)
  elif isinstance(value, list) and value:
    for child in value:
      yield from leaves(child, f'{path}[]')
  else:
    yield path, scalar_text(value)


def leaf_f1(predicted: Any, gold: Any) -> float:
  """F1 over (path, text) leaves with exact text: SROIE task 3, extended to nested JSON."""
  return multiset_f1(leaves(predicted), leaves(gold))


def tree_similarity(predicted: Any, gold: Any) -> float:
  """1 - min(1, TED(predicted, gold) / TED(nothing, gold)), in 0..1.

  The normalised tree edit distance of Donut (Kim et al. 2022, section 3.1), by
  Zhang and Shasha's algorithm. Adding, dropping or renaming a node costs 1, and
  changing one leaf into another the share of its characters that must be edited,
  so that no field outweighs the others by its length. 1 exactly where the two are
  equal (in the sense of this module); order counts in lists only.
  """
  gold_tree = _tree(gold)
  distance = zss.distance(
    _tree(predicted),
    gold_tree,
    get_children=zss.Node.get_children,
    insert_cost=lambda node: 1.0,
    remove_cost=lambda node: 1.0,
    update_cost=_relabel_cost,
  )
  gold_size = sum(1 for _ in gold_tree.iter()) - 1  # the root is on both sides
  return 1.0 - min(1.0, float(cast(float, distance)) / gold_size)


def _tree(value: Any) -> zss.Node:
  root = zss.Node(('root', ''))
  _grow(root, value)
  return root


def _grow(parent: zss.Node, value: Any) -> None:
  if isinstance(value, dict) and value:
    for key in sorted(value):
      node = zss.Node(('key', key))
      parent.addkid(node)
      _grow(node, value[key])
  elif isinstance(value, list) and value:
    for child in value:
      node = zss.Node(('item', ''))
      parent.addkid(node)
      _grow(node, child)
  else:
    parent.addkid(zss.Node(('leaf', scalar_text(value))))


def _relabel_cost(a: zss.Node, b: zss.Node) -> float:
  (a_kind, a_text), (b_kind, b_text) = a.label, b.label
  if a.label == b.label:
    return 0.0
  if a_kind == b_kind == 'leaf':
    return _edit_distance(a_text, b_text) / max(len(a_text), len(b_text))
  return 1.0


@functools.lru_cache(maxsize=4096)
def _edit_distance(a: str, b: str) -> int:
  row = list(range(len(b) + 1))
  for i, a_char in enumerate(a, start=1):
    diagonal, row[0] = row[0], i
    for j, b_char in enumerate(b, start=1):
      diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a_char != b_char))
  return row[-1]

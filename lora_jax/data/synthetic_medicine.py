"""Medical questions composed from a small knowledge graph (`lora_jax.data.medicine_facts`).

`choice_rows` asks for one fact; `reasoning_rows` asks for a fact two steps away and
spells out the path. Each question wording is used once before any comes back with
other options.
"""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

from lora_jax.data import medicine_facts as facts
from lora_jax.data.medicine_facts import Relation

LETTERS = 'ABCD'


@dataclasses.dataclass(frozen=True)
class _Chain:
  """Two relations joined: the y of `first` is the x of `second`; asks x -> last y."""

  first: Relation
  second: Relation
  wordings: tuple[str, ...]


_CHAINS = (
  _Chain(
    facts.DEFICIENCY,
    facts.NUTRIENT_ROLE,
    (
      'What is the role of the nutrient that is lacking in {x}?',
      'A patient has {x}. What is the missing nutrient needed for?',
      'Which process suffers first in {x}?',
    ),
  ),
  _Chain(
    facts.ORGANISM,
    facts.ORGANISM_KIND,
    (
      'What kind of organism causes {x}?',
      'A patient has {x}. The laboratory would report a',
      'The agent of {x} is a',
    ),
  ),
  _Chain(
    facts.DRUG_CLASS,
    facts.CLASS_ACTION,
    (
      'How does {x} act?',
      'A patient takes {x}. What does the drug do?',
      'What is the mechanism of {x}?',
    ),
  ),
  _Chain(
    facts.DRUG_CLASS,
    facts.CLASS_HARM,
    (
      'Which harm is typical of {x}?',
      'A patient takes {x}. Which harm should be watched for?',
      'Which harm is {x} best known for?',
    ),
  ),
  _Chain(
    facts.ENZYME,
    facts.ENZYME_STORE,
    (
      'Which substance accumulates in {x}?',
      'A child has {x}. What builds up in the body?',
      'What would be raised in {x}?',
    ),
  ),
  _Chain(
    facts.ANTIDOTE,
    facts.ANTIDOTE_ACTION,
    (
      'How does the antidote for {x} work?',
      'A patient with {x} gets the antidote. It works because it',
      'What does the drug that reverses {x} do?',
    ),
  ),
)


def choice_rows(seed: int, count: int) -> list[dict[str, Any]]:
  """MedMCQA rows: one fact, three distractors from the same relation.

  A pure function of its arguments; the first rows do not depend on `count`.
  """
  rng = random.Random(f'medmcqa {seed}')
  stems = [
    (relation, x, y, wording.format(x=x, y=y), forward)
    for relation in facts.RELATIONS
    for x, y in relation.facts
    for forward, wordings in ((True, relation.forward), (False, relation.reverse))
    for wording in wordings
  ]
  rows = []
  for relation, x, y, question, forward in _cycled(stems, rng, count):
    if forward:
      options, right = _options(rng, y, [b for _, b in relation.facts if b != y])
    else:
      options, right = _options(rng, x, [a for a, b in relation.facts if b != y])
    rows.append(
      {
        'id': f'synthetic-{len(rows)}',
        'question': _sentence(question),
        **{f'op{letter}': option for letter, option in zip('abcd', options, strict=True)},
        'cop': right,
        'exp': _sentence(relation.statement.format(x=x, y=y)),
        'subject_name': relation.subject,
      }
    )
  return rows


def reasoning_rows(seed: int, count: int) -> list[dict[str, Any]]:
  """MedReason rows: a fact two steps away, with its path and why each option stands or falls.

  A pure function of its arguments; the first rows do not depend on `count`.
  """
  rng = random.Random(f'medreason {seed}')
  stems = [
    (chain, x, middle, dict(chain.second.facts)[middle], wording.format(x=x))
    for chain in _CHAINS
    for x, middle in chain.first.facts
    if middle in dict(chain.second.facts)
    for wording in chain.wordings
  ]
  rows = []
  for chain, x, middle, y, question in _cycled(stems, rng, count):
    options, right = _options(rng, y, [b for _, b in chain.second.facts if b != y])
    letter = LETTERS[right]
    rows.append(
      {
        'id': f'synthetic-{len(rows)}',
        'question': _sentence(question),
        'options': 'Answer Choices:\n' + _lettered(options),
        'reasoning': _reasoning(chain, x, middle, y, options, letter),
        'answer': f'{y}. Explanation: {_step(chain.second, middle)}',
      }
    )
  return rows


def _reasoning(chain: _Chain, x: str, middle: str, y: str, options: list[str], letter: str) -> str:
  others = [
    f'{LETTERS[index]} goes with {next(a for a, b in chain.second.facts if b == option)}'
    for index, option in enumerate(options)
    if option != y
  ]
  return (
    f'Finding reasoning paths:\n1. {x} -> {middle} -> {y}\n\n'
    f'Reasoning Process:\n1. {_step(chain.first, x)}\n2. {_step(chain.second, middle)}\n'
    f'3. {", ".join(others)}.\n\n'
    f'Conclusion:\n{letter} fits: {y}.'
  )


def _step(relation: Relation, x: str) -> str:
  return _sentence(relation.statement.format(x=x, y=dict(relation.facts)[x]))


def _cycled(stems: list[Any], rng: random.Random, count: int) -> Iterator[Any]:
  order: list[Any] = []
  for index in range(count):
    if index % len(stems) == 0:
      order = rng.sample(stems, len(stems))
    yield order[index % len(stems)]


def _options(rng: random.Random, right: str, wrong: list[str]) -> tuple[list[str], int]:
  """Four different options in random order, and the index of the right one."""
  options = [right, *rng.sample(list(dict.fromkeys(wrong)), 3)]
  rng.shuffle(options)
  return options, options.index(right)


def _lettered(options: list[str]) -> str:
  return '\n'.join(f'{letter}. {text}' for letter, text in zip(LETTERS, options, strict=True))


def _sentence(text: str) -> str:
  return text[0].upper() + text[1:]

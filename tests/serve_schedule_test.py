"""Who is seated when, without any model."""

import random

import pytest

from lora_jax.errors import UserError
from lora_jax.serve.config import ServeConfig
from lora_jax.serve.schedule import Schedule


class Item:
  def __init__(self, cost=1, key=''):
    self.cost, self.key = cost, key


def seat(schedule, acquire=lambda item: 0):
  return [*schedule.seat(acquire)]


def test_rows_are_given_in_order_and_to_one_at_a_time():
  rng, rows = random.Random(0), 5
  schedule, came, seated = Schedule(rows, 8), [], []
  for _ in range(2000):
    if rng.random() < 0.5:
      came.append(Item(rng.choice([1, 2, 8])))
      schedule.add(came[-1])
    if schedule.all and rng.random() < 0.4:
      gone = rng.choice(schedule.all)
      assert schedule.leave(gone) == (gone in seated)
      came = [item for item in came if item is not gone]
    new = seat(schedule)
    assert sum(item.cost for item, _, _ in new) <= 8
    seated = [item for item in seated if item in schedule.seated] + [item for item, _, _ in new]
    # Who sits came before who waits.
    assert came == [*seated, *schedule.all[len(seated) :]]
    assert len({*schedule.seated.values()}) == len(seated) == rows - schedule.free
    # Whoever waits does so for a row, or for the next go.
    if schedule.waiting and schedule.free:
      assert new
  assert schedule.waiting + len(schedule.seated) > 0


def test_one_that_must_wait_for_a_slot_is_not_overtaken():
  schedule = Schedule(4, 8)
  items = [Item(key=key) for key in 'abca']
  for item in items:
    schedule.add(item)
  held = set()

  def acquire(item):
    if item.key in held or len(held) < 2:
      held.add(item.key)
      return 1
    return None

  assert [item.key for item, _, _ in seat(schedule, acquire)] == ['a', 'b']
  assert seat(schedule, acquire) == []
  schedule.leave(items[0])
  held.discard('a')
  # The slot is c's, and the last waits in its turn.
  assert [item.key for item, _, _ in seat(schedule, acquire)] == ['c']
  assert schedule.waiting == 1


def test_one_that_leaves_when_it_is_its_turn_makes_room_for_the_next():
  schedule = Schedule(2, 8)
  items = [Item(key=key) for key in 'xyx']
  for item in items:
    schedule.add(item)

  def acquire(item):
    if item.key == 'x':
      schedule.leave(item)
      return None
    return 3

  assert seat(schedule, acquire) == [(items[1], schedule.seated[items[1]], 3)]
  assert schedule.all == (items[1],)


def test_prompts_are_padded_to_few_lengths():
  assert ServeConfig(length=1000, shortest=64).lengths == (64, 128, 256, 512, 1000)
  assert ServeConfig(length=64, shortest=64).lengths == (64,)
  assert ServeConfig(length=2, shortest=64).lengths == (2,)
  for wrong in ({'rows': 0}, {'length': 1}, {'slots': 0}, {'rank': -1}, {'shortest': 0}):
    with pytest.raises(UserError, match=f'{next(iter(wrong))} is .*; give at least'):
      ServeConfig(**wrong)

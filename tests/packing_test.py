import itertools

import numpy as np
import pytest

from lora_jax.data import packing


def drawn(count, low, high, seed=0):
  return np.random.default_rng(seed).integers(low, high + 1, count).tolist()


def filled(sizes, groups, room):
  return sum(sizes) / (room * len(groups))


def assert_packs(sizes, groups, room):
  """Every row once, and no group over its room."""
  assert sorted(itertools.chain(*groups)) == list(range(len(sizes)))
  assert all(group for group in groups)
  assert max(sum(sizes[row] for row in group) for group in groups) <= room


@pytest.mark.parametrize('count', [1, 2, 63, 64, 65, 700, 1300])
@pytest.mark.parametrize(
  ('low', 'high', 'room'), [(1, 1, 5), (1, 90, 90), (40, 60, 100), (30, 33, 100), (7, 7, 7)]
)
def test_every_row_is_in_one_group_that_holds_it(count, low, high, room):
  sizes = drawn(count, low, high)
  for groups in (
    packing.plan(sizes, room, seed=0),
    packing.pack(sizes, room),
    packing._fullest(sizes, room),
    packing._best_fit(sizes, room),
  ):
    assert_packs(sizes, groups, room)


def test_no_rows_are_no_groups():
  assert packing.pack([], 10) == []


# Rows of half of the room and more leave gaps that nothing fills.
@pytest.mark.parametrize(
  ('low', 'high', 'room', 'least'),
  [(35, 233, 336, 0.99), (5, 60, 128, 0.99), (100, 500, 512, 0.93), (1, 1000, 1000, 0.96)],
)
def test_groups_are_nearly_full(low, high, room, least):
  sizes = drawn(2000, low, high)
  assert least < filled(sizes, packing.plan(sizes, room, seed=0), room) <= 1


def test_rows_that_go_in_pairs_alone_are_paired():
  # Each row has one partner with which it fills a group.
  short = drawn(150, 10, 49)
  sizes = np.random.default_rng(1).permutation([*short, *(100 - size for size in short)]).tolist()
  assert len(packing.pack(sizes, 100)) <= 152


def test_each_way_to_pack_is_the_better_one_somewhere():
  for sizes, room, better, worse in (
    (drawn(500, 30, 40), 256, packing._fullest, packing._best_fit),
    (drawn(500, 200, 1000), 1024, packing._best_fit, packing._fullest),
  ):
    best = better(sizes, room)
    assert len(best) < len(worse(sizes, room))
    assert packing.pack(sizes, room) == best


def test_a_plan_depends_on_its_arguments_alone_and_differs_between_epochs():
  sizes = drawn(200, 10, 60)
  plan = lambda **changes: packing.plan(sizes, 128, **{'seed': 3, 'epoch': 2, **changes})
  assert plan() == plan()
  for other in (plan(seed=4), plan(epoch=3)):
    assert other != plan()
    # Other partners too, not only another order.
    groups, others = ({frozenset(group) for group in some} for some in (plan(), other))
    assert len(groups & others) < len(groups) / 4


def test_a_plan_has_long_and_short_rows_everywhere():
  sizes = drawn(3000, 10, 200)
  means = [np.mean([sizes[row] for row in group]) for group in packing.plan(sizes, 256, seed=0)]
  thirds = [np.mean(part) for part in np.array_split(means, 3)]
  assert max(thirds) < 1.1 * min(thirds)


def test_epochs_are_their_plans_one_after_another():
  sizes = drawn(50, 10, 60)
  plans = [packing.plan(sizes, 100, seed=5, epoch=epoch) for epoch in range(6)]
  expected = list(itertools.chain(*plans))
  in_order = packing.Epochs(sizes, 100, seed=5)
  assert [in_order[i] for i in range(len(expected))] == expected
  jumps = packing.Epochs(sizes, 100, seed=5)
  for i in np.random.default_rng(0).permutation(len(expected)):
    assert jumps[i] == expected[i]


def test_a_single_row_is_an_epoch():
  epochs = packing.Epochs([9], 128, seed=0)
  assert [epochs[i] for i in (0, 1, 7)] == [[0], [0], [0]]


@pytest.mark.parametrize('sizes', [[4, 11], [0, 4]])
def test_rows_that_do_not_fit_are_refused(sizes):
  with pytest.raises(ValueError, match='do not go into groups of 10'):
    packing.pack(sizes, 10)


def test_endless_epochs_of_nothing_are_refused():
  with pytest.raises(ValueError, match='no rows'):
    packing.Epochs([], 10, seed=0)

"""Where adapters are kept: slots of the device, host memory, and a directory."""

import dataclasses
import random

import pytest

from lora_jax.bank_kernel import NONE
from lora_jax.errors import UserError
from lora_jax.hub.peft_config import CONFIG
from lora_jax.serve.library import Library
from lora_jax.serve.slots import Slots


def test_slots_hold_the_latest_used_and_never_lose_what_is_in_use():
  rng, count = random.Random(0), 4
  slots, order, uses = Slots(count), [], dict.fromkeys('abcdefg', 0)
  waited = written = 0
  for _ in range(3000):
    key = rng.choice('abcdefg')
    before = slots.held
    if uses[key] and rng.random() < 0.6:
      uses[key] -= 1
      slots.release(key)
      assert slots.held == before
      continue
    found = slots.acquire(key)
    if found is None:
      waited += 1
      assert key not in before
      assert slots.in_use == len(before) == count
      assert slots.held == before
      continue
    slot, new = found
    assert NONE < slot <= NONE + count
    assert new == (key not in before)
    uses[key] += 1
    if new and len(before) == count:
      # Whoever went was not in use, and of those the one that was used the longest ago.
      (gone,) = before.keys() - slots.held.keys()
      assert gone == next(held for held in order if held in before and not uses[held])
      assert slot == before[gone]
    written += new
    order = [held for held in order if held != key] + [key]
    assert len({*slots.held.values()}) == len(slots.held)
    assert slots.in_use == sum(used > 0 for used in uses.values())
    assert all(slots.held[held] == before[held] for held in before if uses[held])
  assert waited > 100
  assert written > 100


def test_what_is_forgotten_keeps_its_slot_while_it_is_in_use():
  slots = Slots(1)
  slots.acquire('a')
  slots.acquire('a')
  slots.forget('a')
  assert slots.acquire('b') is None
  slots.release('a')
  assert slots.acquire('b') is None
  slots.release('a')
  assert slots.held == {}
  assert slots.acquire('b') == (1, True)
  slots.release('b')
  slots.forget('b')
  assert slots.held == {}
  slots.forget('never there')


@dataclasses.dataclass
class Read:
  """What a fake reader made of a directory."""

  name: str
  nbytes: int = 10


class Disk:
  """A directory of adapters, and what was read of it."""

  def __init__(self, root, names='abcd', room=25):
    self.reads = []
    for name in names:
      (root / name).mkdir()
      (root / name / CONFIG).write_text('{}')
    (root / 'no adapter').mkdir(exist_ok=True)
    (root / 'a file').write_text('')
    self.library = Library(root, self.read, room)

  def read(self, directory):
    self.reads.append(directory.name)
    return Read(directory.name)

  def fetch(self, name):
    return self.library.fetch(self.library.find(name)).name


def test_the_latest_used_stay_in_memory_as_far_as_there_is_room(tmp_path):
  disk = Disk(tmp_path)
  assert disk.library.names == tuple('abcd')
  assert disk.reads == []
  assert [disk.fetch(name) for name in 'aabab'] == [*'aabab']
  assert disk.reads == [*'ab']
  # The third does not fit beside two: `a` was used the longest ago.
  assert [disk.fetch(name) for name in 'cba'] == [*'cba']
  assert disk.reads == [*'abca']
  assert disk.library.nbytes == 20


def test_what_is_larger_than_the_room_is_read_every_time(tmp_path):
  disk = Disk(tmp_path, room=5)
  assert [disk.fetch(name) for name in 'aa'] == [*'aa']
  assert disk.reads == [*'aa']
  assert disk.library.nbytes == 0


def test_an_adapter_is_added_and_removed(tmp_path):
  disk = Disk(tmp_path, names='abcdef')
  with pytest.raises(UserError, match=r"no adapter 'z'; there are a, b, c, d, e, \.\.\."):
    disk.library.find('z')
  disk.library.add('z', 'b')
  assert disk.fetch('z') == 'b'
  assert disk.reads == ['b']
  with pytest.raises(UserError, match="an adapter 'z' already"):
    disk.library.add('z', 'a')
  held = disk.library.remove('z')
  assert disk.library.nbytes == 0
  with pytest.raises(UserError, match="no adapter 'z'"):
    disk.library.remove('z')
  # Who found it before may still have it, and under its name there may be another.
  disk.library.add('z', str(tmp_path / 'c'))
  assert disk.fetch('z') == 'c'
  assert disk.library.fetch(held).name == 'b'
  # It is kept for nobody.
  assert disk.library.nbytes == 10


@pytest.mark.parametrize(
  'path', ['../other', '..', '.', '/etc', 'a/../../other', 'link', 'no adapter', 'a\0', 'x' * 5000]
)
def test_nothing_outside_its_directory_is_an_adapter(tmp_path, path):
  root, other = tmp_path / 'root', tmp_path / 'other'
  root.mkdir()
  other.mkdir()
  (other / CONFIG).write_text('{}')
  disk = Disk(root)
  (root / 'link').symlink_to(other)
  with pytest.raises(UserError, match='in the directory of adapters'):
    disk.library.add('z', path)
  assert disk.reads == []


def test_what_is_listed_is_what_could_be_added(tmp_path):
  root, other = tmp_path / 'root', tmp_path / 'other'
  root.mkdir()
  other.mkdir()
  (other / CONFIG).write_text('{}')
  for name, to in {
    'out': other,
    'up': tmp_path / 'root',
    'in': root / 'a',
    'lost': root / 'z',
  }.items():
    (root / name).symlink_to(to)
  (root / 'round').symlink_to(root / 'round')
  # The library's own directory may be a link, and then lies where that leads.
  (tmp_path / 'link').symlink_to(root)
  for at in (root, tmp_path / 'link'):
    disk = Disk(at, names='' if (root / 'a').exists() else 'ab')
    assert disk.library.names == ('a', 'b', 'in')
    assert disk.library.left_out == ('out',)
    assert disk.fetch('in') == 'a'
    for name in disk.library.names:
      disk.library.add(f'{name} again', name)
    for name in ('out', 'up', 'lost', 'round'):
      with pytest.raises(UserError, match='in the directory of adapters'):
        disk.library.add('z', name)


def test_there_may_be_no_adapters_at_all(tmp_path):
  library = Library(None, Read, 10)
  with pytest.raises(UserError, match='there are none'):
    library.find('a')
  with pytest.raises(UserError, match='start with one'):
    library.add('a', 'a')
  with pytest.raises(UserError, match='no such directory'):
    Library(tmp_path / 'nowhere', Read, 10)

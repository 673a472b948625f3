"""Adapters by name: those in a directory, and the latest used of them in host memory.

library = Library(root, read, room=2**30)
adapter = library.find('medicine')      # root/medicine; not read yet
update = library.fetch(adapter)         # from memory, or from disk
"""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from lora_jax.errors import UserError
from lora_jax.hub.peft_config import CONFIG

# How many names an error lists.
_LISTED = 5


class UnknownAdapterError(UserError):
  """There is no adapter of this name."""


class Sized(Protocol):
  """What takes memory."""

  @property
  def nbytes(self) -> int: ...


Held = TypeVar('Held', bound=Sized)


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
  """One adapter under one name. Under the same name, later, there may be another."""

  name: str
  directory: Path


class Library(Generic[Held]):
  """Adapters that may be asked for; any thread may ask.

  Attributes:
    left_out: directories that hold an adapter and are links to what lies elsewhere.
  """

  def __init__(self, root: Path | None, read: Callable[[Path], Held], room: int):
    """Lists what is in a directory, and reads none of it.

    Args:
      root: holds a directory for each adapter, whose name is the adapter's; None: there
        are none. A link to what lies elsewhere is not followed, as `add` follows none.
      read: reads such a directory; raises `UserError` if it is not as it should be.
      room: bytes of what was read that are kept.

    Raises:
      UserError: there is no such directory.
    """
    if root is not None and not root.is_dir():
      raise UserError(f'{root}: there is no such directory; give one that holds adapters')
    self._root, self._read, self._room = root, read, room
    found = sorted(filter(_is_adapter, root.iterdir())) if root else []
    within = {path.name: self._found(path.name) for path in found}
    self._listed = {name: Listing(name, path) for name, path in within.items() if path}
    self.left_out = tuple(name for name, path in within.items() if path is None)
    self._kept: OrderedDict[Listing, Held] = OrderedDict()
    self._lock = threading.Lock()

  @property
  def names(self) -> tuple[str, ...]:
    """All that may be asked for."""
    return tuple(self._listed)

  @property
  def nbytes(self) -> int:
    """What is kept in memory."""
    with self._lock:
      return sum(held.nbytes for held in self._kept.values())

  def find(self, name: str) -> Listing:
    """The adapter of a name.

    Raises:
      UnknownAdapterError: there is none.
    """
    found = self._listed.get(name)
    if found is None:
      some = [*self.names[:_LISTED], *(['...'] if len(self.names) > _LISTED else [])]
      raise UnknownAdapterError(f'no adapter {name!r}; there are {", ".join(some) or "none"}')
    return found

  def add(self, name: str, directory: str) -> Listing:
    """Lists one more adapter, which is read now.

    Args:
      name: what it is to be called.
      directory: where it lies, from the library's own directory, or absolute within it.

    Raises:
      UserError: the name is taken, the directory is not within the library's, or holds no
        adapter that fits.
    """
    self._check_free(name)
    listing = Listing(name, self._within(directory))
    held = self._read(listing.directory)
    with self._lock:
      # Another thread may have added one meanwhile.
      self._check_free(name)
      self._listed[name] = listing
      self._keep(listing, held)
    return listing

  def remove(self, name: str) -> Listing:
    """Lists an adapter no longer; its files stay, and who has found it may still fetch it.

    Raises:
      UnknownAdapterError: there is none.
    """
    listing = self.find(name)
    self._listed.pop(name, None)
    with self._lock:
      self._kept.pop(listing, None)
    return listing

  def fetch(self, listing: Listing) -> Held:
    """What an adapter holds, from memory if it is there.

    Raises:
      UserError: it cannot be read, or does not fit.
    """
    with self._lock:
      if listing in self._kept:
        self._kept.move_to_end(listing)
        return self._kept[listing]
    # Others need not wait while this one is read.
    held = self._read(listing.directory)
    with self._lock:
      # Who found it before it was removed gets it, and then it would be kept for nobody.
      if self._listed.get(listing.name) is listing:
        self._keep(listing, held)
    return held

  def _keep(self, listing: Listing, held: Held) -> None:
    self._kept[listing] = held
    taken = sum(one.nbytes for one in self._kept.values())
    while taken > self._room:
      taken -= self._kept.popitem(last=False)[1].nbytes

  def _check_free(self, name: str) -> None:
    if name in self._listed:
      raise UserError(f'there is an adapter {name!r} already; unload it, or give another name')

  def _within(self, directory: str) -> Path:
    if self._root is None:
      raise UserError('there is no directory of adapters; start with one to load from')
    path = self._found(directory)
    if path is None:
      raise UserError(f'no adapter {directory!r} in the directory of adapters')
    return path

  def _found(self, directory: str) -> Path | None:
    """Where an adapter really lies, if that is within the library's directory."""
    assert self._root is not None
    root = self._root.resolve()
    try:
      path = (root / directory).resolve()
      return path if path != root and path.is_relative_to(root) and _is_adapter(path) else None
    except (OSError, ValueError, RuntimeError):
      # A name with a zero byte, or longer than the system takes; links that lead nowhere.
      return None


def _is_adapter(path: Path) -> bool:
  return (path / CONFIG).is_file()

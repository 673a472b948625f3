"""Adapters on disk, through orbax."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from flax.traverse_util import flatten_dict

from lora_jax.errors import UserError


def save(directory: Path, adapters: Mapping[str, Any]) -> None:
  """Writes an adapter tree; the directory appears whole or not at all.

  An adapter that is already there, from a cell that was stopped before its record
  was written, is replaced.

  Raises:
    UserError: it cannot be written.
  """
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(directory.absolute(), adapters, force=True)
  except OSError as error:
    raise UserError(f'cannot write {directory}: {error.strerror}; give another --out') from error


def load(directory: Path, like: Mapping[str, Any] | None = None) -> Any:
  """Reads an adapter tree.

  Args:
    directory: as it was saved.
    like: the tree expected, or its shapes (`lora.init` under `jax.eval_shape`); None:
      whatever is there.

  Raises:
    UserError: there is no adapter, or it has other modules or shapes.
  """
  missing = UserError(f'no adapter in {directory}; give the .adapter directory of a finished cell')
  damaged = UserError(
    f'{directory} holds no whole adapter; delete the record beside it and run the cell again'
  )
  if not directory.is_dir():
    raise missing
  with ocp.StandardCheckpointer() as checkpointer:
    with _silent():
      try:
        held = checkpointer.metadata(directory.absolute()).item_metadata
      except (OSError, ValueError, KeyError) as error:
        raise damaged from error
    if held is None:
      raise damaged
    # Compared before anything is read: a restore that fails leaves reads under way.
    wrong = '' if like is None else _difference(_shapes(held.tree), _shapes(like))
    if wrong:
      raise UserError(f'{directory} holds another adapter than expected: {wrong}')
    of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    shapes = jax.tree.map(of, held.tree if like is None else like)
    return checkpointer.restore(directory.absolute(), shapes)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  """Keeps orbax from logging what is said in one line already."""
  level = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(level)


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  leaves: dict[str, Any] = dict(flatten_dict(tree, sep='/'))
  return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def _difference(held: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
  """The first leaf in which two trees of shapes differ, or ''."""
  for path in sorted({*held, *expected}):
    if held.get(path) != expected.get(path):
      return f'{path} is {held.get(path, "missing")}, not {expected.get(path, "missing")}'
  return ''

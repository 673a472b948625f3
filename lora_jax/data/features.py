"""Features of images on disk, so that a frozen tower looks at each image once and never again.

    features = FeatureFiles(directory, width=576, dtype=jnp.bfloat16)
    features.write(picture, values_ED)
    features.read(picture)       # the same, or None where there are none, or no sound ones
    features.of(pictures)        # those of several images, one's after the other's

An image's file is named by the hash of its bytes, below a directory that is named by all
else that its features depend on (`lora_jax.sight`). Files appear whole, and hold a
checksum: npz is a zip archive.
"""

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_jax.data.eyes import Picture
from lora_jax.errors import UserError


class FeatureFiles:
  """A directory with a file an image.

  Attributes:
    width: D.
    dtype: of the values.
  """

  def __init__(self, directory: Path, width: int, dtype: np.typing.DTypeLike):
    """Points to a directory, which need not exist."""
    self._directory = directory
    self.width = width
    self.dtype = np.dtype(dtype)

  def read(self, picture: Picture) -> np.ndarray | None:
    """values_ED, or None where there is no file, or none to be trusted."""
    try:
      # Opened here: numpy leaves a file open that it cannot read.
      with self._file(picture).open('rb') as stream, np.load(stream) as held:
        # As bytes: numpy has no name for bfloat16 in a file.
        values_ED = held['values'].view(self.dtype)
    # Readers raise whatever the bytes led them to.
    except Exception:
      return None
    return values_ED if values_ED.shape == (picture.embeddings, self.width) else None

  def write(self, picture: Picture, values_ED: np.ndarray) -> None:
    """Puts an image's features on disk."""
    file = self._file(picture)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f'.{file.name}.{os.getpid()}.{threading.get_ident()}')
    try:
      with temporary.open('wb') as stream:
        np.savez(stream, values=np.ascontiguousarray(values_ED, self.dtype).view(np.uint8))
      temporary.replace(file)
    finally:
      with contextlib.suppress(OSError):
        temporary.unlink()

  def of(self, pictures: Sequence[Picture]) -> np.ndarray:
    """values_ED of images that were looked at, in order.

    Raises:
      UserError: a file went, or was damaged, in the meantime.
    """
    found = [np.zeros((0, self.width), self.dtype)]
    for picture in pictures:
      values_ED = self.read(picture)
      if values_ED is None:
        raise UserError(
          f'{self._file(picture)}: the features of {picture.where} are gone or damaged; '
          'the same command computes them again'
        )
      found.append(values_ED)
    return np.concatenate(found)

  def _file(self, picture: Picture) -> Path:
    # Directories with very many files are slow to look into.
    return self._directory / picture.key[:2] / f'{picture.key}.npz'

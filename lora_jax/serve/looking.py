"""What the base's tower makes of the images of requests; the latest are kept.

  looker = Looker(model, params, base.images)
  shown = looker.shown(data, 'messages.0.content.1')    # by the image's head alone
  ids = looker.eyes.spell(ids, tokenizer, [shown.picture])
  values_ED = looker.look([shown])

A chat sends its images again with every turn, and a tower takes longer than the turn: what it
made of them is kept in host memory, the latest used, under a hash of the image. Nothing is
written to disk.
"""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.config import ImageConfig
from lora_jax.data.eyes import Eyes, Picture
from lora_jax.sight import SIGHT, see, tiles_together
from lora_jax.transformer import Transformer

# Bytes of features that are kept: of 100 images in 17 tiles each, of 576 numbers a token.
_ROOM = 2**28


@dataclasses.dataclass(frozen=True)
class Shown:
  """An image that came with a request.

  Attributes:
    picture: what is known of it by its head.
    data: the encoded image.
  """

  picture: Picture
  data: bytes


class Looker:
  """A base's tower; any thread may ask.

  Attributes:
    eyes: how images are made ready.
    looked_at: how many images the tower ran on.
  """

  def __init__(
    self, model: Transformer, params: Mapping[str, Any], images: ImageConfig, room: int = _ROOM
  ):
    """Looks at nothing yet.

    Args:
      model: the Transformer, of a base that sees.
      params: its parameters, on the device.
      images: how images are made ready for it.
      room: bytes of features that are kept.
    """
    assert model.config.vision is not None
    self.eyes = Eyes(model.config.vision, images)
    self.looked_at = 0
    self._model, self._room = model, room
    self._params = {name: params[name] for name in SIGHT}
    self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
    # One image at a time is decoded and looked at, which bounds the memory that they take.
    self._lock = threading.Lock()

  def warm_up(self) -> None:
    """Compiles the tower."""
    side = self.eyes.images.tile
    self._tower(np.zeros((1, side, side, 3), np.float32))

  def shown(self, data: bytes, where: str) -> Shown:
    """An image, of which only the head is read.

    Raises:
      UserError: it cannot be one; `where` is named.
    """
    return Shown(self.eyes.picture(data, where), data)

  def look(self, images: Sequence[Shown]) -> np.ndarray:
    """values_ED of images, one's after the other's.

    Raises:
      UserError: one is damaged or cut short.
    """
    with self._lock:
      found = [self._of(image) for image in images]
    return found[0] if len(found) == 1 else np.concatenate(found)

  def _of(self, image: Shown) -> np.ndarray:
    key = image.picture.key
    found = self._kept.pop(key, None)
    if found is None:
      found = self._tower(self.eyes.tiles(image.data, image.picture))
      self.looked_at += 1
    self._kept[key] = found
    taken = sum(values_ED.nbytes for values_ED in self._kept.values())
    while taken > self._room:
      taken -= self._kept.popitem(last=False)[1].nbytes
    return found

  def _tower(self, pixels_IYXC: np.ndarray) -> np.ndarray:
    """So many tiles at a time, in the one program that is compiled."""
    together, made = tiles_together(), []
    for at in range(0, len(pixels_IYXC), together):
      tiles = pixels_IYXC[at : at + together]
      filled = np.zeros((together, *tiles.shape[1:]), tiles.dtype)
      filled[: len(tiles)] = tiles
      made.append(np.asarray(see(self._model, self._params, filled))[: len(tiles)])
    return np.concatenate(made).reshape(-1, self._model.config.model_dim)

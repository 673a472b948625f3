"""A tower and its connector by themselves, with the parameters that they have in a Transformer.

params = init(vision, features, jax.random.key(0))   # {'vision': ..., 'connector': ...}
features_IED = Sight(vision, features).apply({'params': params}, pixels_IYXC)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.config import VisionConfig
from lora_jax.vision import CHANNELS, Connector, VisionTower


class Sight(nn.Module):
  """Tiles to embeddings of a language model.

  Attributes:
    config: shape of the tower.
    features: width of the language model.
    dtype: of activations and products.
    remat: recompute each block in the backward pass.
  """

  config: VisionConfig
  features: int
  dtype: jax.typing.DTypeLike = jnp.float32
  remat: bool = False

  def setup(self):
    self.vision = VisionTower(self.config, self.dtype, self.remat)
    self.connector = Connector(self.config, self.features)

  def __call__(self, pixels_IYXC: jax.Array) -> jax.Array:
    """Normalised pixels to features_IED."""
    return self.connector(self.vision(pixels_IYXC))


def init(config: VisionConfig, features: int, key: jax.Array) -> dict[str, Any]:
  """Random float32 parameters 'vision' and 'connector'."""
  pixels_IYXC = jnp.zeros((1, config.image_size, config.image_size, CHANNELS))
  return dict(Sight(config, features).init(key, pixels_IYXC)['params'])

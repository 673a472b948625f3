"""A tower and its connector by themselves, with the parameters that they have in a Transformer.

params = init(vision, features, jax.random.key(0))   # {'vision': ..., 'connector': ...}
features_IED = Sight(vision, features).apply({'params': params}, pixels_IYXC)
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.config import VisionConfig
from lora_jax.vision import CHANNELS, Connector, VisionTower, cut

# Of the loudest component's.
_LEAST_VARIANCE = 1e-6


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
  """Random float32 parameters 'vision' and 'connector', whose embeddings are of length 1."""
  pixels_IYXC = jnp.zeros((1, config.image_size, config.image_size, CHANNELS))
  params = Sight(config, features).init(key, pixels_IYXC)['params']
  vision = dict(params['vision'])
  # Paper, which is white and so 1 nearly everywhere, begins as nothing: what is seen is ink.
  patches: dict[str, Any] = dict(vision['patch_embedding'])
  patches['bias'] = -patches['kernel'].sum(0)
  side = config.patches(config.image_size)
  places = {'embedding': jnp.asarray(_waves(side, config.model_dim))}
  vision |= {'patch_embedding': patches, 'position_embedding': places}
  return {'vision': vision, 'connector': params['connector']}


def sharpened(
  params: Mapping[str, Any], config: VisionConfig, pixels_IYXC: np.ndarray, key: jax.Array
) -> dict[str, Any]:
  """The same, with a patch embedding that tells patches like those of some tiles apart.

  Of a random one nearly all that comes out is how light the paper is, and strokes are lost
  beneath it. This one turns principal components, each at unit variance, so that what makes
  two letters different is as loud as what makes two sheets so (ZCA: Bell and Sejnowski 1997).

  Args:
    params: 'vision' and 'connector'.
    config: the tower's shape.
    pixels_IYXC: normalised tiles, with many more patches than a patch has numbers.
    key: of the turn.
  """
  patches_ITP = np.asarray(cut(jnp.asarray(pixels_IYXC), config.patch_size))
  patches_NP = patches_ITP.reshape(-1, patches_ITP.shape[-1])
  variance_P, components_PP = np.linalg.eigh(np.cov(patches_NP, rowvar=False))
  # Of what never varies there is nothing to tell.
  spread_P = np.sqrt(np.maximum(variance_P, _LEAST_VARIANCE * variance_P[-1]))
  loudest_Pd = (components_PP / spread_P)[:, -config.model_dim :]
  turn_dD = jax.random.orthogonal(key, loudest_Pd.shape[1], m=config.model_dim)
  kernel_PD = (loudest_Pd @ np.asarray(turn_dD)).astype(np.float32)
  embedding = {'kernel': kernel_PD, 'bias': -patches_NP.mean(0) @ kernel_PD}
  return {**params, 'vision': {**params['vision'], 'patch_embedding': embedding}}


def lengthened(params: Mapping[str, Any], length: jax.typing.ArrayLike) -> dict[str, Any]:
  """The same, whose embeddings are `length` times as long.

  Towers are trained at length 1 and used at a language model's: its embeddings are so short
  that a kernel which gives them would be another after a few of Adam's steps.
  """
  connector = jax.tree.map(lambda kernel: kernel * length, params['connector'])
  return {'vision': params['vision'], 'connector': connector}


def _waves(side: int, width: int) -> np.ndarray:
  """Positions to begin with: sines and cosines across and down (Beyer et al. 2022).

  Learnt from small noise, which patch is beside which would have to be found out first.
  """
  quarter = -(-width // 4)
  turns_q = 100.0 ** (-np.arange(quarter) / quarter)
  waves = lambda at_P: np.concatenate([f(at_P[:, None] * turns_q) for f in (np.sin, np.cos)], 1)
  down_P, across_P = np.divmod(np.arange(side * side), side)
  table_PD = np.concatenate([waves(down_P), waves(across_P)], axis=1)[:, :width]
  return (0.5 * table_PD).astype(np.float32)

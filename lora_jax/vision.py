"""How a language model sees: a vision tower over patches, and its connector.

Idefics3 (Laurencon et al. 2024) and SmolVLM (Marafioti et al. 2025): a SigLIP tower (Zhai
et al. 2023) whose positions follow an image's share of the table rather than its pixels
(Dehghani et al. 2023, NaViT), a pixel shuffle, and one linear map into the width of the
language model. What comes out takes the place of image tokens in a text:

  features_IED = model.apply({'params': params}, pixels_IYXC, method='see')
  slots_BT = image_slots(tokens_BT, config.vision.image_token)
  features = Features(features_IED.reshape(batch, -1, dim), slots_BT)
  hidden_BTD, _ = model.apply({'params': params}, tokens_BT, features=features)

So features of a frozen tower can be computed once and kept, and gradients reach the tower
where it is adapted. The letters of `transformer` hold, and here T counts patches; I are
square images, Y and X their rows and columns (of pixels, or y and x of patches), C
channels, E the embeddings of one image or of all images of a row.

Parameters carry Hugging Face names beside those of the language model:

  vision/patch_embedding/{kernel,bias}      vision/position_embedding/embedding
  vision/layers/attn/{q,k,v}_proj           vision/layers/layer_norm{1,2}/{scale,bias}
  vision/layers/attn/out_proj               vision/post_layernorm/{scale,bias}
  vision/layers/mlp/fc{1,2}                 connector/modality_projection/proj/kernel

Every kernel that an adapter can sit on leads with an axis of layers: the connector is a
stack of one.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.attention import attend
from lora_jax.config import VisionConfig
from lora_jax.layers import ACTIVATIONS, Dense

CHANNELS = 3

# Flax declares a single int for it.
_ALIKE: Any = nn.broadcast


@flax.struct.dataclass
class Features:
  """Embeddings of images, and the tokens that they take the place of.

  Attributes:
    values_BED: embeddings in the width of the language model; a row that has fewer than E
      is padded with anything.
    slots_BT: int32, which of its row's embeddings a token becomes; -1: none, it keeps its
      own. A slot that is not there gives NaN.
  """

  values_BED: jax.Array
  slots_BT: jax.Array

  def put(self, x_BTD: jax.Array) -> jax.Array:
    """Token embeddings with these in their places."""
    there_BT1 = self.slots_BT[..., None] >= 0
    slots_BT1 = jnp.maximum(self.slots_BT, 0)[..., None]
    picked_BTD = jnp.take_along_axis(self.values_BED, slots_BT1, axis=1, mode='fill')
    return jnp.where(there_BT1, picked_BTD.astype(x_BTD.dtype), x_BTD)


def image_slots(tokens_BT: jax.Array, image_token: int) -> jax.Array:
  """The slots of `Features` where a row's image tokens take its embeddings in order.

  Rows that were packed together keep their order, so this holds for a packed row whose
  embeddings lie one row's after the other's.
  """
  is_image_BT = jnp.asarray(tokens_BT) == image_token
  return jnp.where(is_image_BT, jnp.cumsum(is_image_BT, axis=1, dtype=jnp.int32) - 1, -1)


def position_ids(seen_Iyx: jax.Array, side: int) -> jax.Array:
  """Where in a table of `side` x `side` each patch of an image finds its position.

  Of c patches in a row, the i-th lies at i / c of the image and takes the last of the
  table's positions k / side that is not beyond it: floor(i side / c). Integers say it
  exactly; the reference compares float32 quotients, and on sides that no published
  checkpoint has (19, 25, 49, ...) is off by one where they round apart.

  Args:
    seen_Iyx: True for patches of the image; False for padding below and to the right.
    side: of the table.

  Returns:
    ids_Iyx; 0 for padding.
  """

  def along(counts_I, length):
    index_1i = jnp.arange(length, dtype=jnp.int32)[None]
    return index_1i * side // jnp.maximum(counts_I, 1)[:, None]

  rows_Iy = along(seen_Iyx[:, :, 0].sum(1), seen_Iyx.shape[1])
  columns_Ix = along(seen_Iyx[:, 0].sum(1), seen_Iyx.shape[2])
  return jnp.where(seen_Iyx, rows_Iy[:, :, None] * side + columns_Ix[:, None], 0)


def cut(pixels_IYXC: jax.Array, size: int) -> jax.Array:
  """Whole patches of `size` x `size` pixels, row by row: (I, T, P).

  A patch's numbers are in the order of a convolution's weights: channel, row, column.
  """
  images, height, width, _ = pixels_IYXC.shape
  rows, columns = height // size, width // size
  whole = pixels_IYXC[:, : rows * size, : columns * size]
  apart = whole.reshape(images, rows, size, columns, size, CHANNELS)
  return apart.transpose(0, 1, 3, 5, 2, 4).reshape(images, rows * columns, -1)


def shuffle_pixels(x_IyxD: jax.Array, by: int) -> jax.Array:
  """Joins squares of `by` x `by` patches, row by row, into one vector each: (I, E, by by D)."""
  images, rows, columns, width = x_IyxD.shape
  squares = x_IyxD.reshape(images, rows // by, by, columns // by, by, width)
  return squares.transpose(0, 1, 3, 2, 4, 5).reshape(images, -1, by * by * width)


def _norm(config: VisionConfig, name: str, x: jax.Array) -> jax.Array:
  norm = nn.LayerNorm(config.norm_eps, jnp.float32, use_fast_variance=False, name=name)
  return norm(x).astype(x.dtype)


class VisionAttention(nn.Module):
  """Attention of every patch to every patch of its image."""

  config: VisionConfig

  @nn.compact
  def __call__(self, x_ITD: jax.Array, seen_IT: jax.Array) -> jax.Array:
    c = self.config
    dense = lambda name: Dense(c.model_dim, use_bias=True, name=name)
    split = lambda x: x.reshape(*x.shape[:2], c.num_heads, -1)
    q_ITNH, k_ITNH, v_ITNH = (split(dense(f'{name}_proj')(x_ITD)) for name in 'qkv')
    part = (k_ITNH.swapaxes(1, 2), v_ITNH.swapaxes(1, 2), seen_IT[:, None])
    return dense('out_proj')(attend(q_ITNH, [part]).reshape(x_ITD.shape))


class VisionMlp(nn.Module):
  """Feed-forward network with biases and no gate."""

  config: VisionConfig

  @nn.compact
  def __call__(self, x_ITD: jax.Array) -> jax.Array:
    hidden_ITF = Dense(self.config.mlp_dim, use_bias=True, name='fc1')(x_ITD)
    hidden_ITF = ACTIVATIONS['gelu_tanh'](hidden_ITF)
    return Dense(self.config.model_dim, use_bias=True, name='fc2')(hidden_ITF)


class VisionBlock(nn.Module):
  """One block of the tower; the body of the scan over its layers."""

  config: VisionConfig

  @nn.compact
  def __call__(self, x_ITD: jax.Array, seen_IT: jax.Array) -> tuple[jax.Array, None]:
    c = self.config
    x_ITD += VisionAttention(c, name='attn')(_norm(c, 'layer_norm1', x_ITD), seen_IT)
    return x_ITD + VisionMlp(c, name='mlp')(_norm(c, 'layer_norm2', x_ITD)), None


class VisionTower(nn.Module):
  """Images to one vector a patch.

  Attributes:
    config: the shape.
    dtype: of activations and products; norms and softmax are float32.
    remat: recompute each block in the backward pass instead of keeping its insides.
  """

  config: VisionConfig
  dtype: jax.typing.DTypeLike = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, pixels_IYXC: jax.Array, seen_Iyx: jax.Array | None = None) -> jax.Array:
    """Looks at images.

    Args:
      pixels_IYXC: normalised values; sides need not be those of the configuration.
      seen_Iyx: the patches that are of the image and not padding below it or to its
        right; None: all.

    Returns:
      x_IyxD after the last norm.
    """
    c, size = self.config, self.config.patch_size
    images, height, width, _ = pixels_IYXC.shape
    rows, columns = c.patches(height), c.patches(width)
    patches_ITP = cut(pixels_IYXC.astype(self.dtype), size)
    x_ITD = Dense(c.model_dim, use_bias=True, name='patch_embedding')(patches_ITP)
    if seen_Iyx is None:
      seen_Iyx = jnp.ones((images, rows, columns), bool)
    side = c.patches(c.image_size)
    table = nn.Embed(side * side, c.model_dim, name='position_embedding')
    x_ITD += table(position_ids(seen_Iyx, side).reshape(images, -1)).astype(self.dtype)
    layers = nn.scan(
      nn.remat(VisionBlock, prevent_cse=False) if self.remat else VisionBlock,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=_ALIKE,
      length=c.num_layers,
    )
    x_ITD, _ = layers(c, name='layers')(x_ITD, seen_Iyx.reshape(images, -1))
    return _norm(c, 'post_layernorm', x_ITD).reshape(images, rows, columns, -1)


class _Projection(nn.Module):
  """The linear map into the language model; the body of a scan over a stack of one."""

  features: int

  @nn.compact
  def __call__(self, carry: None, x: jax.Array) -> tuple[None, jax.Array]:
    return carry, Dense(self.features, name='proj')(x)


class Connector(nn.Module):
  """A tower's patches to embeddings of the language model.

  Attributes:
    config: of the tower.
    features: width of the language model.
  """

  config: VisionConfig
  features: int

  @nn.compact
  def __call__(self, x_IyxD: jax.Array) -> jax.Array:
    """Returns features_IED."""
    stack = nn.scan(
      _Projection,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=_ALIKE,
      length=1,
    )(self.features, name='modality_projection')
    _, features_1IED = stack(None, shuffle_pixels(x_IyxD, self.config.shuffle))
    return features_1IED[0]

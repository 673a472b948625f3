"""Rotary positions: the frequencies of a head, stretched or not, and the rotation.

    frequencies_h, magnitude = frequencies(config, config.rope_theta)
    q_BTNH = rotate(q_BTNH, positions_BT, frequencies_h, magnitude)

h is half a head: pair i of a head turns by its position times frequency i.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig, theta: float) -> tuple[np.ndarray, float]:
  """What a layer turns its queries and keys by.

  Args:
    config: the model's; its scaling holds where `theta` is its `rope_theta`.
    theta: base of the layer's frequencies; 0 for a layer without positions.

  Returns:
    Frequencies (h,) in radians a token, float32, and what the rotated vectors are
    multiplied by.
  """
  half = config.head_dim // 2
  if theta == 0:
    return np.zeros(half, np.float32), 1.0
  plain_h = theta ** (-np.arange(half) / half)
  scaling = config.rope_scaling
  if scaling is None or theta != config.rope_theta:
    return plain_h.astype(np.float32), 1.0
  stretch = {'linear': _linear, 'llama3': _llama3, 'yarn': _yarn}[scaling.kind]
  return stretch(plain_h, theta, scaling).astype(np.float32), scaling.attention_factor


def _linear(plain_h: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
  """Positions divided by a factor (Chen et al. 2023, position interpolation)."""
  del theta
  return plain_h / scaling.factor


def _llama3(plain_h: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
  """Llama 3.1's: long wavelengths are stretched, short ones kept, between them a ramp."""
  del theta
  turns_h = scaling.original_length * plain_h / (2 * math.pi)
  kept_h = np.clip((turns_h - scaling.low) / (scaling.high - scaling.low), 0, 1)
  return kept_h * plain_h + (1 - kept_h) * plain_h / scaling.factor


def _yarn(plain_h: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
  """Peng et al. 2023, equations 17 to 23, whose ramp goes by the index of a pair."""
  half = len(plain_h)

  def index(turns: float) -> float:
    """Of the pair that turns so often within the original context."""
    return half * math.log(scaling.original_length / (turns * 2 * math.pi)) / math.log(theta)

  first = max(math.floor(index(scaling.high)), 0)
  last = min(math.ceil(index(scaling.low)), 2 * half - 1)
  stretched_h = np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0, 1)
  return (1 - stretched_h) * plain_h + stretched_h * plain_h / scaling.factor


def rotate(
  x_BTNH: jax.Array,
  positions_BT: jax.Array,
  frequencies_h: np.ndarray | jax.Array,
  magnitude: float | jax.Array = 1.0,
) -> jax.Array:
  """Rotary position embedding (Su et al. 2021) in the half-split layout of Hugging Face.

  Args:
    x_BTNH: queries or keys.
    positions_BT: each token's position.
    frequencies_h: radians a token of each pair.
    magnitude: what the result is multiplied by.
  """
  frequencies_h = jnp.asarray(frequencies_h, jnp.float32)
  angles_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_h[None, None, None]
  sin, cos = jnp.sin(angles_BT1h), jnp.cos(angles_BT1h)
  if not isinstance(magnitude, float) or magnitude != 1.0:
    sin, cos = sin * magnitude, cos * magnitude
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)

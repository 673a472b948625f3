"""Causal attention among the tokens of one call, by the best that the device has.

cuDNN's flash kernel on NVIDIA's GPUs, splash attention on TPUs, and elsewhere, as where
a kernel cannot do what is asked, `attention.self_attend`. The choice is made while
tracing, from shapes and dtypes: a choice left to the compiler (`platform_dependent`)
would trace cuDNN's kernel where there is no cuDNN, which fails, and would keep for the
backward pass what each of the implementations wants kept.

  model = Transformer(config, attention=SelfAttention(shared_prefix=False))
"""

import dataclasses
import functools

import jax

from lora_jax import attention, attention_cudnn, platforms, sharding


@dataclasses.dataclass(frozen=True)
class SelfAttention:
  """Causal attention among the tokens of one call; call it as `attention.self_attend`.

  Attributes:
    platform: 'cpu', 'cuda', 'rocm' or 'tpu': what the program is compiled for; None:
      `platforms.target`.
    shared_prefix: whether a row with segments may begin with tokens that all its
      sequences see. It cannot be told from shapes, and splash attention cannot do it.
  """

  platform: str | None = None
  shared_prefix: bool = True

  def implementation(
    self,
    q_BTNH: jax.Array | jax.ShapeDtypeStruct,
    in_segments: bool = False,
    windowed: bool = False,
    cap: float = 0.0,
  ) -> str:
    """'cudnn', 'splash' or 'blocks' for such queries, with segments and a window or without."""
    platform = self.platform or platforms.target()
    if platform == 'cuda' and attention_cudnn.takes(q_BTNH, cap, platforms.capability() >= 9):
      return 'cudnn'
    shared = self.shared_prefix and in_segments
    if platform == 'tpu' and not windowed and not shared and _splash().takes(q_BTNH):
      return 'splash'
    return 'blocks'

  def __call__(
    self,
    q_BTNH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    window: jax.Array | None = None,
    scale: float | None = None,
    cap: float = 0.0,
  ) -> jax.Array:
    """Attends as `attention.self_attend` does, by `implementation`.

    Args:
      q_BTNH: queries; N is a multiple of K.
      k_BKTH: keys of the same tokens.
      v_BKTH: values of the same tokens.
      positions_BT: position of each token in its sequence, rising within a sequence.
      segments_BT: the packed sequence that each token belongs to, `attention.SHARED` for those
        that all of a row see, which only come where `shared_prefix` is; None: one a row.
      window: how many of the latest tokens, its own included, a query sees; None: all.
      scale: what scores are multiplied by; None: H ** -0.5.
      cap: of the scores, see `attention.softcap`.

    Returns:
      out_BTNH in the dtype of the queries.
    """
    factor = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    in_segments, windowed = segments_BT is not None, window is not None
    match self.implementation(q_BTNH, in_segments, windowed, cap):
      case 'cudnn':
        mask_BTT = None
        if in_segments or windowed:
          mask_BTT = attention.causal_mask(
            positions_BT, positions_BT, segments_BT, segments_BT, window
          )
        flash = functools.partial(attention_cudnn.self_attend, scale=factor)
        return sharding.apart(flash, q_BTNH, k_BKTH, v_BKTH, mask_BTT)
      case 'splash':
        splash = functools.partial(_splash().self_attend, scale=factor, cap=cap)
        return sharding.apart(splash, q_BTNH, k_BKTH, v_BKTH, segments_BT)
      case _:
        return attention.self_attend(
          q_BTNH, k_BKTH, v_BKTH, positions_BT, segments_BT, window, factor, cap
        )


def _splash():
  # Pallas takes a third of a second to import, and only TPUs need it.
  from lora_jax import attention_splash

  return attention_splash

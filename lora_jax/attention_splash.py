"""Causal attention by a TPU's splash kernel, from JAX's Pallas kernels.

if takes(q_BTNH):
  out_BTNH = self_attend(q_BTNH, k_BKTH, v_BKTH, segments_BT, scale)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

# Queries and keys of a block: a multiple of a register's lanes, and no more than in MaxText.
_LANES = 128
_LARGEST = 512


def takes(q_BTNH: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Whether the kernel can be given such queries: whole blocks of them."""
  return q_BTNH.shape[1] % _LANES == 0


def self_attend(
  q_BTNH: jax.Array,
  k_BKTH: jax.Array,
  v_BKTH: jax.Array,
  segments_BT: jax.Array | None,
  scale: float,
  cap: float = 0.0,
  interpret: bool = False,
) -> jax.Array:
  """Attention to tokens of the same segment that are not later in the row.

  Blocks of later tokens are skipped. Differentiable in reverse mode, once.

  Args:
    q_BTNH: queries; T is a multiple of 128.
    k_BKTH: keys of the same tokens.
    v_BKTH: values of the same tokens.
    segments_BT: the segment of each token; None: one a row.
    scale: what scores are multiplied by.
    cap: of the scores, see `attention.softcap`.
    interpret: runs the kernel on any device, slowly.

  Returns:
    out_BTNH.
  """
  _, time, heads, _ = q_BTNH.shape
  size = max(n for n in range(_LANES, _LARGEST + 1, _LANES) if time % n == 0)
  blocks = ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv', 'block_q_dq', 'block_kv_dq')
  # Which blocks to run is known now, also where all else is being traced.
  with jax.ensure_compile_time_eval():
    # Declared to return a pair too, as it does where residuals are asked for.
    attend: Any = splash.make_splash_mha_single_device(
      masks.MultiHeadMask([masks.CausalMask((time, time))] * heads),
      block_sizes=splash.BlockSizes(**dict.fromkeys(blocks, size)),
      attn_logits_soft_cap=cap or None,
      interpret=interpret,
    )
  q_BNTH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).swapaxes(1, 2)
  segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
  return jax.vmap(attend)(q_BNTH, k_BKTH, v_BKTH, segments).swapaxes(1, 2)

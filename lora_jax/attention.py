"""Scaled dot-product attention: over a stretch of its own, or over a cache and new tokens.

Both are written so that nothing of size T x S outlives a block of queries, which on
a CPU is worth more time than the recomputation costs (BUILD_NOTES.md, Speed).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Large enough to vanish under softmax, small enough that a row with no visible key
# (padding) gives finite numbers rather than NaN.
_HIDDEN = -1e30

# Queries per block, and the most blocks that one program is unrolled into.
_BLOCK = 128
_MAX_BLOCKS = 16

# Keys, values and what each query may see of them.
Part = tuple[jax.Array, jax.Array, jax.Array]


def causal_mask(
  query_positions_BT: jax.Array,
  key_positions_BS: jax.Array,
  query_segments_BT: jax.Array | None = None,
  key_segments_BS: jax.Array | None = None,
) -> jax.Array:
  """True (B, T, S) where a query may see a key: not later, and of the same segment."""
  mask_BTS = key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]
  if query_segments_BT is not None and key_segments_BS is not None:
    mask_BTS &= key_segments_BS[:, None, :] == query_segments_BT[:, :, None]
  return mask_BTS


def attend(q_BTNH: jax.Array, parts: Sequence[Part]) -> jax.Array:
  """Attends to the keys of all parts together, under one softmax.

  Several parts spare decoding the copy that joining a cache and its newest keys
  would cost.

  Args:
    q_BTNH: queries; N is a multiple of the parts' K.
    parts: (k_BKSH, v_BKSH, mask_BTS) each; S may differ from part to part.

  Returns:
    out_BTNH in the dtype of the queries; the softmax is taken in float32.
  """
  batch, time, heads, head_dim = q_BTNH.shape
  kv_heads = parts[0][0].shape[1]
  groups = heads // kv_heads
  # A group's queries share their keys, so they are rows of one matrix product.
  q_BTKGH = q_BTNH.reshape(batch, time, kv_heads, groups, head_dim)
  q_BTKGH = q_BTKGH * jnp.asarray(head_dim**-0.5, q_BTNH.dtype)
  q_BKQH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * time, head_dim)

  scores = []
  for k_BKSH, _, mask_BTS in parts:
    scores_BKQS = jnp.einsum('BKQH,BKSH->BKQS', q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKQS.reshape(batch, kv_heads, groups, time, -1)
    scores.append(jnp.where(mask_BTS[:, None, None], scores_BKGTS, _HIDDEN))
  top = scores[0].max(-1, keepdims=True)
  for more in scores[1:]:
    top = jnp.maximum(top, more.max(-1, keepdims=True))
  top = jax.lax.stop_gradient(top)

  out_BKQH = total_BKGT = jnp.float32(0)
  for scores_BKGTS, (_, v_BKSH, _) in zip(scores, parts, strict=True):
    weights_BKGTS = jnp.exp(scores_BKGTS - top)
    total_BKGT += weights_BKGTS.sum(-1)
    weights_BKQS = weights_BKGTS.astype(v_BKSH.dtype).reshape(*q_BKQH.shape[:3], -1)
    out_BKQH += jnp.einsum(
      'BKQS,BKSH->BKQH', weights_BKQS, v_BKSH, preferred_element_type=jnp.float32
    )
  # Dividing the (T, H) output is cheaper than dividing the (T, S) weights.
  out_BKGTH = out_BKQH.reshape(batch, kv_heads, groups, time, head_dim) / total_BKGT[..., None]
  out_BTKGH = out_BKGTH.astype(q_BTNH.dtype).transpose(0, 3, 1, 2, 4)
  return out_BTKGH.reshape(q_BTNH.shape)


def self_attend(
  q_BTNH: jax.Array,
  k_BKTH: jax.Array,
  v_BKTH: jax.Array,
  positions_BT: jax.Array,
  segments_BT: jax.Array | None = None,
) -> jax.Array:
  """Causal attention among the tokens of one call, a block of queries at a time.

  Tokens of a sequence must lie in order, so that a block never looks past its own
  end: half of the products are skipped. A block is recomputed in the backward pass.

  Args:
    q_BTNH: queries.
    k_BKTH: keys of the same tokens.
    v_BKTH: values of the same tokens.
    positions_BT: position of each token in its sequence, rising within a sequence.
    segments_BT: the packed sequence that each token belongs to, or None for one a row.

  Returns:
    out_BTNH.
  """
  time = q_BTNH.shape[1]
  block = max(_BLOCK, -(-time // _MAX_BLOCKS))

  @jax.checkpoint
  def attend_block(q, k, v, query_positions, key_positions, query_segments, key_segments):
    mask = causal_mask(query_positions, key_positions, query_segments, key_segments)
    return attend(q, [(k, v, mask)])

  cut = lambda x, start, end: None if x is None else x[:, start:end]
  blocks = []
  for start in range(0, time, block):
    end = min(start + block, time)
    blocks.append(
      attend_block(
        q_BTNH[:, start:end],
        k_BKTH[:, :, :end],
        v_BKTH[:, :, :end],
        positions_BT[:, start:end],
        positions_BT[:, :end],
        cut(segments_BT, start, end),
        cut(segments_BT, 0, end),
      )
    )
  return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)

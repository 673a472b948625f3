"""Scaled dot-product attention: over a stretch of its own, or over a cache and new tokens.

In the first nothing of size T x S outlives a block of queries; the backward pass
recomputes it, which on a CPU costs less than keeping it (BUILD_NOTES.md, Speed).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Large enough to vanish under softmax, small enough that a row with no visible key
# (padding) gives finite numbers rather than NaN.
_HIDDEN = -1e30

# Queries per block, and the most blocks that one program is unrolled into.
_BLOCK = 64
_MAX_BLOCKS = 16

# The segment of tokens that every segment of their row continues. Segment 0 is padding.
SHARED = -1

# Keys, values and what each query may see of them.
Part = tuple[jax.Array, jax.Array, jax.Array]


def softcap(x: jax.Array, cap: float) -> jax.Array:
  """Bends `x` to stay within -cap..cap: cap * tanh(x / cap) (Gemma 2); 0: as it is."""
  return cap * jnp.tanh(x / cap) if cap else x


def causal_mask(
  query_positions_BT: jax.Array,
  key_positions_BS: jax.Array,
  query_segments_BT: jax.Array | None = None,
  key_segments_BS: jax.Array | None = None,
  window: jax.Array | None = None,
) -> jax.Array:
  """True (B, T, S) where a query may see a key.

  The key is not later, of the same segment or `SHARED`, and one of the `window` latest
  tokens, the query's own included, where there is a window (an integer scalar).
  """
  mask_BTS = key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]
  if window is not None:
    mask_BTS &= key_positions_BS[:, None, :] > query_positions_BT[:, :, None] - window
  if query_segments_BT is not None and key_segments_BS is not None:
    same_BTS = key_segments_BS[:, None, :] == query_segments_BT[:, :, None]
    mask_BTS &= same_BTS | (key_segments_BS == SHARED)[:, None, :]
  return mask_BTS


def attend(
  q_BTNH: jax.Array, parts: Sequence[Part], scale: float | None = None, cap: float = 0.0
) -> jax.Array:
  """Attends to the keys of all parts together, under one softmax.

  Several parts spare decoding the copy that joining a cache and its newest keys
  would cost.

  Args:
    q_BTNH: queries; N is a multiple of the parts' K.
    parts: (k_BKSH, v_BKSH, mask_BTS) each; S may differ from part to part.
    scale: what scores are multiplied by; None: H ** -0.5.
    cap: of the scores, see `softcap`.

  Returns:
    out_BTNH in the dtype of the queries; the softmax is taken in float32.
  """
  batch, time, heads, head_dim = q_BTNH.shape
  kv_heads = parts[0][0].shape[1]
  groups = heads // kv_heads
  # A group's queries share their keys, so they are rows of one matrix product.
  q_BTKGH = q_BTNH.reshape(batch, time, kv_heads, groups, head_dim)
  q_BTKGH = q_BTKGH * _scale(q_BTNH, scale)
  q_BKQH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * time, head_dim)

  scores = []
  for k_BKSH, _, mask_BTS in parts:
    scores_BKQS = jnp.einsum('BKQH,BKSH->BKQS', q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = softcap(scores_BKQS.reshape(batch, kv_heads, groups, time, -1), cap)
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
  window: jax.Array | None = None,
  scale: float | None = None,
  cap: float = 0.0,
) -> jax.Array:
  """Causal attention among the tokens of one call, a block of queries at a time.

  Tokens of a sequence must lie in order, so that a block never looks past its own
  end: half of the products are skipped. The backward pass recomputes a block's weights
  from their log-sum-exp (Dao et al. 2022, FlashAttention, algorithm 4). Differentiable
  in reverse mode, once.

  Args:
    q_BTNH: queries.
    k_BKTH: keys of the same tokens.
    v_BKTH: values of the same tokens.
    positions_BT: position of each token in its sequence, rising within a sequence.
    segments_BT: the packed sequence that each token belongs to, or None for one a row.
      `SHARED` tokens come first; positions of the others go on from theirs.
    window: how many of the latest tokens, its own included, a query sees; None: all.
    scale: what scores are multiplied by; None: H ** -0.5.
    cap: of the scores, see `softcap`.

  Returns:
    out_BTNH.
  """
  seen = (positions_BT, segments_BT, window)
  return _blockwise(scale, cap, q_BTNH, k_BKTH, v_BKTH, seen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(scale, cap, q_BTNH, k_BKTH, v_BKTH, seen):
  return _blockwise_forward(scale, cap, q_BTNH, k_BKTH, v_BKTH, seen)[0]


def _blockwise_forward(scale, cap, q_BTNH, k_BKTH, v_BKTH, seen):
  q_BKGTH = _by_kv_head(q_BTNH * _scale(q_BTNH, scale), k_BKTH.shape[1])
  out, log_sums = [], []
  for start, end in _blocks(q_BTNH.shape[1]):
    q_BKQH = _merge_groups(q_BKGTH[..., start:end, :])
    scores_BKQS = _product('BKQH,BKSH->BKQS', q_BKQH, k_BKTH[:, :, :end])
    scores_BKGtS = softcap(scores_BKQS.reshape(*q_BKGTH.shape[:3], end - start, end), cap)
    scores_BKGtS += _bias(seen, start, end)[:, None, None]
    top_BKGt1 = scores_BKGtS.max(-1, keepdims=True)
    weights_BKGtS = jnp.exp(scores_BKGtS - top_BKGt1)
    total_BKGt1 = weights_BKGtS.sum(-1, keepdims=True)
    weights_BKQS = weights_BKGtS.astype(v_BKTH.dtype).reshape(scores_BKQS.shape)
    sum_BKQH = _product('BKQS,BKSH->BKQH', weights_BKQS, v_BKTH[:, :, :end])
    # Dividing the (t, H) output is cheaper than dividing the (t, S) weights.
    out.append(sum_BKQH.reshape(*total_BKGt1.shape[:4], -1) / total_BKGt1)
    log_sums.append((top_BKGt1 + jnp.log(total_BKGt1))[..., 0])
  out_BKGTH = jnp.concatenate(out, axis=3).astype(q_BTNH.dtype)
  held = (q_BTNH, k_BKTH, v_BKTH, seen, out_BKGTH, log_sums)
  return _by_token(out_BKGTH), held


def _blockwise_backward(scale, cap, held, grad_BTNH):
  """Gradients, with scores and weights as (S, Q): every product then reads rows of memory."""
  q_BTNH, k_BKTH, v_BKTH, seen, out_BKGTH, log_sums = held
  dtype, kv_heads = q_BTNH.dtype, k_BKTH.shape[1]
  q_BKGTH = _by_kv_head(q_BTNH * _scale(q_BTNH, scale), kv_heads)
  grad_BKGTH = _by_kv_head(grad_BTNH, kv_heads)
  dot_BKGT = (grad_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(-1)
  # The scale makes it an array of its own: a mere view would be multiplied slowly.
  keys_BKHT = k_BKTH.swapaxes(2, 3) * _scale(q_BTNH, scale)
  dq, dk_BKTH, dv_BKTH = [], jnp.zeros(k_BKTH.shape), jnp.zeros(v_BKTH.shape)
  for (start, end), log_sum_BKGt in zip(_blocks(q_BTNH.shape[1]), log_sums, strict=True):
    q_BKQH = _merge_groups(q_BKGTH[..., start:end, :])
    grad_BKQH = _merge_groups(grad_BKGTH[..., start:end, :])
    scores_BKSQ = _product('BKSH,BKQH->BKSQ', k_BKTH[:, :, :end], q_BKQH)
    # Groups apart from queries, or the bias is spread by a division for each number.
    apart = (*scores_BKSQ.shape[:3], q_BKGTH.shape[2], end - start)
    bias_BSt = _bias(seen, start, end).swapaxes(1, 2)
    capped_BKSGt = softcap(scores_BKSQ.reshape(apart), cap)
    logits_BKSGt = capped_BKSGt + bias_BSt[:, None, :, None]
    weights_BKSGt = jnp.exp(logits_BKSGt - log_sum_BKGt[:, :, None])
    of_weights_BKSQ = _product('BKSH,BKQH->BKSQ', v_BKTH[:, :, :end], grad_BKQH)
    surplus_BKSGt = of_weights_BKSQ.reshape(apart) - dot_BKGT[:, :, None, :, start:end]
    dscores_BKSGt = weights_BKSGt * surplus_BKSGt
    if cap:
      # Through the cap: the derivative of tanh is 1 - tanh ** 2.
      dscores_BKSGt *= 1 - (capped_BKSGt / cap) ** 2
    dscores_BKSQ = dscores_BKSGt.astype(dtype).reshape(scores_BKSQ.shape)
    weights_BKSQ = weights_BKSGt.astype(dtype).reshape(scores_BKSQ.shape)
    dv_BKTH = dv_BKTH.at[:, :, :end].add(_product('BKSQ,BKQH->BKSH', weights_BKSQ, grad_BKQH))
    dk_BKTH = dk_BKTH.at[:, :, :end].add(_product('BKSQ,BKQH->BKSH', dscores_BKSQ, q_BKQH))
    dq_BKHQ = jnp.einsum('BKHS,BKSQ->BKHQ', keys_BKHT[..., :end], dscores_BKSQ)
    dq.append(dq_BKHQ.reshape(*dq_BKHQ.shape[:3], *apart[3:]))
  # Turned once and apart, or the compiler turns the products instead, which is slow.
  dq_BKHGT = jax.lax.optimization_barrier(jnp.concatenate(dq, axis=-1))
  dq_BTNH = dq_BKHGT.transpose(0, 4, 1, 3, 2).reshape(q_BTNH.shape)
  return dq_BTNH, dk_BKTH.astype(dtype), dv_BKTH.astype(dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _blocks(time: int) -> list[tuple[int, int]]:
  """Starts and ends of the blocks of queries."""
  size = max(_BLOCK, -(-time // _MAX_BLOCKS))
  return [(start, min(start + size, time)) for start in range(0, time, size)]


def _scale(q_BTNH: jax.Array, scale: float | None) -> jax.Array:
  return jnp.asarray(q_BTNH.shape[-1] ** -0.5 if scale is None else scale, q_BTNH.dtype)


def _by_kv_head(x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
  """(B, K, G, T, H): the query heads under the key/value head that they share."""
  batch, time, heads, head_dim = x_BTNH.shape
  x_BTKGH = x_BTNH.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
  return x_BTKGH.transpose(0, 2, 3, 1, 4)


def _by_token(x_BKGTH: jax.Array) -> jax.Array:
  """Undoes `_by_kv_head`."""
  batch, kv_heads, groups, time, head_dim = x_BKGTH.shape
  return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, time, kv_heads * groups, head_dim)


def _merge_groups(x_BKGtH: jax.Array) -> jax.Array:
  """A group's queries share their keys, so they are rows of one matrix product."""
  batch, kv_heads, groups, time, head_dim = x_BKGtH.shape
  return x_BKGtH.reshape(batch, kv_heads, groups * time, head_dim)


def _product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
  return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def _bias(seen, start: int, end: int) -> jax.Array:
  """(B, t, S): 0 where a query of the block may see a key up to its end, else `_HIDDEN`."""
  positions_BT, segments_BT, window = seen
  queries = None if segments_BT is None else segments_BT[:, start:end]
  keys = None if segments_BT is None else segments_BT[:, :end]
  mask_BtS = causal_mask(positions_BT[:, start:end], positions_BT[:, :end], queries, keys, window)
  return jnp.where(mask_BtS, 0.0, _HIDDEN)

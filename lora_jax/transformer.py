"""A decoder-only Transformer in Flax Linen: pure, stacked, scanned.

Shape legend for tensor names, here and everywhere else:
  B batch, T query time (t a block of it), S key time, L layers, D model, N query
  heads, K key/value heads, G query heads per key/value head, Q = G x t queries that
  share keys, H head dim, F feed-forward, V vocabulary, R rank; in a loss, P positions
  and C a chunk of them.

Parameters carry Hugging Face module names; a `kernel` is (in, out) with heads
flattened, and all blocks share one subtree `layers` whose leaves lead with L:

  embed_tokens/embedding                   layers/attn/{q,k,v,o}_proj/kernel
  layers/input_layernorm/scale             layers/mlp/{gate,up,down}_proj/kernel
  layers/post_attention_layernorm/scale    norm/scale    (lm_head/kernel if untied)

The model returns hidden states; `Transformer.head` turns the ones that matter into
logits, so that a loss on few positions does not pay for the vocabulary on all.

  model = Transformer(config)
  hidden_BTD, _ = model.apply({'params': params}, tokens_BT, positions_BT)
  logits_BTV = model.apply({'params': params}, hidden_BTD, method='head')
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.attention import attend, causal_mask, self_attend
from lora_jax.config import ModelConfig
from lora_jax.kernels import Kernel, dot

_init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')


@flax.struct.dataclass
class KeyValues:
  """Keys and values of a stretch of tokens, over all layers.

  Heads come before tokens, so that decoding reads whole rows of memory.

  Attributes:
    k_LBKSH: keys, rotated.
    v_LBKSH: values.
  """

  k_LBKSH: jax.Array
  v_LBKSH: jax.Array

  @classmethod
  def empty(cls, config: ModelConfig, batch: int, length: int, dtype) -> 'KeyValues':
    """Room for `length` tokens in each of `batch` rows."""
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  def write(self, new: 'KeyValues', start: jax.Array) -> 'KeyValues':
    """Puts new tokens at slot `start` of every row: one slice, updated in place."""
    put = lambda old, fresh: jax.lax.dynamic_update_slice_in_dim(old, fresh, start, axis=3)
    return KeyValues(put(self.k_LBKSH, new.k_LBKSH), put(self.v_LBKSH, new.v_LBKSH))


# Earlier tokens, and which of them (B, S) the rows may see. A stretch may be ragged:
# slots that hold padding, or nothing yet, are simply not visible.
Past = Sequence[tuple[KeyValues, jax.Array]]


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding (Su et al. 2021) in the half-split layout of Hugging Face."""
  half = x_BTNH.shape[-1] // 2
  frequencies_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_h[None, None, None]
  sin, cos = jnp.sin(angles_BT1h), jnp.cos(angles_BT1h)
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)


class Dense(nn.Module):
  """A linear map without bias whose kernel may be of any kind `dot` knows.

  Attributes:
    features: size of the output.
    dtype: of the output; None: the input's.
  """

  features: int
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    # `self.param` would reject a kernel that is not one array of the declared shape.
    if self.is_initializing():
      kernel = self.param('kernel', _init, (x.shape[-1], self.features))
    else:
      kernel = self.get_variable('params', 'kernel')
    return dot(x, kernel, self.dtype)


class RMSNorm(nn.Module):
  """Root-mean-square normalisation (Zhang and Sennrich 2019), in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return (x32 * jnp.broadcast_to(scale, x.shape).astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, positions_BT, segments_BT, past):
    c = self.config
    split = lambda x, heads: x.reshape(*x.shape[:2], heads, c.head_dim)
    q_BTNH = split(Dense(c.num_heads * c.head_dim, name='q_proj')(x_BTD), c.num_heads)
    k_BTKH = split(Dense(c.num_kv_heads * c.head_dim, name='k_proj')(x_BTD), c.num_kv_heads)
    v_BTKH = split(Dense(c.num_kv_heads * c.head_dim, name='v_proj')(x_BTD), c.num_kv_heads)
    q_BTNH = rope(q_BTNH, positions_BT, c.rope_theta)
    k_BKTH = rope(k_BTKH, positions_BT, c.rope_theta).swapaxes(1, 2)
    v_BKTH = v_BTKH.swapaxes(1, 2)
    if not past:
      out_BTNH = self_attend(q_BTNH, k_BKTH, v_BKTH, positions_BT, segments_BT)
    else:
      new = (k_BKTH, v_BKTH, causal_mask(positions_BT, positions_BT))
      out_BTNH = attend(q_BTNH, [*past, new])
    out_BTD = Dense(c.model_dim, name='o_proj')(out_BTNH.reshape(*x_BTD.shape[:2], -1))
    return out_BTD, (k_BKTH, v_BKTH)


class Mlp(nn.Module):
  """Gated feed-forward network with SiLU (Shazeer 2020, SwiGLU)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    gate_BTF = Dense(c.mlp_dim, name='gate_proj')(x_BTD)
    up_BTF = Dense(c.mlp_dim, name='up_proj')(x_BTD)
    return Dense(c.model_dim, name='down_proj')(nn.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
  """One pre-norm block; the body of the scan over layers."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, past_kv, positions_BT, segments_BT, visible):
    c = self.config
    past = [(k, v, mask_B1S) for (k, v), mask_B1S in zip(past_kv, visible, strict=True)]
    normed = RMSNorm(c.norm_eps, name='input_layernorm')(x_BTD)
    attn_BTD, new_kv = Attention(c, name='attn')(normed, positions_BT, segments_BT, past)
    x_BTD = x_BTD + attn_BTD
    normed = RMSNorm(c.norm_eps, name='post_attention_layernorm')(x_BTD)
    return x_BTD + Mlp(c, name='mlp')(normed), new_kv


class Transformer(nn.Module):
  """The model: tokens to hidden states, and hidden states to logits.

  Attributes:
    config: the shape.
    dtype: of activations and products; norms, softmax and rotations are float32.
    remat: recompute each block in the backward pass instead of keeping its insides.
  """

  config: ModelConfig
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  def setup(self):
    c = self.config
    self.embed_tokens = nn.Embed(c.vocab_size, c.model_dim)
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    # Flax declares a single int here, and documents a tuple.
    axes: Any = (0, nn.broadcast, nn.broadcast, nn.broadcast)
    self.layers = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=axes,
      length=c.num_layers,
    )(c)
    self.norm = RMSNorm(c.norm_eps)
    if not c.tie_embeddings:
      self.lm_head = Dense(c.vocab_size, jnp.float32)

  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    past: Past = (),
  ) -> tuple[jax.Array, KeyValues]:
    """Runs the blocks.

    Args:
      tokens_BT: token ids.
      positions_BT: each token's position in its own sequence; None: 0..T-1.
      segments_BT: which packed sequence each token belongs to; tokens see only
        their own. None: one sequence a row.
      past: earlier tokens of the same rows, for decoding: all of them come before
        all of `tokens_BT`. It does not go with `segments_BT`.

    Returns:
      hidden_BTD after the last norm, and the keys and values of these T tokens.
    """
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    past_kv = tuple((stretch.k_LBKSH, stretch.v_LBKSH) for stretch, _ in past)
    visible = tuple(visible_BS[:, None, :] for _, visible_BS in past)
    x_BTD = self.embed_tokens(tokens_BT).astype(self.dtype)
    x_BTD, new_kv = self.layers(x_BTD, past_kv, positions_BT, segments_BT, visible)
    return self.norm(x_BTD), KeyValues(*new_kv)

  def head(self, hidden: jax.Array) -> jax.Array:
    """Hidden states (..., D) to float32 logits (..., V)."""
    if self.config.tie_embeddings:
      return logits(hidden, self.embed_tokens.embedding.T)
    return self.lm_head(hidden)

  def init_all(self, tokens_BT: jax.Array) -> jax.Array:
    """Touches every parameter, the head's too: the method to `init` with."""
    return self.head(self(tokens_BT)[0])


def abstract_params(config: ModelConfig) -> dict:
  """The parameter tree as shapes and dtypes (float32), nothing computed."""
  model = Transformer(config)
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(lambda k, t: model.init(k, t, method='init_all'), key, tokens)['params']


def init_params(config: ModelConfig, key: jax.Array) -> dict:
  """Random float32 parameters."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return dict(Transformer(config).init(key, tokens, method='init_all')['params'])


def head_kernel(model: Transformer, params: Mapping[str, Any]) -> Kernel:
  """The head as a kernel (D, V), laid out once for many products.

  A tied table is (V, D) and the product wants (D, V). Left to itself the compiler
  multiplies by the transposed view each time, several times slower on a CPU.
  """
  if not model.config.tie_embeddings:
    return params['lm_head']['kernel']
  table_DV = params['embed_tokens']['embedding'].astype(model.dtype).T
  return jax.lax.optimization_barrier(table_DV)


def logits(hidden: jax.Array, kernel: Kernel) -> jax.Array:
  """Hidden states (..., D) times the head's kernel (D, V): float32 logits (..., V).

  They are never rounded to a smaller dtype: in bfloat16, choices would tie.
  """
  return dot(hidden, kernel, jnp.float32)

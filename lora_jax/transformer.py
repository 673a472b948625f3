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

and where the configuration asks for them

  layers/{attn,mlp}/*_proj/bias             layers/attn/{q,k}_norm/scale
  layers/{pre,post}_feedforward_layernorm/scale
  vision/...  connector/...                 what a model that sees has besides; see `vision`

The model returns hidden states; `Transformer.head` turns the ones that matter into
logits, so that a loss on few positions does not pay for the vocabulary on all.

  model = Transformer(config)
  hidden_BTD, _ = model.apply({'params': params}, tokens_BT, positions_BT)
  logits_BTV = model.apply({'params': params}, hidden_BTD, method='head')
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lora_jax import rotary
from lora_jax.attention import attend, causal_mask, softcap
from lora_jax.config import ModelConfig
from lora_jax.head import logits
from lora_jax.layers import ACTIVATIONS, Dense
from lora_jax.self_attention import SelfAttention
from lora_jax.sharding import by_rows
from lora_jax.vision import CHANNELS, Connector, Features, VisionTower


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
    """Puts new tokens at slot `start` of every row: one slice, updated in place.

    Both may have more axes before L: under `vmap` the slice would become a scatter.
    """
    put = lambda old, fresh: jax.lax.dynamic_update_slice_in_dim(old, fresh, start, axis=-2)
    return KeyValues(put(self.k_LBKSH, new.k_LBKSH), put(self.v_LBKSH, new.v_LBKSH))

  def write_each(self, new: 'KeyValues', slots_B: jax.Array) -> 'KeyValues':
    """Puts one new token of each row at a slot of its own: a scatter.

    It is done in place where this is donated to the program, and a copy within a loop. A slot
    beyond the last is not written.
    """
    rows_B = jnp.arange(slots_B.size)
    put = lambda old, fresh: old.at[:, rows_B, :, slots_B].set(jnp.moveaxis(fresh[..., 0, :], 1, 0))
    return jax.tree.map(put, self, new)


# The position of a slot that holds nothing: later than any query, so that none sees it.
NOWHERE = np.iinfo(np.int32).max

# Earlier tokens and the position of each (B, S) in its row. A stretch may be ragged:
# slots that hold padding, or nothing yet, are `NOWHERE`.
Past = Sequence[tuple[KeyValues, jax.Array]]


@flax.struct.dataclass
class Layer:
  """In what one layer differs from the others; None where all are alike.

  Attributes:
    window: how many of the latest tokens a token sees.
    frequencies_h: of the rotary positions.
    magnitude: what rotated queries and keys are multiplied by.
  """

  window: jax.Array | None = None
  frequencies_h: jax.Array | None = None
  magnitude: jax.Array | None = None

  @classmethod
  def stacked(cls, config: ModelConfig, farthest: int = NOWHERE) -> 'Layer':
    """All layers, with a leading axis L for `scan` to take off.

    No two tokens are `farthest` tokens apart, so that windows as long hide nothing.
    """
    window = frequencies_h = magnitude = None
    if any(0 < length < farthest for length in config.windows):
      windows_L = np.asarray(config.windows, np.int32)
      window = jnp.asarray(np.where(windows_L > 0, windows_L, NOWHERE))
    if config.rope_thetas:
      turns = [rotary.frequencies(config, theta) for theta in config.rope_thetas]
      frequencies_h = jnp.stack([of_layer_h for of_layer_h, _ in turns])
      magnitude = jnp.asarray([of_layer for _, of_layer in turns], jnp.float32)
    return cls(window, frequencies_h, magnitude)


# Of a feed-forward network, what is kept for the backward pass.
_KEPT = ('gate', 'up')


class RMSNorm(nn.Module):
  """Root-mean-square normalisation (Zhang and Sennrich 2019), in float32.

  Attributes:
    eps: added to the mean square.
    offset: added to the weight.
  """

  eps: float
  offset: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param('scale', nn.initializers.constant(1 - self.offset), (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    scale32 = jnp.broadcast_to(scale, x.shape).astype(jnp.float32)
    if self.offset:
      scale32 += self.offset
    return (x32 * scale32).astype(x.dtype)


def _norm(config: ModelConfig, name: str) -> RMSNorm:
  return RMSNorm(config.norm_eps, config.norm_offset, name=name)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: ModelConfig
  self_attention: SelfAttention

  @nn.compact
  def __call__(self, x_BTD, layer, positions_BT, segments_BT, past):
    """Attends among the tokens of this call, or to earlier ones and these.

    Args:
      x_BTD: normalised hidden states.
      layer: this layer's own `Layer`.
      positions_BT: each token's position in its own sequence.
      segments_BT: as in `Transformer`, or None; not read where there is a past.
      past: ((k_BKSH, v_BKSH), positions_BS) of each earlier stretch, this layer's alone.

    Returns:
      out_BTD, and (k_BKTH, v_BKTH) of these tokens, keys rotated.
    """
    c = self.config
    kv_dim = c.num_kv_heads * c.head_dim
    split = lambda x, heads: x.reshape(*x.shape[:2], heads, c.head_dim)
    dense = lambda features, name: Dense(features, use_bias=c.qkv_bias, name=name)(x_BTD)
    q_BTNH = split(dense(c.num_heads * c.head_dim, 'q_proj'), c.num_heads)
    k_BTKH = split(dense(kv_dim, 'k_proj'), c.num_kv_heads)
    v_BTKH = split(dense(kv_dim, 'v_proj'), c.num_kv_heads)
    if c.qk_norm:
      q_BTNH = _norm(c, 'q_norm')(q_BTNH)
      k_BTKH = _norm(c, 'k_norm')(k_BTKH)
    turn = (layer.frequencies_h, layer.magnitude)
    if layer.frequencies_h is None:
      turn = rotary.frequencies(c, c.rope_theta)
    q_BTNH = rotary.rotate(q_BTNH, positions_BT, *turn)
    k_BKTH = rotary.rotate(k_BTKH, positions_BT, *turn).swapaxes(1, 2)
    v_BKTH = v_BTKH.swapaxes(1, 2)
    score = {'scale': c.query_scale, 'cap': c.attention_cap}
    if not past:
      out_BTNH = self.self_attention(
        q_BTNH, k_BKTH, v_BKTH, positions_BT, segments_BT, layer.window, **score
      )
    else:
      own = ((k_BKTH, v_BKTH), positions_BT)
      sees = lambda keys_BS: causal_mask(positions_BT, keys_BS, window=layer.window)
      parts = [(*key_values, sees(keys_BS)) for key_values, keys_BS in [*past, own]]
      out_BTNH = attend(q_BTNH, parts, **score)
    output = Dense(c.model_dim, use_bias=c.output_bias, name='o_proj')
    return output(out_BTNH.reshape(*x_BTD.shape[:2], -1)), (k_BKTH, v_BKTH)


class Mlp(nn.Module):
  """Gated feed-forward network (Shazeer 2020, SwiGLU and GEGLU)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    dense = lambda features, name: Dense(features, use_bias=c.mlp_bias, name=name)
    gate_BTF = checkpoint_name(dense(c.mlp_dim, 'gate_proj')(x_BTD), _KEPT[0])
    up_BTF = checkpoint_name(dense(c.mlp_dim, 'up_proj')(x_BTD), _KEPT[1])
    hidden_BTF = ACTIVATIONS[c.activation](gate_BTF) * up_BTF
    return dense(c.model_dim, 'down_proj')(hidden_BTF)


def _normed_mlp(config: ModelConfig, norm: str, x_BTD: jax.Array) -> jax.Array:
  """The feed-forward network of what it is given normalised, within the module that calls it.

  Of its insides only the two large products are kept for the backward pass: all else is cheap
  to compute again, and would be most of what a block keeps (BUILD_NOTES.md, Speed).
  """
  work = lambda mlp, normalise, x: mlp(normalise(x))
  kept = jax.checkpoint_policies.save_only_these_names(*_KEPT)
  remat = nn.remat(work, prevent_cse=False, policy=kept)
  return remat(Mlp(config, name='mlp'), _norm(config, norm), x_BTD)


class Block(nn.Module):
  """One block; the body of the scan over layers.

  Attention and feed-forward are normalised before, and with `post_norms` after too;
  `post_attention_layernorm` is then what its name says, as in Gemma 2.
  """

  config: ModelConfig
  attention: SelfAttention

  @nn.compact
  def __call__(self, x_BTD, past_kv, layer, positions_BT, segments_BT, past_positions):
    """Runs one block.

    Args:
      x_BTD: hidden states: what `scan` carries from layer to layer.
      past_kv: (k_BKSH, v_BKSH) of each earlier stretch, of this layer.
      layer: this layer's own `Layer`.
      positions_BT: each token's position in its own sequence.
      segments_BT: as in `Transformer`, or None.
      past_positions: positions_BS of each earlier stretch, the same in all layers.

    Returns:
      x_BTD after the block, and (k_BKTH, v_BKTH) of these tokens: what `scan` stacks.
    """
    c = self.config
    past = [*zip(past_kv, past_positions, strict=True)]
    x_BTD = by_rows(x_BTD)
    normed = _norm(c, 'input_layernorm')(x_BTD)
    attend = Attention(c, self.attention, name='attn')
    attn_BTD, new_kv = attend(normed, layer, positions_BT, segments_BT, past)
    if not c.post_norms:
      x_BTD = x_BTD + attn_BTD
      return x_BTD + _normed_mlp(c, 'post_attention_layernorm', x_BTD), new_kv
    x_BTD = x_BTD + _norm(c, 'post_attention_layernorm')(attn_BTD)
    mlp_BTD = _normed_mlp(c, 'pre_feedforward_layernorm', x_BTD)
    return x_BTD + _norm(c, 'post_feedforward_layernorm')(mlp_BTD), new_kv


class Transformer(nn.Module):
  """The model: tokens to hidden states, and hidden states to logits.

  Attributes:
    config: the shape.
    dtype: of activations and products; norms, softmax and rotations are float32.
    remat: recompute each block in the backward pass instead of keeping its insides.
    attention: what tokens of one call attend to each other by.
  """

  config: ModelConfig
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  attention: SelfAttention = SelfAttention()

  def setup(self):
    c = self.config
    self.embed_tokens = nn.Embed(c.vocab_size, c.model_dim)
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    # Flax declares a single int here, and documents a tuple.
    axes: Any = (0, 0, nn.broadcast, nn.broadcast, nn.broadcast)
    self.layers = nn.scan(
      block,
      # There are none, unless a caller has modules sow some.
      variable_axes={'params': 0, 'intermediates': 0},
      split_rngs={'params': True},
      in_axes=axes,
      length=c.num_layers,
    )(c, self.attention)
    self.norm = RMSNorm(c.norm_eps, c.norm_offset)
    if not c.tie_embeddings:
      self.lm_head = Dense(c.vocab_size, jnp.float32)
    if c.vision is not None:
      self.vision = VisionTower(c.vision, self.dtype, self.remat)
      self.connector = Connector(c.vision, c.model_dim)

  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    past: Past = (),
    features: Features | None = None,
  ) -> tuple[jax.Array, KeyValues]:
    """Runs the blocks.

    Args:
      tokens_BT: token ids.
      positions_BT: each token's position in its own sequence; None: 0..T-1.
      segments_BT: which packed sequence each token belongs to; tokens see only
        their own and what is `attention.SHARED`. None: one sequence a row.
      past: earlier tokens of the same rows, for decoding: all of them come before
        all of `tokens_BT`. It does not go with `segments_BT`.
      features: what `see` made of images, in the place of some tokens.

    Returns:
      hidden_BTD after the last norm, and the keys and values of these T tokens.
    """
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    past_kv = tuple((stretch.k_LBKSH, stretch.v_LBKSH) for stretch, _ in past)
    past_positions = tuple(positions_BS for _, positions_BS in past)
    x_BTD = self.embed_tokens(tokens_BT).astype(self.dtype)
    if self.config.embed_scale != 1:
      # transformers rounds the factor too.
      x_BTD *= jnp.asarray(self.config.embed_scale, self.dtype)
    if features is not None:
      x_BTD = features.put(x_BTD)
    layers = Layer.stacked(self.config, NOWHERE if past else tokens_BT.shape[1])
    x_BTD, new_kv = self.layers(x_BTD, past_kv, layers, positions_BT, segments_BT, past_positions)
    return by_rows(self.norm(x_BTD)), KeyValues(*new_kv)

  def see(self, pixels_IYXC: jax.Array, seen_Iyx: jax.Array | None = None) -> jax.Array:
    """Images to embeddings for their tokens, features_IED; arguments as in `VisionTower`."""
    return self.connector(self.vision(pixels_IYXC, seen_Iyx))

  def head(self, hidden: jax.Array) -> jax.Array:
    """Hidden states (..., D) to float32 logits (..., V)."""
    if self.config.tie_embeddings:
      return logits(self, hidden, self.embed_tokens.embedding.T)
    return softcap(self.lm_head(hidden), self.config.logit_cap)

  def init_all(self, tokens_BT: jax.Array) -> jax.Array:
    """Touches every parameter, the head's too: the method to `init` with."""
    if self.config.vision is not None:
      side = self.config.vision.image_size
      self.see(jnp.zeros((1, side, side, CHANNELS)))
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

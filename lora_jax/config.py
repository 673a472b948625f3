"""Configuration as frozen dataclasses; every default stands here once."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from lora_jax.errors import UserError

# How an adapter may start.
LORA_INITS = ('default', 'pissa')

# Where downloads, prepared rows and compiled programs are kept unless told otherwise.
CACHE = '~/.cache/lora_jax'

# What the weights of a merged checkpoint may be.
CHECKPOINT_DTYPES = ('bfloat16', 'float16', 'float32')

# The longest side that an image is scaled to; the reference goes no further.
LONGEST_EDGE = 4096

# How predictions of a user's own rows may be compared; see `lora_jax.data.own_task`.
METRICS = ('exact_match', 'choice', 'rouge', 'json_fields', 'numeric')
# What they may be called for short.
SHORT_METRICS = {'exact': 'exact_match', 'json': 'json_fields'}

# How the kernels of a frozen base's blocks may be stored; see `lora_jax.quantize`.
QUANTIZE = ('none', 'nf4', 'int4', 'int8')


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched for contexts longer than those trained on.

  Attributes:
    kind: 'linear' (positions divided by `factor`), 'llama3' (Llama 3.1: only long
      wavelengths, smoothly between the two bounds) or 'yarn' (Peng et al. 2023).
    factor: how many times longer.
    original_length: context of the unscaled model, in tokens ('llama3', 'yarn').
    low: 'llama3': wavelengths beyond `original_length / low` are divided by `factor`;
      'yarn': `beta_slow`.
    high: 'llama3': those below `original_length / high` are kept; 'yarn': `beta_fast`.
    attention_factor: what queries and keys are multiplied by ('yarn'); 1 elsewhere.
  """

  kind: str
  factor: float
  original_length: int = 0
  low: float = 1.0
  high: float = 1.0
  attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Shape of what a language model sees with: a tower over patches, and its connector.

  Attributes:
    image_size: side of the square that the position table is for, in pixels.
    patch_size: side of a patch.
    model_dim: width of the tower.
    num_layers: its blocks.
    num_heads: of its attention.
    mlp_dim: width of its feed-forward network.
    shuffle: the connector joins squares of this many patches a side into one embedding.
    image_token: the token that stands for one such embedding in a text.
    norm_eps: epsilon of its LayerNorm.
  """

  image_size: int
  patch_size: int
  model_dim: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  shuffle: int
  image_token: int
  norm_eps: float = 1e-6

  def patches(self, side: int) -> int:
    """Whole patches along `side` pixels; what is left over is not looked at."""
    return side // self.patch_size

  def embeddings(self, side: int) -> int:
    """Embeddings that an image of `side` x `side` pixels becomes."""
    return (self.patches(side) // self.shuffle) ** 2


@dataclasses.dataclass(frozen=True)
class ImageConfig:
  """How an image is made ready for a tower; see `lora_jax.data.tiles`.

  Attributes:
    longest_edge: what an image's longer side is scaled to, in pixels.
    tile: side of the squares that it is cut into.
    split: whether it is cut at all, or squeezed into one square.
    resample: the filter, as Pillow numbers them (1: Lanczos).
    mean: of each channel, of values in 0..1; taken off.
    std: what each channel is divided by then.
  """

  longest_edge: int
  tile: int
  split: bool = True
  resample: int = 1
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of a decoder-only Transformer: one for all families, which differ in fields.

  A tuple over layers has `num_layers` entries, or none where all layers are alike.

  Attributes:
    vocab_size: rows of the embedding table (V).
    num_layers: blocks.
    model_dim: width of the residual stream (D).
    num_heads: query heads (N).
    num_kv_heads: key and value heads (K); divides `num_heads`.
    head_dim: width of one head (H).
    mlp_dim: width of the gated feed-forward network (F).
    max_length: the longest context that the base was trained for, in tokens.
    rope_theta: base of the rotary frequencies.
    norm_eps: epsilon of RMSNorm.
    tie_embeddings: whether the output head is the transposed embedding table.
    rope_scaling: how the frequencies are stretched, or None.
    rope_thetas: over layers: the base of this layer's frequencies where layers differ,
      0 for a layer without positions (SmolLM3). `rope_scaling` applies to the layers
      whose base is `rope_theta`.
    windows: over layers: how many of the latest tokens, its own included, a token
      sees; 0 for all.
    qkv_bias: whether queries, keys and values have a bias (Qwen 2).
    output_bias: whether the attention's output projection has one.
    mlp_bias: whether the feed-forward projections have one.
    qk_norm: whether each head's queries and keys are normalised (Qwen 3, Gemma 3).
    post_norms: whether the outputs of attention and feed-forward are normalised too,
      before they are added (Gemma).
    norm_offset: added to the weight of every RMSNorm (Gemma: 1).
    activation: of the gate: 'silu' or 'gelu_tanh'.
    embed_scale: what token embeddings are multiplied by (Gemma: sqrt(D)).
    query_scale: what scores are multiplied by; None: head_dim ** -0.5.
    attention_cap: scores s become cap * tanh(s / cap) (Gemma 2); 0: as they are.
    logit_cap: the same for logits.
    vision: what it sees with, or None.
  """

  vocab_size: int
  num_layers: int
  model_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  max_length: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  rope_scaling: RopeScaling | None = None
  rope_thetas: tuple[float, ...] = ()
  windows: tuple[int, ...] = ()
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  norm_offset: float = 0.0
  activation: str = 'silu'
  embed_scale: float = 1.0
  query_scale: float | None = None
  attention_cap: float = 0.0
  logit_cap: float = 0.0
  vision: VisionConfig | None = None


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which of the LoRA family an adapter is, and its shape.

  A pattern is a module's name (`o_proj`), an article's target (`qkv`) or a regular
  expression that matches a module's whole path, with its layer or without
  (`layers/attn/.*`, `layers/3/attn/o_proj`); the first that matches holds.

  Attributes:
    rank: R of the modules that no pattern names.
    alpha: the update is scaled by alpha / rank.
    dropout: share of an adapter's input dropped while training.
    rank_pattern: pairs of a pattern and the rank of what it matches.
    alpha_pattern: the same for alpha.
    rslora: scale by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023).
    dora: learn the length of each output's weights beside their direction (DoRA, Liu et
      al. 2024).
    init: 'default' (A random, B zero) or 'pissa' (the principal singular vectors, which
      the frozen kernels then go without; Meng et al. 2024).
    layers: the adapted ones of the language model, as '0-7,12'; '' is all.
    train_also: patterns of norms and biases that train too, in all layers: a module's
      name, 'bias', or a regular expression on the leaf's path (`layers/.*/scale`).

  Raises:
    UserError: a value that makes no sense.
  """

  rank: int = 16
  alpha: float = 32.0
  dropout: float = 0.0
  rank_pattern: tuple[tuple[str, int], ...] = ()
  alpha_pattern: tuple[tuple[str, float], ...] = ()
  rslora: bool = False
  dora: bool = False
  init: str = 'default'
  layers: str = ''
  train_also: tuple[str, ...] = ()

  def __post_init__(self):
    if self.init not in LORA_INITS:
      raise UserError(f'init is {self.init!r}; give one of {", ".join(LORA_INITS)}')
    if self.layers and not re.fullmatch(r'\d+(-\d+)?(,\d+(-\d+)?)*', self.layers):
      raise UserError(f"layers is {self.layers!r}; give numbers and ranges, as '0-7,12'")
    for pattern, rank in self.rank_pattern:
      if type(rank) is not int or rank < 1:
        raise UserError(f'rank_pattern {pattern}={rank}: give a whole number above zero')
    for pattern, alpha in self.alpha_pattern:
      if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f'alpha_pattern {pattern}={alpha}: give a number above zero')
    for pattern in (*dict(self.rank_pattern), *dict(self.alpha_pattern), *self.train_also):
      try:
        re.compile(pattern)
      except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f'{pattern!r} is no pattern ({error})') from error

  @classmethod
  def from_record(cls, held: Mapping[str, Any]) -> 'LoraConfig':
    """What `dataclasses.asdict` wrote, back from JSON; fields added since have their defaults."""
    pairs = lambda name: tuple((pattern, value) for pattern, value in held.get(name, ()))
    nested = {name: pairs(name) for name in ('rank_pattern', 'alpha_pattern')}
    return cls(**{**held, **nested, 'train_also': tuple(held.get('train_also', ()))})

  def scale_of(self, rank: float, alpha: float) -> float:
    """The factor on a low-rank product; 0 where there is none (rank 0)."""
    return alpha / rank ** (0.5 if self.rslora else 1.0) if rank else 0.0

  @property
  def scale(self) -> float:
    """The factor where no pattern matches."""
    return self.scale_of(self.rank, self.alpha)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW with the LoRA+ ratio under warm-up and cosine decay.

  Attributes:
    learning_rate: peak rate of A.
    lr_ratio: rate of B over rate of A (LoRA+; 1 is plain LoRA).
    warmup: share of the steps over which the rate rises to its peak.
    final_rate: what the decay comes to, one step after the last, as a share of the peak.
    beta1: decay of Adam's first moment.
    beta2: decay of Adam's second moment.
    weight_decay: decoupled weight decay.
    clip_norm: largest global norm of the gradient.
  """

  learning_rate: float = 5e-4
  lr_ratio: float = 4.0
  warmup: float = 0.1
  final_rate: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  weight_decay: float = 0.0
  clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How long and on what an adapter trains.

  Attributes:
    steps: updates.
    tokens_per_batch: tokens of a batch, padding included; its row length follows from
      the data.
    positions: tokens of a batch, padding included, that run through the model at a time,
      where a row allows it (gradient accumulation); 0: all, but on a CPU 1024.
    max_length: the longest row, prompt and completion together, in tokens.
    train_rows: rows used of the train split, from its start; 0 means all.
    eval_rows: rows of the train split kept out of training to watch the loss on.
    eval_every: updates between two evaluations of that loss.
    keep_best: give back the adapter of the lowest evaluation loss rather than the last.
    patience: stop after so many evaluations in a row without a lower loss; 0: never.
    dtype: of activations and of the frozen base: 'bfloat16' or 'float32'.
    remat: recompute blocks in the backward pass to save memory.
    quantize: how the kernels of the frozen base's blocks are stored, in training and
      ever after: 'none' (in `dtype`), 'nf4', 'int4' or 'int8'.
  """

  steps: int = 40
  tokens_per_batch: int = 2048
  positions: int = 0
  max_length: int = 1024
  train_rows: int = 0
  eval_rows: int = 16
  eval_every: int = 20
  keep_best: bool = False
  patience: int = 0
  dtype: str = 'bfloat16'
  remat: bool = False
  quantize: str = 'none'


@dataclasses.dataclass(frozen=True)
class SightConfig:
  """How a base that sees is shown images.

  Attributes:
    image_edge: what an image's longer side is scaled to, in pixels, which decides into how
      many tiles it is cut; 0: what the base was made for.
    blank_images: show a grey image of the same size in the place of each, so that what is
      learned is learned without sight.

  Raises:
    UserError: an edge that no image can have.
  """

  image_edge: int = 0
  blank_images: bool = False

  def __post_init__(self):
    if not 0 <= self.image_edge <= LONGEST_EDGE:
      raise UserError(
        f'image_edge is {self.image_edge}; give pixels up to {LONGEST_EDGE}, or 0 for what the '
        'base was made for'
      )


@dataclasses.dataclass(frozen=True)
class FileConfig:
  """How a user's own file of conversations is trained on.

  Attributes:
    epochs: passes over its rows, where the number of steps is not given.
    eval_share: share of its rows kept out to watch the loss on, where no file of such
      rows is given.
    most_eval_rows: at most so many are kept out.
    last_only: learn the last answer of each conversation alone, not all.
  """

  epochs: float = 3.0
  eval_share: float = 0.1
  most_eval_rows: int = 256
  last_only: bool = False


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """How much is scored.

  Attributes:
    test_rows: rows of the test split, from its start; 0 means all.
    batch_rows: prompts that run together.
    max_new_tokens: the longest prediction; a task's own limit holds where it is less.
  """

  test_rows: int = 0
  batch_rows: int = 16
  max_new_tokens: int = 320

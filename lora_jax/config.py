"""Configuration as frozen dataclasses; every default stands here once."""

import dataclasses

# Where downloads, prepared rows and compiled programs are kept unless told otherwise.
CACHE = '~/.cache/lora_jax'


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of a decoder-only Transformer (the Llama family).

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


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Shape of an adapter.

  Attributes:
    rank: R of every adapted module.
    alpha: the update is scaled by alpha / rank.
    dropout: share of an adapter's input dropped while training.
  """

  rank: int = 16
  alpha: float = 32.0
  dropout: float = 0.0

  @property
  def scale(self) -> float:
    """The factor on the low-rank product."""
    return self.alpha / self.rank


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
    max_length: the longest row, prompt and completion together, in tokens.
    train_rows: rows used of the train split, from its start; 0 means all.
    eval_rows: rows of the train split kept out of training to watch the loss on.
    eval_every: updates between two evaluations of that loss.
    dtype: of activations and of the frozen base: 'bfloat16' or 'float32'.
    remat: recompute blocks in the backward pass to save memory.
  """

  steps: int = 40
  tokens_per_batch: int = 2048
  max_length: int = 1024
  train_rows: int = 0
  eval_rows: int = 16
  eval_every: int = 20
  dtype: str = 'bfloat16'
  remat: bool = False


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

"""Named settings of a whole study: what every cell of its grid shares."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.config import EvalConfig, LoraConfig, OptimConfig, SightConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all cells of a run share; saved as `run.json` and beside every result.

  Attributes:
    base: name of the base.
    lora: shape of the adapters.
    optim: hyperparameters, the same for every target set (the article's protocol).
    train: length of training.
    eval: how much is scored.
    sight: how images are shown.
    latency_turns: how often each target set is timed.
  """

  base: str = 'smollm2-135m-instruct'
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  sight: SightConfig = dataclasses.field(default_factory=SightConfig)
  latency_turns: int = 10

  @classmethod
  def from_record(cls, held: Mapping[str, Any]) -> 'Settings':
    """What `dataclasses.asdict` wrote, back from JSON.

    Raises:
      TypeError: it has a field that this version does not know.
    """
    parts = {
      'lora': LoraConfig.from_record(held['lora']),
      'optim': OptimConfig(**held['optim']),
      'train': TrainConfig(**held['train']),
      'eval': EvalConfig(**held['eval']),
      'sight': SightConfig(**held['sight']),
    }
    return cls(**{**held, **parts})


PRESETS = {
  # Does everything run? A random base, so the scores mean nothing.
  'smoke': Settings(
    base='tiny',
    lora=LoraConfig(rank=4, alpha=8),
    train=TrainConfig(
      steps=4, tokens_per_batch=2048, max_length=1024, train_rows=64, eval_rows=4, eval_every=4
    ),
    eval=EvalConfig(test_rows=4, batch_rows=4, max_new_tokens=8),
    latency_turns=3,
  ),
  # The default: every dataset on two CPU cores while one waits.
  'quick': Settings(
    train=TrainConfig(
      steps=16, tokens_per_batch=512, max_length=512, train_rows=512, eval_rows=8, eval_every=16
    ),
    eval=EvalConfig(test_rows=12, batch_rows=12, max_new_tokens=160),
    latency_turns=7,
  ),
  # The public recipe nearest to the article (Nova 2 Lite: 100 steps with 15 of warm-up,
  # rate 1e-5 to 1e-6, alpha 64, LoRA+ ratio 64); for an accelerator.
  'article': Settings(
    lora=LoraConfig(rank=32, alpha=64),
    optim=OptimConfig(
      learning_rate=1e-5, lr_ratio=64, warmup=0.15, final_rate=0.1, beta1=0.9, beta2=0.95
    ),
    train=TrainConfig(
      steps=100,
      tokens_per_batch=65_536,
      max_length=8192,
      eval_rows=64,
      eval_every=20,
      remat=True,
    ),
    eval=EvalConfig(batch_rows=64, max_new_tokens=1024),
    latency_turns=30,
  ),
}

# Training on a user's own rows: as many steps as their epochs take, and the best is kept.
OWN_ROWS = Settings(train=TrainConfig(steps=0, keep_best=True))

# The article's configurations beside the base.
ARTICLE_TARGETS = (
  'qkv',
  'o_proj',
  'fc1',
  'fc2',
  'qkv,o_proj',
  'o_proj,fc2',
  'qkv,fc1,fc2',
  'all',
)
# What a preset's grid is where no targets are given; the article's, unless it stands here.
PRESET_TARGETS = {'smoke': ('o_proj,fc2',)}
# How large the target sets are beside each other; see `lora_jax.arms`.
EQUAL_RANK, EQUAL_PARAMETERS = 'equal_rank', 'equal_parameters'
ARMS = (EQUAL_RANK, EQUAL_PARAMETERS)

# Rows that are generated where the settings ask for all there are.
SYNTHETIC_TRAIN, SYNTHETIC_TEST = 2000, 200

"""What the article published, to stand beside a run: figures and judgements, no more.

Amazon Science, "Optimizing LoRA target module selection for efficient fine-tuning", 19
March 2026. No table of scores by dataset was published.
"""

import dataclasses

SOURCE = (
  'Amazon Science, "Optimizing LoRA target module selection for efficient fine-tuning" (19 March '
  '2026), on Nova 2.0 Lite, a closed multimodal base; it published no scores by dataset'
)


@dataclasses.dataclass(frozen=True)
class TradeOff:
  """How the article rates a target set before any measurement."""

  targets: str
  accuracy: str
  latency: str
  meant_for: str


@dataclasses.dataclass(frozen=True)
class Advice:
  """Which target set the article recommends, and for whom."""

  priority: str
  targets: str
  figures: str


TRADE_OFFS = (
  TradeOff('qkv', 'good', 'lowest', 'tight limits'),
  TradeOff('o_proj', 'medium', 'lowest', 'the shortest waiting times'),
  TradeOff('qkv,o_proj', 'high', 'low to medium', 'tasks that hang on attention'),
  TradeOff('qkv,fc1,fc2', 'very high', 'medium', 'generating what is complex'),
  TradeOff('all', 'highest', 'high', 'accuracy whatever it costs'),
)

# In the order of `lora_jax.report.advice.PRIORITIES`.
ADVICE = (
  Advice('accuracy', 'o_proj,fc2', '2 to 12 % above `o_proj`'),
  Advice('balance', 'o_proj', 'within 2 % of `o_proj,fc2` on average'),
  Advice('lowest latency', 'o_proj', '22.6 % less latency than `o_proj,fc2`'),
  Advice('hard tasks', 'o_proj,fc2', 'CoCoHD: +15 points over the base, `o_proj` +3'),
)

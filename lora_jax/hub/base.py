"""What a frozen model is to everything that trains, scores or serves on it."""

import dataclasses
from typing import Any

from lora_jax.config import ImageConfig, ModelConfig
from lora_jax.hub.tokenizer import ChatTokenizer


@dataclasses.dataclass(frozen=True)
class Base:
  """A frozen model.

  Attributes:
    name: as it was asked for.
    config: its shape.
    params: nested dict of numpy arrays, in the Transformer's layout. From GGUF they are
      float32; from safetensors as they are stored there, which may be bfloat16 (of
      `ml_dtypes`): cast them before doing arithmetic in numpy.
    tokenizer: its tokenizer and chat template.
    record: what to save beside a result: 'name', 'source', 'sha256', 'weights'
      (how they were stored, as 'dequantised Q4_1'), 'licence', 'hub_id' where the model
      has a name on its hub, 'chat_template' where we had to give it one, and 'sees'
      ('images') where it does.
    images: how images are made ready for it, or None where it does not see.
  """

  name: str
  config: ModelConfig
  params: dict[str, Any]
  tokenizer: ChatTokenizer
  record: dict[str, str]
  images: ImageConfig | None = None

"""A base and its adapter as one checkpoint, and how far rounding it moves the logits.

  params = merge(base, adapter)                       # float32
  change = rounding(base, adapter, params, 'bfloat16')
  save(Path('merged'), base, params, 'bfloat16', like=None)

An update is small beside its weight, so a merge into bfloat16 rounds much of it away: the
sum is taken in float32 and rounded once, and what that costs is measured.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import lora
from lora_jax.evaluate import pad_prompts
from lora_jax.hub import adapters, huggingface, peft, snapshot, tokenizer_save
from lora_jax.hub.bases import NAMES, Base
from lora_jax.hub.chat_template import PLAIN
from lora_jax.records import new_directory, write_text
from lora_jax.transformer import Transformer

_PROMPTS = (
  'Which organ makes bile?',
  'Write a JSON object with the keys name and age for a person you make up.',
  'A train leaves at 9:40 and arrives at 12:15. How long does it travel?',
  'Summarise in two sentences why rain falls more often on mountains than on plains.',
)


@dataclasses.dataclass(frozen=True)
class Rounding:
  """Largest differences of logits over the tokens of a few prompts.

  Attributes:
    merging: merged in float32, against the unmerged adapter in float32.
    casting: merged and cast, against merged in float32.
    together: merged and cast, against the unmerged adapter.
    largest: the largest logit there is.
    other_choices: tokens after which another one became the likeliest by the cast.
    tokens: how many tokens were looked at.
  """

  merging: float
  casting: float
  together: float
  largest: float
  other_choices: int
  tokens: int


def merge(base: Base, adapter: peft.Adapter) -> dict[str, Any]:
  """The base's parameters with the adapter added, in float32."""
  return lora.merge(_float32(base.params), adapter.params, adapter.scales())


def rounding(base: Base, adapter: peft.Adapter, merged: Mapping[str, Any], dtype: str) -> Rounding:
  """Compares unmerged, merged and cast parameters; products are float32 in all of them.

  Args:
    base: the base.
    adapter: its adapter.
    merged: from `merge`.
    dtype: what the checkpoint is cast to.
  """
  prompts = [base.tokenizer.encode_chat([{'role': 'user', 'content': text}]) for text in _PROMPTS]
  tokens_BT, lengths_B = pad_prompts(prompts, len(prompts))
  model = Transformer(base.config)

  @jax.jit
  def logits_of(params):
    hidden_BTD, _ = model.apply({'params': params}, tokens_BT)
    return model.apply({'params': params}, hidden_BTD, method='head')

  cast = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), dict(merged))
  real_BT = np.arange(tokens_BT.shape[1]) < lengths_B[:, None]
  taken = [
    # A tree at a time, so that no more than these logits are held.
    _exact(logits_of, params)[real_BT]
    for params in (adapters.attach(_float32(base.params), adapter), merged, cast)
  ]
  unmerged_TV, merged_TV, cast_TV = taken
  furthest = lambda one_TV, other_TV: float(np.abs(one_TV - other_TV).max())
  return Rounding(
    merging=furthest(merged_TV, unmerged_TV),
    casting=furthest(cast_TV, merged_TV),
    together=furthest(cast_TV, unmerged_TV),
    largest=float(np.abs(unmerged_TV).max()),
    other_choices=int((cast_TV.argmax(-1) != merged_TV.argmax(-1)).sum()),
    tokens=int(real_BT.sum()),
  )


def checkpoint_of(name: str) -> Path | None:
  """The Hugging Face directory that a base of this name came from, if it came from one."""
  path = Path(name).expanduser()
  if name in NAMES or name.endswith('.gguf'):
    return None
  # The hub's own cache has it since the base was loaded.
  return path if path.is_dir() else snapshot.fetch(name)


def save(out: Path, base: Base, params: Mapping[str, Any], dtype: str, like: Path | None) -> None:
  """Writes a checkpoint with its tokenizer; the directory appears whole or not at all.

  Args:
    out: a new directory.
    base: whose shape and tokenizer it has.
    params: from `merge`.
    dtype: of the weights, of `config.CHECKPOINT_DTYPES`.
    like: the directory that the base came from, whose files are copied; None: it came
      from another format, and they are written.

  Raises:
    UserError: it is there already, cannot be written, or its format has no word for the
      base.
  """
  with new_directory(out) as directory:
    if like is None:
      tokenizer_save.save(directory, base.tokenizer, base.config.max_length)
    elif base.tokenizer.template.source == PLAIN:
      # The adapter learned the form that we gave a base without one.
      write_text(directory / 'chat_template.jinja', base.tokenizer.template.standalone())
    huggingface.save(directory, base.config, params, like, dtype)


def _exact(function: Callable[[Any], jax.Array], params: Any) -> np.ndarray:
  # Accelerators round the factors of a product otherwise, to as little as bfloat16.
  with jax.default_matmul_precision('highest'):
    return np.asarray(function(params))


def _float32(params: Mapping[str, Any]) -> dict[str, Any]:
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), dict(params))

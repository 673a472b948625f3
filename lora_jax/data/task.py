"""What a dataset must say about itself: its fields, its prompt, its target, its score.

A dataset module (`lora_jax.data.medmcqa`, ...) defines one `TASK`. Nothing here
knows where rows come from (`lora_jax.data.sources`) or how they are tokenised
(`lora_jax.data.pipeline`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

# A row in the dataset's canonical field names, decoded to plain Python values.
Example = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One user turn, after others or not. When it is too long only `document` is cut, from its end.

  Attributes:
    before: text that comes first and is always kept.
    document: the long part; may be empty.
    after: text that comes last and is always kept.
    system: the system turn, or None for the chat template's own default.
    images: encoded images that are shown before the text; always kept whole. None in the
      place of one: the row misses it.
    history: turns before this one, each with 'role' and 'content'; always kept.
  """

  before: str
  document: str = ''
  after: str = ''
  system: str | None = None
  images: tuple[bytes | None, ...] = ()
  history: tuple[Mapping[str, str], ...] = ()

  def text(self, document_chars: int | None = None) -> str:
    """The user turn with the document cut to its first `document_chars` characters."""
    return self.before + self.document[:document_chars] + self.after


@dataclasses.dataclass(frozen=True)
class Task:
  """A dataset of the study.

  Attributes:
    name: the name on the command line and the folder name of the `dir` source.
    title: the name in the report.
    hub_id: the canonical dataset on its hub.
    features: canonical field -> kind: 'text', 'int', 'float', 'json' (any plain
      value, kept as JSON text on disk) or 'image' (encoded bytes; in a directory
      the field holds a path relative to the dataset's folder).
    required: the fields that a row must have, and that may not be null.
    prompt: example -> `Prompt`.
    target: example -> the completion to learn, without the end-of-turn token.
    score: (prediction, example) -> named scores of one row, each in 0..1.
    headline: the score whose mean, times 100, stands in the table.
    synthetic: (seed, count) -> that many generated examples, a pure function of
      its arguments, with the canonical fields.
    max_new_tokens: how many tokens a prediction may take.
    choices: example -> the strings compared by likelihood; None: predictions are
      generated. The most likely string is the prediction given to `score`.
    needs_vision: the task cannot be posed without its image.
    note: a sentence for the report about how the task is posed here, or ''.
    by_image: example -> `Prompt` with its images, for a base that sees; None: what a base
      sees makes no difference to the task.
    note_by_image: in the place of `note` then.
  """

  name: str
  title: str
  hub_id: str
  features: Mapping[str, str]
  required: tuple[str, ...]
  prompt: Callable[[Example], Prompt]
  target: Callable[[Example], str]
  score: Callable[[str, Example], dict[str, float]]
  headline: str
  synthetic: Callable[[int, int], list[dict[str, Any]]]
  max_new_tokens: int
  choices: Callable[[Example], tuple[str, ...]] | None = None
  needs_vision: bool = False
  note: str = ''
  by_image: Callable[[Example], Prompt] | None = None
  note_by_image: str = ''

  def posed(self, sees: bool) -> 'Task | None':
    """The task as a base is asked it, or None where it cannot be: it needs an image to be seen.

    Rows come from the task itself, so that all bases have the same.
    """
    if sees and self.by_image is not None:
      return dataclasses.replace(self, prompt=self.by_image, note=self.note_by_image)
    return None if self.needs_vision else self

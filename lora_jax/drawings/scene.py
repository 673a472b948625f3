"""What a drawing is before it is scanned: a sheet, what it says, and questions on it."""

import dataclasses

from lora_jax.drawings.canvas import Canvas

READ = 'What is written here?'
DESCRIBE = 'What is shown here?'


@dataclasses.dataclass(frozen=True)
class Scene:
  """A sheet.

  Attributes:
    canvas: with everything on it.
    text: what it says, or a description, in reading order.
    questions: pairs of a question and its answer.
  """

  canvas: Canvas
  text: str
  questions: tuple[tuple[str, str], ...]

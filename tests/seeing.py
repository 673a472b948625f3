"""Rows with images, one, several or none, for a base that sees (`tiny_vlm`)."""

import dataclasses
import io
from pathlib import Path

import tiny_vlm

from lora_jax.data.encode import Budget, pictures
from lora_jax.data.eyes import Eyes
from lora_jax.data.pipeline import encode_split
from lora_jax.data.task import Prompt, Task
from lora_jax.hub import tokenizer_hf
from lora_jax.sight import Sight

EYES = Eyes(tiny_vlm.VISION, tiny_vlm.IMAGES)
LIMITS = Budget(prompt=480, completion=20)

# As it is posed by image: what a base sees it with is not the question here.
TASK = Task(
  name='shown',
  title='Shown',
  hub_id='',
  features={},
  required=(),
  prompt=lambda example: Prompt(before=example['text'], images=example['images']),
  target=lambda example: example['answer'],
  score=lambda said, example: {'right': float(said == example['answer'])},
  headline='right',
  synthetic=lambda seed, count: [],
  max_new_tokens=20,
)
# Width and height: cut into 2 x 2 tiles, 1 x 2, 2 x 1, and whole.
SIZES = {(60, 50): 5, (50, 20): 3, (20, 50): 3, (90, 90): 5}


def encoded(width=60, height=50, seed=0, kind='PNG', **options):
  stream = io.BytesIO()
  tiny_vlm.image(width, height, seed).save(stream, kind, **options)
  return stream.getvalue()


def rows(count=6):
  """Every third row has no image, the others one or two, of several shapes."""
  sizes, made = [*SIZES], []
  for i in range(count):
    shown = tuple(encoded(*sizes[(i + j) % len(sizes)], seed=10 * i + j) for j in range(i % 3))
    answer = 'ABCDEF'[i % 6] * (1 + i % 4)
    made.append(
      {'id': f'row-{i}', 'text': f'Row {i}: ' + 'x' * i, 'images': shown, 'answer': answer}
    )
  return made


def tokenizer(directory: Path):
  tiny_vlm.write_tokenizer(directory)
  return tokenizer_hf.from_directory(directory, tiny_vlm.VOCAB)


def sight(directory: Path, params=None, eyes=EYES, model=tiny_vlm.MODEL):
  return Sight(model, tiny_vlm.params() if params is None else params, eyes, directory)


def looked(directory: Path, examples, of=None):
  """Rows encoded, and the features of their images."""
  of = sight(directory / 'features') if of is None else of
  encoded_rows = encode_split(TASK, examples, tokenizer(directory / 'tokenizer'), LIMITS, of.eyes)
  assert len(encoded_rows) == len(examples)
  of.look(TASK, examples, [picture for row in encoded_rows for picture in row.pictures])
  return encoded_rows, of


def of_examples(examples, eyes=EYES):
  return [picture for example in examples for picture in pictures(TASK, example, eyes)]


def smaller(eyes=EYES, **changes):
  return dataclasses.replace(eyes, images=dataclasses.replace(eyes.images, **changes))

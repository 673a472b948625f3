"""What a camera, a scanner and a file format do to a sheet, marks and all.

    image, marks = scan(canvas, rng, wear=1.0)

Turning, shearing and stretching move the marks along; light, blur, noise, specks, black
and white and JPEG do not move anything.
"""

import dataclasses
import io
import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from lora_jax.drawings.canvas import Canvas, Mark


def scan(canvas: Canvas, rng: random.Random, wear: float) -> tuple[Image.Image, list[Mark]]:
  """An image of a sheet, and where its marks are in it.

  Args:
    canvas: the sheet.
    rng: which of what can happen does.
    wear: how much may happen, from 0 (nothing but what is said of a file) to 1.
  """
  image, marks = canvas.image, canvas.marks
  if rng.random() < 0.8 * wear:
    image, marks = _bend(image, marks, rng)
  if rng.random() < 0.5 * wear:
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))
  if rng.random() < 0.8 * wear:
    image = _paper(image, rng)
  if rng.random() < 0.08 * wear:
    image = image.convert('L').point([255 * (level > 140) for level in range(256)]).convert('RGB')
  if rng.random() < 0.5:
    data = io.BytesIO()
    image.save(data, format='JPEG', quality=rng.randint(60, 95))
    image = Image.open(data, formats=['JPEG']).convert('RGB')
  return image, marks


def moved(marks: Sequence[Mark], matrix_23: np.ndarray) -> list[Mark]:
  """Marks after an affine map: each box around where its corners have gone."""
  return [dataclasses.replace(mark, boxes_G4=_moved(mark.boxes_G4, matrix_23)) for mark in marks]


def _moved(boxes_G4: np.ndarray, matrix_23: np.ndarray) -> np.ndarray:
  x_GC, y_GC = boxes_G4[:, [0, 2, 0, 2]], boxes_G4[:, [1, 1, 3, 3]]
  across, down = (a * x_GC + b * y_GC + c for a, b, c in matrix_23)
  sides = [across.min(1), down.min(1), across.max(1), down.max(1)]
  return np.stack(sides, axis=1).astype(np.float32)


def _bend(
  image: Image.Image, marks: Sequence[Mark], rng: random.Random
) -> tuple[Image.Image, list[Mark]]:
  """Turns, shears and stretches a sheet around its middle."""
  width, height = image.size
  angle, shear = math.radians(rng.gauss(0, 0.8)), rng.gauss(0, 0.02)
  wide, tall = rng.uniform(0.82, 1.12), rng.uniform(0.92, 1.08)
  size = (max(1, round(width * wide)), max(1, round(height * tall)))
  turn_22 = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
  linear_22 = np.diag([wide, tall]) @ turn_22 @ np.array([[1, shear], [0, 1]])
  middle_2, new_2 = np.array([width, height]) / 2, np.array(size) / 2
  matrix_23 = np.concatenate([linear_22, (new_2 - linear_22 @ middle_2)[:, None]], axis=1)
  back_33 = np.linalg.inv(np.concatenate([matrix_23, [[0, 0, 1]]]))
  corner = image.getpixel((0, 0))
  bent = image.transform(
    size,
    Image.Transform.AFFINE,
    tuple(back_33[:2].ravel()),
    Image.Resampling.BICUBIC,
    fillcolor=corner,
  )
  return bent, moved(marks, matrix_23)


def _paper(image: Image.Image, rng: random.Random) -> Image.Image:
  """Uneven light, faint ink, grain and specks."""
  noise = np.random.default_rng(rng.getrandbits(64))
  width, height = image.size
  pixels_YXC = np.asarray(image, np.float32)
  darkest, brightest = rng.uniform(0, 90), rng.uniform(195, 255)
  pixels_YXC = darkest + pixels_YXC * ((brightest - darkest) / 255)
  coarse = noise.uniform(-1, 1, (rng.randint(2, 6), rng.randint(2, 6))).astype(np.float32)
  light = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
  pixels_YXC += rng.uniform(0, 16) * np.asarray(light)[..., None]
  grain_YX = noise.standard_normal((height, width), np.float32)
  pixels_YXC += rng.choice((0, 3, 8)) * grain_YX[..., None]
  for _ in range(rng.choice((0, 0, 3, 12))):
    y, x = rng.randrange(height), rng.randrange(width)
    pixels_YXC[y : y + rng.randint(1, 3), x : x + rng.randint(1, 3)] = rng.uniform(0, 120)
  return Image.fromarray(np.clip(pixels_YXC, 0, 255).astype(np.uint8))

"""Colours by name, each in many hues, so that a name and not a number is learnt."""

import colorsys
import random

from lora_jax.drawings.canvas import Rgb

# Name -> the hues that it is said of, in turns of the colour circle.
_HUES = {
  'red': (-0.03, 0.02),
  'orange': (0.06, 0.10),
  'yellow': (0.12, 0.16),
  'green': (0.27, 0.40),
  'blue': (0.54, 0.64),
  'purple': (0.71, 0.79),
  'pink': (0.86, 0.93),
}
# Shade -> saturation and value.
_SHADES = {
  'light': ((0.14, 0.32), (0.92, 1.0)),
  '': ((0.48, 0.85), (0.78, 0.98)),
  'dark': ((0.65, 1.0), (0.35, 0.58)),
}
PLAIN = (*_HUES, 'grey')
NAMES = (*(f'{shade} {hue}'.strip() for hue in _HUES for shade in _SHADES), 'grey')


def pick(rng: random.Random, name: str) -> Rgb:
  """A colour that goes by a name of `NAMES`."""
  if name == 'grey':
    level = rng.randint(120, 190)
    return level, level, level
  *shade, hue = name.split()
  low, high = _HUES[hue]
  saturation, value = _SHADES[' '.join(shade)]
  parts = colorsys.hsv_to_rgb(
    rng.uniform(low, high) % 1.0, rng.uniform(*saturation), rng.uniform(*value)
  )
  red, green, blue = (round(255 * part) for part in parts)
  return red, green, blue


def distinct(rng: random.Random, count: int, shades: bool = False) -> dict[str, Rgb]:
  """So many names, each with one colour for it; with `shades`, lighter and darker ones too."""
  names = rng.sample(NAMES if shades else PLAIN, count)
  return {name: pick(rng, name) for name in names}

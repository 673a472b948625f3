"""All that decides an aligned tower, with its costs.

On an image of 864 x 864 pixels at most, cut into tiles of 288 with the whole as one more, a
receipt of 1 : 2 is 3 x 2 + 1 = 7 tiles of 81 embeddings: 567 tokens and some that say where.
An embedding looks at 32 pixels; a scan that is 768 pixels high is looked at 1.1 times as large,
so that a cell is 28 of its pixels high: three or four characters of the smallest print. One
tile alone (`--image_edge=288`) is 81 tokens and does for drawings of a few large things.

A tile is T = 324 patches. Each layer costs 24 D^2 + 4 T D FLOPs a patch, 1.1e6 at D = 192, so
four layers are 1.5 GFLOP a tile and 4.4 when trained; a language model of 106e6 parameters in its
blocks costs 0.42 GFLOP a token when it is frozen and differentiated through: 95 GFLOP for the
224 tokens of a tile with its question and answer. So most is learnt by reading.
"""

import dataclasses

from lora_jax.config import ImageConfig, VisionConfig

VISION = VisionConfig(
  image_size=288,
  patch_size=16,
  model_dim=192,
  num_layers=4,
  num_heads=3,
  mlp_dim=768,
  shuffle=2,
  image_token=0,  # Set when it is joined to a base.
)
IMAGES = ImageConfig(longest_edge=864, tile=288)


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What is drawn in a stage.

  Attributes:
    kind: of `lora_jax.drawings.drawing.KINDS`.
    often: how often, beside the others.
    edges: how long its longer side may be made, in tiles.
  """

  kind: str
  often: float
  edges: tuple[int, ...] = (1, 2)


_PUZZLES = (
  Drawn('grid', 1.5), Drawn('ring', 0.8), Drawn('rows', 1.2), Drawn('scatter', 0.8),
  Drawn('bars', 0.8), Drawn('wheel', 0.8), Drawn('venn', 0.8), Drawn('triads', 0.8),
  Drawn('nest', 0.5),
)  # fmt: skip
# Small print is not to be read in one tile. Most tiles are puzzles all the same, which a tower
# can tell apart long before it can read: of what is printed a batch takes four tiles each.
_READ = (
  Drawn('note', 1.5), Drawn('page', 0.4, (2, 3)), Drawn('receipt', 0.8, (2, 3)),
  Drawn('table', 0.6), Drawn('chart', 1.0), *_PUZZLES,
)  # fmt: skip
_SPEAK = tuple(
  dataclasses.replace(drawn, edges=(1,))
  for drawn in (Drawn('note', 1.0), Drawn('table', 0.5), Drawn('chart', 1.0), *_PUZZLES)
)
_WHOLE = (Drawn('receipt', 3.0, (2, 3)), Drawn('table', 0.5, (2,)))


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage.

  Attributes:
    name: 'read', or any other: those speak.
    steps: updates.
    rows: of a batch: tiles to read, or conversations.
    learning_rate: its peak, after a warm-up and before a cosine decay to a tenth.
    drawn: what is drawn.
    length: tokens of a conversation with its image (speak).
    tiles: of one conversation's image, at most (speak).
    eval_batches: batches of drawings kept out, in faces that are learnt and again in faces
      that are not.
    eval_every: updates between two looks at them, and between two checkpoints.
  """

  name: str
  steps: int
  rows: int
  learning_rate: float
  drawn: tuple[Drawn, ...]
  length: int = 0
  tiles: int = 0
  eval_batches: int = 4
  eval_every: int = 250


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a tower comes about.

  Attributes:
    base: the language model, by name.
    vision: shape of the tower.
    images: how images are made ready for it.
    stages: in order.
    seed: of parameters and drawings.
    weight_decay: decoupled, of kernels.
    clip_norm: largest global norm of a gradient.
    warmup: share of a stage's steps over which its rate rises.
    dtype: of products.
    remat: recompute blocks in the backward pass to save memory.
  """

  base: str
  stages: tuple[Stage, ...]
  vision: VisionConfig = VISION
  images: ImageConfig = IMAGES
  seed: int = 0
  weight_decay: float = 0.05
  clip_norm: float = 1.0
  warmup: float = 0.05
  dtype: str = 'float32'
  remat: bool = False


def _stages(
  read: tuple[int, int, float],
  speak: tuple[int, int, float],
  whole: tuple[int, int, float],
  every: tuple[int, int, int],
) -> tuple[Stage, ...]:
  """Three stages from steps, rows and rate of each, and how often each is looked at."""
  return (
    Stage('read', *read, _READ, eval_every=every[0]),
    Stage('speak', *speak, _SPEAK, length=224, tiles=1, eval_every=every[1]),
    Stage('whole', *whole, _WHOLE, length=960, tiles=10, eval_batches=2, eval_every=every[2]),
  )


# For two CPU cores and an hour, in which no small print is learnt: it needs no receipts. And for an
# accelerator and minutes: there drawing is what takes the time, so that processes of their own
# should do it.
CPU = _stages((1500, 16, 1e-3), (300, 4, 3e-4), (0, 1, 1e-4), (250, 100, 20))
ACCELERATOR = _stages((8000, 192, 1e-3), (2500, 64, 3e-4), (800, 16, 1e-4), (500, 250, 100))

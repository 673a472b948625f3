"""Cells of a grid as one tree with a leading axis C, so that one program trains them all.

Adapters of different target sets and ranks share a union tree in which each has its
own leaves and zeros elsewhere. Zeros are inert: an A of zero facing a B of zero gets no
gradient and gives none, so what is not a cell's own stays zero and moves no norm.

  shapes = union([adapters, other])
  together = stack([embed(adapters, shapes), embed(other, shapes)])
  own = extract(take(together, 0), adapters)      # after training
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax import lora, lora_family, platforms
from lora_jax.config import LoraConfig
from lora_jax.kernels import LoraKernel
from lora_jax.quantized import QuantizedKernel
from lora_jax.targets import FUSED

# Of the memory that is free, what a program may ask for: allocators lose some to gaps.
_USABLE = 0.9


@flax.struct.dataclass
class Pack:
  """Adapters for one base, ready to be attached.

  Attributes:
    adapters: the union tree, float32, each leaf with a leading axis C.
    scales: path of a module -> (C, L), the factor on each layer's low-rank product.
  """

  adapters: Any
  scales: Any

  @property
  def cells(self) -> int:
    """C."""
    return next(iter(self.scales.values())).shape[0]

  def over_cells(self, base: Mapping[str, Any]) -> Callable[..., Any]:
    """A function that calls `f(params, *arrays)` for every cell.

    What it is given and gives back leads with C. Whatever attaching computes is computed
    once, and the base stays without that axis.
    """
    if self.cells == 1:
      cell = jax.tree.map(_alone, self)
      params = lora.attach(base, cell.adapters, cell.scales, may_be_idle=may_be_idle(1))

      def alone(f: Callable[..., Any], *arrays: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], f(params, *jax.tree.map(_alone, arrays)))

      return alone
    attached, axes = self._attach(base)
    return lambda f, *arrays: jax.vmap(f, in_axes=(axes, *[0] * len(arrays)))(attached, *arrays)

  def _attach(self, base: Mapping[str, Any]) -> tuple[dict, Any]:
    """All cells' adapters on their base, and the axes by which `vmap` tells cells apart."""
    one = lambda cell: lora.attach(base, cell.adapters, cell.scales)
    first = jax.eval_shape(lambda pack: one(jax.tree.map(_alone, pack)), self)
    own = lora.replaced(self.adapters)
    kernel = lambda node: isinstance(node, LoraKernel | QuantizedKernel)
    nodes = jax.tree_util.tree_leaves_with_path(first, is_leaf=kernel)
    axes = [0 if _path(path) in own else _cell_axes(node) for path, node in nodes]
    tree = jax.tree.unflatten(jax.tree.structure(first, is_leaf=kernel), axes)
    return jax.vmap(one, out_axes=tree)(self), tree


def may_be_idle(cells: int) -> bool:
  """Whether modules that a cell does not adapt are skipped, as `LoraKernel.used` has it.

  Only one cell can do so, and on a GPU the host would have to wait at each of its branches.
  """
  return cells == 1 and platforms.target() == 'cpu'


def kind(adapters: Mapping[str, Any], config: LoraConfig) -> tuple:
  """What cells must have in common to share a union tree.

  The same modules must be fused, since a kernel has one A; the same norms and biases must
  train, since zeros would not be inert there; and DoRA, initialisation and dropout must be the
  same, since other ones make another program.
  """
  fused = sorted(path for path in flat(adapters) if path.split('/')[-2] in FUSED)
  return config.dora, config.init, config.dropout, config.train_also, tuple(fused)


def union(trees: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
  """Path -> the smallest shape that holds this leaf of every tree."""
  shapes: dict[str, tuple[int, ...]] = {}
  for tree in trees:
    for path, leaf in flat(tree).items():
      held: Any = shapes.get(path, leaf.shape)
      shapes[path] = tuple(map(max, held, leaf.shape))
  return dict(sorted(shapes.items()))


def embed(adapters: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict:
  """An adapter in the union tree: its own leaves, filled up with zeros (numpy, float32)."""
  own = flat(adapters)
  whole = {}
  for path, shape in shapes.items():
    whole[path] = np.zeros(shape, np.float32)
    if path in own:
      whole[path][tuple(map(slice, own[path].shape))] = own[path]
  return unflatten_dict(whole, sep='/')


def extract(whole: Mapping[str, Any], own: Mapping[str, Any]) -> dict:
  """Undoes `embed`.

  Args:
    whole: a tree of the union's shapes.
    own: the adapter that was embedded, or its shapes.
  """
  held = flat(whole)
  cut = {path: held[path][tuple(map(slice, leaf.shape))] for path, leaf in flat(own).items()}
  return unflatten_dict(cut, sep='/')


def scales(
  adapters: Mapping[str, Any], config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
  """Path -> the scale of each layer, for all modules of the union."""
  own = lora_family.plan(config, adapters).scales()
  paths = [path.removesuffix('/a') for path in shapes if path.endswith('/a')]
  return {path: own.get(path, np.zeros(shapes[f'{path}/a'][0], np.float32)) for path in paths}


def stack(trees: Sequence[Any]) -> Any:
  """Trees of one shape as one, with a leading axis C (numpy)."""
  return jax.tree.map(_stacked, *trees)


def take(tree: Any, cell: int) -> Any:
  """One cell's part, copied off the device (numpy)."""
  return jax.tree.map(lambda leaf: np.array(leaf[cell]), tree)


def largest(wanted: int, need: Callable[[int], int], available: int) -> int:
  """How many cells fit.

  Args:
    wanted: at most so many.
    need: cells -> bytes that their program takes; expensive, since it compiles one.
    available: bytes there are.

  Returns:
    At least 1, whether or not that fits.
  """
  cells = wanted
  while cells > 1:
    needed = need(cells)
    if needed <= available:
      break
    # A program's memory grows with its cells, and something is left over for none.
    cells = min(cells - 1, max(1, int(cells * available / needed)))
  return cells


def program_bytes(compiled: jax.stages.Compiled, resident: int) -> int:
  """What a compiled program takes beside the bytes that are on the device already."""
  held = compiled.memory_analysis()
  if held is None:
    # A backend that does not tell; what then does not fit is found when it runs.
    return 0
  return (
    held.argument_size_in_bytes
    + held.output_size_in_bytes
    + held.temp_size_in_bytes
    - held.alias_size_in_bytes
    - resident
  )


def free_bytes(meminfo: Path = Path('/proc/meminfo')) -> int | None:
  """Memory that a program may still take on the first device, or None where nothing tells."""
  device = jax.devices()[0]
  stats = device.memory_stats()
  if stats is not None and 'bytes_limit' in stats:
    return int(_USABLE * (stats['bytes_limit'] - stats['bytes_in_use']))
  try:
    found = re.search(r'^MemAvailable:\s+(\d+) kB', meminfo.read_text(), re.MULTILINE)
  except OSError:
    return None
  return int(_USABLE * 1024 * int(found[1])) if found else None


def _cell_axes(node: Any) -> Any:
  """For an attached leaf or kernel: 0 where cells have their own, None where they share it."""
  if not isinstance(node, LoraKernel):
    return None
  own: dict[str, Any] = dict.fromkeys(('a', 'b', 'scale'), 0)
  gain = None if node.gain is None else 0
  return dataclasses.replace(node, w=_cell_axes(node.w), gain=gain, **own)


def _alone(leaf: Any) -> Any:
  return leaf[0]


def _path(keys: Sequence[Any]) -> str:
  return '/'.join(key.key for key in keys)


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Path -> leaf."""
  return dict(flatten_dict(tree, sep='/'))


def _stacked(*leaves: Any) -> Any:
  # PRNG keys are no numbers that numpy knows.
  if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key):
    return jnp.stack(leaves)
  return np.stack([np.asarray(leaf) for leaf in leaves])

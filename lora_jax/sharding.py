"""Where parameters, adapters and batches lie on a mesh of devices.

  data    each device has other rows of a batch, and all of the base
  fsdp    each device has other rows, and a part of every matrix (Rajbhandari et al. 2020,
          ZeRO stage 3): XLA gathers a layer when it is its turn
  tensor  each device has other heads, feed-forward units and words (Shoeybi et al. 2019)

XLA's partitioner does the rest: nothing here changes what is computed.

  mesh = make_mesh('data=-1,fsdp=2')
  with jax.set_mesh(mesh):
    base = place(base, base_shardings(base, mesh))
    ...
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax.errors import UserError
from lora_jax.quantized import QuantizedKernel

Params = Mapping[str, Any]

AXES = ('data', 'fsdp', 'tensor')
# Those over which rows of a batch are spread.
ROWS = ('data', 'fsdp')

# Pattern of a path -> the axes of its last dimensions; those before them are layers and lie
# whole on every device. The first that matches decides, and one must.
_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r'embed_tokens/embedding', ('tensor', 'fsdp')),
  (r'lm_head/kernel', ('fsdp', 'tensor')),
  (r'.*/(q|k|v|gate|up)_proj/kernel', ('fsdp', 'tensor')),
  (r'.*/(q|k|v|gate|up)_proj/bias', ('tensor',)),
  (r'.*/(o|out|down)_proj/kernel', ('tensor', 'fsdp')),
  (r'vision/layers/mlp/fc1/kernel', ('fsdp', 'tensor')),
  (r'vision/layers/mlp/fc1/bias', ('tensor',)),
  (r'vision/layers/mlp/fc2/kernel', ('tensor', 'fsdp')),
  (r'connector/.*/proj/kernel', ('fsdp', None)),
  # A vector of the model's width, or a table of the tower's positions: small.
  (r'.*norm\d?/(scale|bias)|.*/bias|vision/(patch|position)_embedding/.*', ()),
)


def parse_mesh(text: str) -> dict[str, int]:
  """'data=-1,fsdp=4' as sizes of all `AXES`; an axis that is not named has size 1.

  Raises:
    UserError: it names another axis, one twice, or a size that is none; more than one is -1.
  """
  sizes: dict[str, int] = dict.fromkeys(AXES, 1)
  seen = set()
  for part in text.split(','):
    name, _, size = part.strip().partition('=')
    if name not in AXES:
      raise UserError(f'--mesh={text}: no axis {name!r}; there are {", ".join(AXES)}')
    if name in seen:
      raise UserError(f'--mesh={text}: {name} is given twice')
    if not re.fullmatch(r'-1|[1-9]\d*', size):
      raise UserError(f'--mesh={text}: give {name} a whole number from 1, or -1 for what is left')
    seen.add(name)
    sizes[name] = int(size)
  if list(sizes.values()).count(-1) > 1:
    raise UserError(f'--mesh={text}: only one axis can be -1, what is left')
  return sizes


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of all devices that a flag asks for.

  Args:
    text: as `parse_mesh` reads it.
    devices: in any order; None: all that JAX sees, in all processes.

  Raises:
    UserError: as `parse_mesh`, or the sizes do not make up the number of devices.
  """
  sizes = parse_mesh(text)
  devices = jax.devices() if devices is None else devices
  given = math.prod(size for size in sizes.values() if size > 0)
  rest, over = divmod(len(devices), given)
  if over or (rest != 1 and -1 not in sizes.values()):
    raise UserError(
      f'--mesh={text}: there are {len(devices)} devices; give sizes whose product is that many, '
      'or one of -1'
    )
  shape = tuple(rest if size == -1 else size for size in sizes.values())
  # XLA decides where nothing is said: explicit axes would want it said at every product.
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def specs(params: Params) -> dict:
  """How each parameter is cut, by its path, whatever the mesh.

  Args:
    params: a base, or its shapes; a quantised kernel counts as the one it stands for.

  Returns:
    The tree of `PartitionSpec`, each with an entry for every dimension.
  """
  flat: dict[str, Any] = dict(flatten_dict(params, sep='/'))
  cut = {path: _rule(path, len(leaf.shape)) for path, leaf in flat.items()}
  return unflatten_dict(cut, sep='/')


def fit(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """The spec without what the mesh does not divide evenly, of which every device then has all."""
  axes = zip(spec, shape, strict=True)
  return PartitionSpec(*(axis if size % _parts(axis, mesh) == 0 else None for axis, size in axes))


def base_shardings(params: Params, mesh: Mesh) -> dict:
  """Where a base lies, quantised or not.

  A quantised kernel's arrays have its dimensions, with fewer inputs, and are cut as it is.

  Args:
    params: the base, or its shapes.
    mesh: has all of `AXES`.

  Returns:
    A tree of `NamedSharding` with the structure of `params`.
  """
  return _fitted(specs(params), params, mesh)


def adapter_shardings(adapter_specs: Params, adapters: Params, mesh: Mesh) -> dict:
  """Where an adapter lies.

  Args:
    adapter_specs: from `lora.specs`.
    adapters: the adapter, or its shapes; its leaves may lead with more dimensions, which lie
      whole on every device.
    mesh: has all of `AXES`.
  """
  led = lambda spec, leaf: PartitionSpec(*[None] * (len(leaf.shape) - len(spec)), *spec)
  whole = jax.tree.map(led, adapter_specs, adapters, is_leaf=_is_spec)
  return _fitted(whole, adapters, mesh)


def place(tree: Any, shardings: Any, dtype: jax.typing.DTypeLike | None = None) -> Any:
  """Puts arrays where they are to lie; of numpy's each process copies what its devices hold.

  Args:
    tree: of arrays; numpy's may be views of a file.
    shardings: the tree of their shardings.
    dtype: to which numpy's are cast, a part at a time; None: as they are.
  """

  def put(leaf, sharding):
    if not isinstance(leaf, np.ndarray):
      return jax.device_put(leaf, sharding)
    part = lambda index: np.asarray(leaf[index], dtype)
    return jax.make_array_from_callback(leaf.shape, sharding, part)

  return jax.tree.map(put, tree, shardings)


def current() -> Mesh | None:
  """The mesh of `jax.set_mesh`, if there is one of these axes; not for a function being traced."""
  return jax.sharding.get_mesh() if spread() else None


def spread() -> bool:
  """Whether there is a mesh, be it one that a program is only compiled for."""
  return bool(_axes())


def row_shards() -> int:
  """Among how many devices of the current mesh rows of a batch are spread."""
  return math.prod(_axes().get(axis, 1) for axis in ROWS)


def resident_bytes(tree: Any) -> int:
  """What a tree's arrays take on the device that has most of them."""
  taken: dict[Any, int] = {}
  for leaf in jax.tree.leaves(tree):
    for shard in leaf.addressable_shards:
      taken[shard.device] = taken.get(shard.device, 0) + shard.data.nbytes
  return max(taken.values(), default=0)


def by_rows(x: jax.Array, axis: int = 0) -> jax.Array:
  """Within a program: says that a dimension of `x` is rows of the batch, all others whole.

  Without it the partitioner might split what is computed as the weights are, and gather
  activations. It changes nothing where there is no mesh.
  """
  if not spread():
    return x
  spec: list[Any] = [None] * x.ndim
  spec[axis] = ROWS
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def apart(
  attend: Callable[..., jax.Array],
  q_BTNH: jax.Array,
  k_BKTH: jax.Array,
  v_BKTH: jax.Array,
  *by_row: jax.Array | None,
) -> jax.Array:
  """Within a program: attention by a kernel that the partitioner cannot look into.

  Each device runs it on its own rows and heads; what does not divide evenly it has whole.

  Args:
    attend: (q_BTNH, k_BKTH, v_BKTH, *by_row) -> out_BTNH, of any B, and any K that N is a
      multiple of.
    q_BTNH: queries.
    k_BKTH: keys.
    v_BKTH: values.
    *by_row: what else it needs, leading with B, or None.
  """
  if not spread():
    return attend(q_BTNH, k_BKTH, v_BKTH, *by_row)
  batch, heads = k_BKTH.shape[:2]
  rows = ROWS if batch % row_shards() == 0 else None
  tensor = 'tensor' if heads % _axes()['tensor'] == 0 else None
  q, kv = PartitionSpec(rows, None, tensor), PartitionSpec(rows, tensor)
  given = [x for x in by_row if x is not None]

  def local(q_BTNH, k_BKTH, v_BKTH, *given):
    left = iter(given)
    return attend(q_BTNH, k_BKTH, v_BKTH, *(x if x is None else next(left) for x in by_row))

  specs = (q, kv, kv, *(PartitionSpec(rows) for _ in given))
  # Kernels do not say over which axes their results differ, so that cannot be checked.
  mapped = jax.shard_map(local, in_specs=specs, out_specs=q, check_vma=False)
  return mapped(q_BTNH, k_BKTH, v_BKTH, *given)


def _axes() -> dict[str, int]:
  """Sizes of the axes that this module knows, of a mesh that has them all; else none."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  return {axis: sizes[axis] for axis in AXES} if {*AXES} <= {*sizes} else {}


def _rule(path: str, ndim: int) -> PartitionSpec:
  for pattern, axes in _RULES:
    if re.fullmatch(pattern, path):
      return PartitionSpec(*[None] * (ndim - len(axes)), *axes)
  raise ValueError(f'no rule says how to cut {path}')


def _fitted(tree: Params, params: Params, mesh: Mesh) -> dict:
  flat_specs: dict[str, Any] = dict(flatten_dict(tree, sep='/'))
  out = {}
  for path, leaf in flatten_dict(params, sep='/').items():
    cut = lambda array, spec=flat_specs[path]: NamedSharding(mesh, fit(spec, array.shape, mesh))
    out[path] = jax.tree.map(cut, leaf) if isinstance(leaf, QuantizedKernel) else cut(leaf)
  return unflatten_dict(out, sep='/')


def _is_spec(leaf: Any) -> bool:
  return isinstance(leaf, PartitionSpec)


def _parts(axis: Any, mesh: Mesh) -> int:
  """Into how many parts a spec's entry cuts a dimension."""
  names = axis if isinstance(axis, tuple) else (axis,)
  return math.prod(mesh.shape[name] for name in names if name is not None)

"""A mesh of eight forced devices and the shardings of the tiny model's parameters on it."""

import jax
import tiny_model
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

COLUMN, ROW = P(None, 'fsdp', 'tensor'), P(None, 'tensor', 'fsdp')


def base_specs():
  def spec(path, leaf):
    name = path[-2].key
    if leaf.ndim != 3:
      return P(*[None] * leaf.ndim)
    return ROW if name in ('o_proj', 'down_proj') else COLUMN

  return jax.tree_util.tree_map_with_path(spec, tiny_model.params())


def mesh():
  return jax.make_mesh(
    (2, 2, 2),
    ('data', 'fsdp', 'tensor'),
    axis_types=(AxisType.Auto,) * 3,
    devices=jax.devices('cpu')[:8],
  )


def put(tree, specs):
  devices = mesh()
  return jax.tree.map(
    lambda leaf, spec: jax.device_put(leaf, NamedSharding(devices, spec)), tree, specs
  )

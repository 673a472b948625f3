"""Compiles the real training or decoding step for devices, from shapes alone.

devices = tpu('v5e:4x4')
mesh = sharding.make_mesh('fsdp=-1', devices)
planned = training(SHAPES['llama-3-8b'], 'o_proj,fc2', mesh, Work(rows=16, length=4096), 'tpu')
print(planned.memory, planned.flops)
"""

import contextlib
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax import lora, lora_family, packs, platforms, quantize, sharding
from lora_jax.config import LoraConfig, ModelConfig, OptimConfig
from lora_jax.errors import UserError
from lora_jax.head import head_kernel, logits
from lora_jax.optim import Hyper, optimizer
from lora_jax.plan.flops import matmul_flops
from lora_jax.plan.hlo import Moved, moved
from lora_jax.self_attention import SelfAttention
from lora_jax.step import TrainState, make_step, shardings
from lora_jax.transformer import KeyValues, Transformer, abstract_params

# Of the schedule's table; what it is changes nothing else.
_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Work:
  """What a step is to do.

  Attributes:
    rows: of a batch, over all devices.
    length: tokens of a row; in decoding, of what each row has in its cache.
    parts: into how many a batch is cut, whose gradients are summed.
    lora: shape of the adapter.
    quantize: how the kernels of the base's blocks are stored.
    remat: whether blocks are computed again in the backward pass.
  """

  rows: int
  length: int
  parts: int = 1
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  quantize: str = 'none'
  remat: bool = True


@dataclasses.dataclass(frozen=True)
class Planned:
  """A compiled program; all bytes are of one device.

  Attributes:
    arguments: base, adapters, optimiser and batch, or cache.
    temporaries: what the program needs besides.
    flops: of its matrix products, over all devices.
    moved: bytes to and from memory, and over links.
    adapters: parameters that are trained.
    seconds: that compiling took.
  """

  arguments: int
  temporaries: int
  flops: int
  moved: Moved
  adapters: int
  seconds: float

  @property
  def memory(self) -> int:
    """Bytes that it takes on each device."""
    return self.arguments + self.temporaries


def tpu(topology: str) -> Sequence[Any]:
  """The devices of a TPU slice, to compile for: there need be none.

  Args:
    topology: its generation and shape, as 'v5e:4x4'.

  Raises:
    UserError: libtpu is missing, or knows no such slice.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise UserError('--tpu needs the TPU compiler: pip install -e .[plan]')
  from jax.experimental import topologies

  # It would ask Google's machines what they are, and tells of each thing that it misses.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  try:
    with _without_stderr():
      return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'--tpu={topology}: {" ".join(str(error).split())[:200]}; give a generation and a shape, as '
      'v5e:4x4 or v5p:4x4x4'
    ) from error


def training(config: ModelConfig, targets: str, mesh: Mesh, work: Work, platform: str) -> Planned:
  """Compiles an update of one adapter.

  Args:
    config: shape of the base, which is bfloat16.
    targets: comma-joined modules to adapt.
    mesh: of the devices that it is compiled for.
    work: size of the step.
    platform: that the devices are of, as `platforms.target` has it.

  Raises:
    UserError: the targets match nothing; the rows cannot be spread or cut as asked.
  """
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  if work.rows % (work.parts * shards):
    raise UserError(
      f'--rows={work.rows}: give a multiple of {work.parts * shards}: {work.parts} parts of rows '
      f'for each of {shards} devices along data and fsdp'
    )
  base = _base(config, mesh, work.quantize)
  states = _states(base, lora.resolve(targets, base), work.lora, mesh)
  part = (1, work.parts, work.rows // work.parts, work.length)
  rows = NamedSharding(mesh, PartitionSpec(None, None, sharding.ROWS))
  names = ('tokens', 'targets', 'positions', 'segments')
  batch = {name: jax.ShapeDtypeStruct(part, jnp.int32, sharding=rows) for name in names}
  batch['weights'] = jax.ShapeDtypeStruct(part, jnp.float32, sharding=rows)
  whole = NamedSharding(mesh, PartitionSpec())
  batch['in_use'] = jax.ShapeDtypeStruct((work.parts,), jnp.int32, sharding=whole)
  active_C = jax.ShapeDtypeStruct((1,), jnp.bool_, sharding=whole)
  attention = SelfAttention(shared_prefix=False)
  model = Transformer(config, dtype=jnp.bfloat16, remat=work.remat, attention=attention)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), platforms.compiling_for(platform):
    step = make_step(model, 1, work.lora.dropout, states)
    return _planned(step, (states, base, batch, active_C), states.adapters)


def decoding(config: ModelConfig, targets: str, mesh: Mesh, work: Work, platform: str) -> Planned:
  """Compiles the step that gives each row of a batch its next token, its adapter unmerged.

  Arguments and errors are those of `training`.
  """
  base = _base(config, mesh, work.quantize)
  states = _states(base, lora.resolve(targets, base), work.lora, mesh)
  alone = lambda leaf: jax.ShapeDtypeStruct(
    leaf.shape[1:], leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*leaf.sharding.spec[1:]))
  )
  adapters = jax.tree.map(alone, states.adapters)
  scales = {path: np.zeros(leaf.shape[1:], np.float32) for path, leaf in states.scales.items()}
  model = Transformer(config, dtype=jnp.bfloat16)

  def on_mesh(shape, dtype, *axes):
    spec = sharding.fit(PartitionSpec(*axes), shape, mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  rows, length = work.rows, work.length
  held = (config.num_layers, rows, config.num_kv_heads, length, config.head_dim)
  cache: Any = on_mesh(held, jnp.bfloat16, None, sharding.ROWS, 'tensor', None, None)
  places_BS = on_mesh((rows, length), jnp.int32, sharding.ROWS, None)
  tokens_BT = on_mesh((rows, 1), jnp.int32, sharding.ROWS, None)

  def step(base, adapters, tokens_BT, positions_BT, cache, places_BS):
    params = lora.attach(base, adapters, scales)
    past = [(cache, places_BS)]
    hidden_BTD, new = model.apply({'params': params}, tokens_BT, positions_BT, past=past)
    logits_BV = logits(model, hidden_BTD[:, 0], head_kernel(model, base, rows))
    slots_B = positions_BT[:, 0]
    return jnp.argmax(logits_BV, axis=-1), cache.write_each(new, slots_B)

  arguments = (base, adapters, tokens_BT, tokens_BT, KeyValues(cache, cache), places_BS)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), platforms.compiling_for(platform):
    return _planned(jax.jit(step, donate_argnums=4), arguments, adapters)


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
  """Throws away what native code writes to the standard error stream."""
  sys.stderr.flush()
  held = os.dup(2)
  with Path(os.devnull).open('wb') as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(held, 2)
    os.close(held)


def _base(config: ModelConfig, mesh: Mesh, kind: str) -> dict:
  """The base's shapes, in bfloat16, where they lie."""
  cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
  base = jax.tree.map(cast, abstract_params(config))
  if kind != 'none':
    base = jax.eval_shape(lambda params: quantize.quantize(params, kind), base)
  return _lying(base, sharding.base_shardings(base, mesh))


def _states(
  base: Mapping[str, Any], paths: Sequence[str], config: LoraConfig, mesh: Mesh
) -> TrainState:
  """A stack of one cell before its first update, as shapes."""
  adapters = jax.eval_shape(
    lambda params: lora_family.init(jax.random.key(0), params, paths, config), base
  )
  hyper, number = Hyper.of(OptimConfig(), _STEPS), jax.eval_shape(lambda: jnp.int32(0))
  state = TrainState(
    number,
    adapters,
    jax.eval_shape(optimizer(hyper).init, adapters),
    jax.eval_shape(lambda: jax.random.key(0)),
    packs.scales(adapters, config, packs.union([adapters])),
    hyper,
  )
  stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), state)
  return _lying(stacked, shardings(stacked, base, mesh))


def _lying(tree: Any, shardings: Any) -> Any:
  lie = lambda leaf, of: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=of)
  return jax.tree.map(lie, tree, shardings)


def _planned(step: Any, arguments: tuple, adapters: Any) -> Planned:
  start = time.perf_counter()
  traced = step.trace(*arguments)
  compiled = traced.lower().compile()
  held = compiled.memory_analysis()
  return Planned(
    arguments=held.argument_size_in_bytes,
    temporaries=held.temp_size_in_bytes + held.output_size_in_bytes - held.alias_size_in_bytes,
    flops=matmul_flops(traced.jaxpr),
    moved=moved(compiled.as_text()),
    adapters=sum(leaf.size for leaf in jax.tree.leaves(adapters)),
    seconds=time.perf_counter() - start,
  )

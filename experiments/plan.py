r"""What a step would take on a TPU slice that need not be there, before anyone pays for one.

  python -m experiments.plan --base=llama-3-8b --tpu=v5e:4x4 --targets=o_proj,fc2 --targets=all
  python -m experiments.plan --base=model/config.json --tpu=v5p:4x4x4 --mesh=fsdp=32,tensor=2
  python -m experiments.plan --base=llama-3-8b --tpu=v5e:4x4 --decode --rows=64

The real step is compiled, from shapes alone, by the compiler that the slice would use
(`pip install -e .[plan]`); without --tpu, for the devices that are here. Memory is the
compiler's; operations and bytes are counted in the program, and times are what a chip at
its best would take for these: an estimate, never a measurement.
"""

import dataclasses
import os
import sys
from pathlib import Path

from absl import flags

from experiments import _flags, _launcher, _lora_flags
from lora_jax.config import QUANTIZE, LoraConfig
from lora_jax.errors import UserError

_BASE = flags.DEFINE_string('base', 'llama-3-8b', 'A shape by name, or the config.json of a model.')
_TPU = flags.DEFINE_string('tpu', None, 'A slice, as v5e:4x4; without it, the devices here.')
_TARGETS = flags.DEFINE_multi_string(
  'targets', ['o_proj,fc2'], 'Modules to adapt, joined by commas; repeat the flag for more sets.'
)
_MESH = flags.DEFINE_string('mesh', None, 'As data=-1,fsdp=4,tensor=2; without it, one is chosen.')
_ROWS = flags.DEFINE_integer('rows', None, 'Of a batch, over all devices; by default one for each.')
_LENGTH = flags.DEFINE_integer('length', 4096, 'Tokens of a row, or of its cache with --decode.')
_PARTS = flags.DEFINE_integer('parts', 1, 'Into how many a batch is cut; gradients are summed.')
_QUANTIZE = flags.DEFINE_enum('quantize', 'none', QUANTIZE, "How the blocks' kernels are stored.")
_REMAT = flags.DEFINE_bool('remat', True, 'Compute blocks again in the backward pass.')
_DECODE = flags.DEFINE_bool('decode', False, 'Plan a token of generation in place of training.')


def main() -> None:
  """Checks everything that can be checked, then compiles and prints."""
  for flag in (_LENGTH, _PARTS, _ROWS):
    if flag.value is not None and flag.value < 1:
      raise UserError(f'--{flag.name}={flag.value}: give a number above zero')
  lora_config = _lora_flags.lora_config(LoraConfig())
  if _TPU.value:
    # Nothing runs here but the compiler.
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax

  from lora_jax import lora, platforms, sharding
  from lora_jax.plan import advice, program
  from lora_jax.plan.chips import CHIPS
  from lora_jax.transformer import abstract_params

  _launcher.imported()
  targets = tuple(dict.fromkeys(map(lora.canonical, _TARGETS.value)))
  _flags.check_targets(targets)
  config = _config(_BASE.value)
  if _MESH.value is not None:
    sharding.parse_mesh(_MESH.value)
  chip = CHIPS.get((_TPU.value or '').partition(':')[0])
  if _TPU.value and chip is None:
    raise UserError(f'--tpu={_TPU.value}: give one of {", ".join(CHIPS)} and a shape, as v5e:4x4')
  devices = program.tpu(_TPU.value) if _TPU.value else jax.devices()
  platform = 'tpu' if _TPU.value else platforms.target()
  weights = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
  chosen = _MESH.value or advice.first_mesh(2 * weights, chip.memory_bytes if chip else None)
  mesh = sharding.make_mesh(chosen, devices)
  rows = _ROWS.value or _PARTS.value * mesh.shape['data'] * mesh.shape['fsdp']
  work = program.Work(rows, _LENGTH.value, _PARTS.value, lora_config, _QUANTIZE.value, _REMAT.value)
  make = program.decoding if _DECODE.value else program.training
  planned = {}
  for names in targets:
    print(f'compiling {names}', file=sys.stderr)
    planned[names] = make(config, names, mesh, work, platform)
  print(_heading(config, weights, mesh, work, devices))
  print(_table(planned, chip, len(devices)))
  for names, plan in planned.items():
    say = advice.remedy(plan, work, mesh.shape, chip.memory_bytes) if chip else ''
    if say:
      print(f'{names} does not fit; try {say}')


def _config(name: str):
  from lora_jax.hub import huggingface
  from lora_jax.plan.shapes import SHAPES

  if name in SHAPES:
    return SHAPES[name]
  path = Path(name).expanduser()
  directory = path.parent if path.name == 'config.json' else path
  if not directory.is_dir():
    raise UserError(
      f'--base={name}: give {", ".join(SHAPES)}, or the config.json of a model or its directory'
    )
  # What it sees with is no part of the step.
  return dataclasses.replace(huggingface.model_config(directory), vision=None)


def _heading(config, weights: int, mesh, work, devices) -> str:
  axes = ','.join(f'{axis}={size}' for axis, size in mesh.shape.items())
  what = f'a token for each of {work.rows:,} rows, {work.length:,} in the cache'
  if not _DECODE.value:
    parts = f' in {work.parts} parts' if work.parts > 1 else ''
    what = f'a training step of {work.rows:,} rows of {work.length:,} tokens{parts}'
    what += ', remat' if work.remat else ''
  where = _TPU.value or devices[0].device_kind
  stored = 'bfloat16' if work.quantize == 'none' else f'{work.quantize} and bfloat16'
  return (
    f'{_BASE.value}: {weights:,} weights, {stored}; {len(devices)} x {where}, mesh {axes}\n'
    f'{what}; rank {work.lora.rank}\n'
  )


def _table(planned, chip, count: int) -> str:
  from lora_jax.report.tables import markdown

  gib = lambda size: f'{size / 2**30:,.2f} GiB'
  gb = lambda size: f'{size / 1e9:,.2f} GB'
  plans = planned.values()
  lines = [
    ['trained parameters', *(f'{plan.adapters:,}' for plan in plans)],
    ['a chip holds', *(gib(plan.arguments) for plan in plans)],
    ['and needs besides', *(gib(plan.temporaries) for plan in plans)],
  ]
  if chip:
    fits = lambda plan: 'fits' if plan.memory <= chip.memory_bytes else 'does NOT fit'
    of = f'together, of {gib(chip.memory_bytes)}'
    lines.append([of, *(f'{gib(plan.memory)}, {fits(plan)}' for plan in plans)])
  lines += [
    ['operations, all chips', *(f'{plan.flops / 1e12:,.2f} TFLOP' for plan in plans)],
    ['memory traffic, a chip', *(gb(plan.moved.memory) for plan in plans)],
  ]
  kinds = sorted({kind for plan in plans for kind in plan.moved.collectives})
  for kind in kinds:
    found = [plan.moved.collectives.get(kind, (0, 0)) for plan in plans]
    lines.append([f'{kind}, a chip', *(f'{times:,} x, {gb(size)}' for times, size in found)])
  if chip:
    times = [
      {
        'products': plan.flops / count / chip.flops,
        'memory': plan.moved.memory / chip.memory_rate,
        'links': plan.moved.links / chip.link_rate,
      }
      for plan in plans
    ]
    for name in ('products', 'memory', 'links'):
      lines.append([f'estimate: {name}', *(f'{1e3 * of[name]:,.1f} ms' for of in times)])
    bound = [max(of, key=lambda name: of[name]) for of in times]
    lines.append(['estimate: bound by', *bound])
  lines.append(['compiled in', *(f'{plan.seconds:.0f} s' for plan in plans)])
  return markdown(['', *planned], lines)


if __name__ == '__main__':
  _launcher.run(main)

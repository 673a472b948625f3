"""What a compiled program moves, read from its text: loops counted as often as they run.

The text is of one device's part of the program. XLA promises no format, so what is not
understood is an error rather than a zero.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {
  'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 's32': 32, 'u32': 32,
  's64': 64, 'u64': 64, 'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64, 'f8e4m3fn': 8, 'f8e5m2': 8,
  'token': 0,
}  # fmt: skip

# How often what it gives back crosses a device's links, to a part in the number of devices.
_COLLECTIVES = {
  'all-gather': 1,
  'all-reduce': 2,
  'reduce-scatter': 1,
  'all-to-all': 1,
  'ragged-all-to-all': 1,
  'collective-permute': 1,
  'collective-broadcast': 1,
}

# They move nothing: names for what is there, or control.
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
  'after-all', 'partition-id', 'replica-id', 'iota', 'opt-barrier', 'async-update', 'async-done',
}  # fmt: skip

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?')
# What a computation of a loop, a fusion or a branch is called by.
_CALLS = re.compile(r'\b(?:calls|body|to_apply)=%?([\w.\-]+)')
_BRANCHES = re.compile(
  r'\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  root: bool


@dataclasses.dataclass(frozen=True)
class Moved:
  """Bytes of one device, in one run of the program.

  Attributes:
    memory: to and from its memory, at least by what each operation reads and writes.
    collectives: opcode -> (how often it runs, bytes over the device's links).
  """

  memory: int
  collectives: Mapping[str, tuple[int, int]]

  @property
  def links(self) -> int:
    """Bytes of all collectives."""
    return sum(size for _, size in self.collectives.values())


def moved(text: str) -> Moved:
  """Counts a program.

  Args:
    text: of a compiled program, as `jax.stages.Compiled.as_text` gives it.

  Raises:
    ValueError: there is a loop of which the text does not say how often it runs.
  """
  computations, entry = _parse(text)
  memory, collectives = 0, {}
  for name, times, fused in _runs(computations, entry, 1):
    by_name = {one.name: one for one in computations[name]}
    for one in computations[name]:
      kind = one.opcode.removesuffix('-start')
      if kind in _COLLECTIVES:
        # What starts one gives back its operand too; the larger is what comes.
        size = max(_sizes(one.type), default=0)
        if kind == 'reduce-scatter':
          size = sum(sum(_sizes(by_name[operand].type)) for operand in one.operands)
        count, so_far = collectives.get(kind, (0, 0))
        collectives[kind] = (count + times, so_far + times * _COLLECTIVES[kind] * size)
      if not fused:
        memory += times * _touched(one, by_name, computations)
  return Moved(memory, collectives)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  computations: dict[str, list[Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      current = computations[start[2]] = []
      entry = start[2] if start[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and (found := _INSTRUCTION.match(line)):
      inside, rest = _arguments(found[5])
      operands = tuple(re.findall(r'%([\w.\-]+)', inside))
      rest = inside + rest if found[4] in ('constant', 'parameter') else rest
      current.append(Instruction(found[2], found[3], found[4], operands, rest, bool(found[1])))
  if not entry:
    raise ValueError('no entry computation in the text of the program')
  return computations, entry


def _arguments(text: str) -> tuple[str, str]:
  """What stands in an instruction's parentheses, and what follows them."""
  depth = 1
  for i, char in enumerate(text):
    depth += (char == '(') - (char == ')')
    if not depth:
      return text[:i], text[i:]
  return text, ''


def _runs(
  computations: Mapping[str, list[Instruction]], name: str, times: int, fused: bool = False
) -> Iterator[tuple[str, int, bool]]:
  """Every computation, how often it runs, and whether it is the inside of one operation."""
  yield name, times, fused
  for one in computations[name]:
    if one.opcode == 'while':
      trips = times * _trips(one, computations)
      yield from _runs(computations, _called(one), trips, fused)
    elif one.opcode == 'conditional':
      for several, single in _BRANCHES.findall(one.rest):
        for branch in re.findall(r'[\w.\-]+', several or single):
          yield from _runs(computations, branch, times, fused)
    elif one.opcode in ('call', 'fusion', 'async-start') and _CALLS.search(one.rest):
      inside = fused or one.opcode == 'fusion'
      yield from _runs(computations, _called(one), times, inside)


def _called(one: Instruction) -> str:
  found = _CALLS.search(one.rest)
  if found is None:
    raise ValueError(f'{one.opcode} {one.name} says not what it runs')
  return found[1]


def _trips(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int:
  """How often a loop runs: as it says, or as its condition compares a counter from zero."""
  if known := _TRIPS.search(loop.rest):
    return int(known[1])
  condition = re.search(r'condition=%?([\w.\-]+)', loop.rest)
  inside = computations[condition[1]] if condition else []
  bounds = {
    one.name: int(number[0])
    for one in inside
    if one.opcode == 'constant' and (number := re.match(r'-?\d+', one.rest))
  }
  for one in inside:
    if one.opcode == 'compare' and 'direction=LT' in one.rest:
      for operand in one.operands:
        if operand in bounds:
          return bounds[operand]
  raise ValueError(f'how often {loop.name} runs is not said')


def _touched(
  one: Instruction,
  by_name: Mapping[str, Instruction],
  computations: Mapping[str, list[Instruction]],
) -> int:
  """Bytes that an operation reads and writes in the device's main memory."""
  if one.opcode in _FREE or one.opcode.endswith('-done'):
    return 0
  inside = computations[_called(one)] if one.opcode == 'fusion' else None
  written = sum(_sizes(one.type))
  reads = []
  for place, operand in enumerate(one.operands):
    if operand not in by_name:
      continue
    whole = sum(_sizes(by_name[operand].type))
    reads.append(_read(one, place, whole, inside))
  if updated := _updated(one, inside, by_name):
    # Done in place: what is put in is written, and the rest stays where it is.
    return 2 * updated + sum(size for size in reads if size < written)
  if one.opcode in ('dynamic-slice', 'slice', 'gather'):
    return 2 * written
  return written + sum(reads)


def _read(one: Instruction, place: int, whole: int, inside: list[Instruction] | None) -> int:
  """Of an operand, what is read: slices of it, where a fusion takes nothing else."""
  if inside is None or not whole:
    return whole
  parameter = next(
    (
      held.name
      for held in inside
      if held.opcode == 'parameter' and re.match(rf'{place}\b', held.rest)
    ),
    None,
  )
  users = [held for held in inside if parameter in held.operands]
  if users and all(user.opcode in ('dynamic-slice', 'slice', 'gather') for user in users):
    return min(whole, sum(sum(_sizes(user.type, anywhere=True)) for user in users))
  return whole


def _updated(
  one: Instruction, inside: list[Instruction] | None, by_name: Mapping[str, Instruction]
) -> int:
  """Bytes that are put into a larger array, where that is all an operation does."""
  if one.opcode == 'dynamic-update-slice':
    return sum(_sizes(by_name[one.operands[1]].type))
  if inside is None:
    return 0
  root = next((held for held in inside if held.root), None)
  if root is None or root.opcode != 'dynamic-update-slice':
    return 0
  held = {inner.name: inner for inner in inside}
  return sum(_sizes(held[root.operands[1]].type, anywhere=True))


def _sizes(type_: str, anywhere: bool = False) -> Iterator[int]:
  """Bytes of each array of a type; without `anywhere`, of those in main memory alone."""
  for kind, dims, layout in _ARRAY.findall(type_):
    # Another memory space is on the chip.
    if re.search(r'S\([1-9]', layout) and not anywhere:
      continue
    if kind not in _BITS:
      raise ValueError(f'{kind} is no array type that is known')
    count = math.prod(int(size.lstrip('<=')) for size in dims.split(',') if size)
    yield -(-_BITS[kind] * count // 8)

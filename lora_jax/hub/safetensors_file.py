"""A safetensors file, read and written a tensor at a time.

    file = open_file(Path('model.safetensors'))
    embedding = file.read('model.embed_tokens.weight')

    write(Path('out.safetensors'), {'weight': Tensor('BF16', (2, 3))}, lambda name: array)

The format (https://huggingface.co/docs/safetensors): the length of a header in 8 bytes,
the header as JSON, and the tensors one after another. Tensors are read into memory of
their own rather than mapped, so that what a model takes while it loads can be counted,
and a damaged file is told from a mistake of ours before anything is read.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError
from lora_jax.records import new_file

# Kinds of number that weights are stored in, as the format calls them.
DTYPES = {
  'F32': np.dtype('<f4'),
  'F16': np.dtype('<f2'),
  'BF16': np.dtype(jnp.bfloat16),
}

# The reference implementation's limit, which tells a header from other bytes.
_LONGEST_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class Tensor:
  """What a file holds under a name.

  Attributes:
    kind: one of the format's names of dtypes, of `DTYPES` if it can be read.
    shape: in C order.
    start: of its first byte, from the start of the file.
  """

  kind: str
  shape: tuple[int, ...]
  start: int = 0

  @property
  def size(self) -> int:
    """Numbers in it."""
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
  """An open file.

  Attributes:
    path: where it is.
    tensors: name -> its kind and place.
    metadata: what else was written in it.
  """

  path: Path
  tensors: Mapping[str, Tensor]
  metadata: Mapping[str, str]

  def read(self, name: str) -> np.ndarray:
    """A tensor as it is stored, in memory of its own.

    Raises:
      UserError: it is of a kind that no weights are.
    """
    tensor = self.tensors[name]
    if tensor.kind not in DTYPES:
      raise UserError(
        f'{self.path}: tensor {name} is {tensor.kind}; give weights in {", ".join(DTYPES)}'
      )
    flat = np.fromfile(self.path, DTYPES[tensor.kind], tensor.size, offset=tensor.start)
    if flat.size != tensor.size:
      raise UserError(f'{self.path}: ends within tensor {name}; copy the file again')
    return flat.reshape(tensor.shape)


def open_file(path: Path) -> SafetensorsFile:
  """Reads the header of a file and checks that all it promises is there.

  Raises:
    UserError: the file is missing, damaged or cut short.
  """
  if not path.is_file():
    raise UserError(f'no {path}; copy the whole checkpoint')
  size = path.stat().st_size
  with path.open('rb') as stream:
    start = stream.read(8)
    length = struct.unpack('<Q', start)[0] if len(start) == 8 else -1
    if not 0 < length <= min(size - 8, _LONGEST_HEADER):
      raise UserError(f'{path}: cut short, or not a safetensors file; copy it again')
    header = stream.read(length)
  try:
    entries = json.loads(header)
    metadata = dict(entries.pop('__metadata__', None) or {})
    tensors = {name: _tensor(entry, 8 + length) for name, entry in entries.items()}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f'{path}: not the header of a safetensors file; copy it again') from error
  for name, tensor in tensors.items():
    begin, end = entries[name]['data_offsets']
    width = DTYPES[tensor.kind].itemsize if tensor.kind in DTYPES else None
    if begin < 0 or end < begin or (width and end - begin != width * tensor.size):
      raise UserError(
        f'{path}: tensor {name} is {tensor.shape} and not of that size; copy it again'
      )
    if 8 + length + end > size:
      raise UserError(f'{path}: cut short within or before tensor {name}; copy it again')
  return SafetensorsFile(path, tensors, metadata)


def _tensor(entry: Mapping[str, Any], data: int) -> Tensor:
  shape = tuple(entry['shape'])
  begin, end = entry['data_offsets']
  if any(type(number) is not int for number in (*shape, begin, end)) or min(shape, default=0) < 0:
    raise ValueError(shape)
  return Tensor(str(entry['dtype']), shape, data + begin)


def write(
  path: Path,
  tensors: Mapping[str, Tensor],
  array: Callable[[str], np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a file a tensor at a time, so that `path` is the whole new file or the old one.

  Args:
    path: where; its directory is made if it is not there.
    tensors: name -> kind and shape, in the order of the file.
    array: what gives a tensor by its name, cast to its kind here.
    metadata: what else is to be written in it.

  Raises:
    UserError: the file cannot be written.
  """
  header: dict[str, Any] = {'__metadata__': {'format': 'pt', **(metadata or {})}}
  at = 0
  for name, tensor in tensors.items():
    end = at + DTYPES[tensor.kind].itemsize * tensor.size
    header[name] = {'dtype': tensor.kind, 'shape': tensor.shape, 'data_offsets': (at, end)}
    at = end
  text = json.dumps(header, separators=(',', ':')).encode()
  # Spaces up to a multiple of 8, so that tensors lie aligned.
  text += b' ' * (-len(text) % 8)
  with new_file(path) as stream:
    stream.write(struct.pack('<Q', len(text)) + text)
    for name, tensor in tensors.items():
      values = np.ascontiguousarray(array(name), DTYPES[tensor.kind])
      assert values.shape == tensor.shape, (name, values.shape, tensor.shape)
      stream.write(values.view(np.uint8).data)

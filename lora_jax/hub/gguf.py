"""Reads a GGUF file: its metadata, and its tensors as float32.

    file = open_file('model.gguf')
    file.metadata['general.architecture']
    file.read('blk.0.attn_q.weight')

The format is specified at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
The `gguf` package knows the block formats and dequantises them. Its reader is not
used: it makes an array object of every token and merge, which takes seconds, and on a
damaged file it fails in ways that cannot be told from a mistake of ours.
"""

import dataclasses
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from lora_jax.errors import UserError

T = TypeVar('T')

_MAGIC = b'GGUF'
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32

# Value types of the specification (enum gguf_metadata_value_type).
_SCALARS = {
  0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd',
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies.

  Attributes:
    shape: in numpy's order, which is the reverse of the file's.
    kind: how it is stored.
    start: its first byte, from the beginning of the file.
    num_bytes: its length.
  """

  shape: tuple[int, ...]
  kind: GGMLQuantizationType
  start: int
  num_bytes: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
  """An open GGUF file.

  Attributes:
    path: where it is, for messages.
    metadata: every key and its plain Python value.
    tensors: name -> where it lies.
    data: the whole file, mapped.
  """

  path: Path
  metadata: Mapping[str, Any]
  tensors: Mapping[str, Tensor]
  data: mmap.mmap

  def require(self, key: str, kind: type[T], default: T | None = None) -> T:
    """The metadata value at `key`.

    Args:
      key: the key.
      kind: the type that it must have; a whole number passes as a float.
      default: the value where the file has none.

    Raises:
      UserError: the file has no value and there is no default, or one of another type.
    """
    value = self.metadata.get(key, default)
    if value is None:
      raise UserError(f'{self.path}: has no metadata key {key!r}; convert the model again')
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind:
      raise UserError(f'{self.path}: metadata key {key!r} is {value!r:.60}, not {kind.__name__}')
    return value

  def require_tensor(self, name: str) -> Tensor:
    """Where the tensor `name` lies; `UserError` if the file has none."""
    if name not in self.tensors:
      raise UserError(f'{self.path}: has no tensor {name}; give a whole model in one file')
    return self.tensors[name]

  def read(self, name: str) -> np.ndarray:
    """The tensor `name` in float32; a read-only view of the file if it is stored so.

    Raises:
      UserError: there is no such tensor, or its type cannot be dequantised.
    """
    tensor = self.require_tensor(name)
    stored = np.frombuffer(self.data, np.uint8, tensor.num_bytes, tensor.start)
    rows = stored.reshape(*tensor.shape[:-1], -1)
    try:
      return dequantize(rows, tensor.kind)
    except NotImplementedError as error:
      raise UserError(
        f'{self.path}: tensor {name} has type {tensor.kind.name}, which cannot be dequantised '
        'here; give a file in Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0, F16, BF16 or F32'
      ) from error


def open_file(path: str | Path) -> GgufFile:
  """Maps a GGUF file and reads its header.

  Raises:
    UserError: the file is missing, is not GGUF, is cut short or is damaged.
  """
  path = Path(path)
  try:
    with path.open('rb') as stream:
      if stream.read(len(_MAGIC)) != _MAGIC:
        raise UserError(f'{path}: is not a GGUF file (it does not begin so); give a .gguf file')
      data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); give a .gguf file') from error
  try:
    metadata, tensors = _header(data)
  except _DamagedError as error:
    raise UserError(f'{path}: {error}; delete it and fetch it again') from error
  file = GgufFile(path, metadata, tensors, data)
  # The tool that joins parts leaves the key at 0.
  count = file.require('split.count', int, 0)
  if count > 1:
    raise UserError(
      f'{path}: is one of {count} parts; join them with llama-gguf-split --merge and give the whole'
    )
  return file


class _DamagedError(Exception):
  """The bytes are not what the specification promises."""


class _Cursor:
  """Reads values one after the other, and never past the end."""

  def __init__(self, data: mmap.mmap, position: int):
    self.data = data
    self.position = position

  def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
    form = struct.Struct('<' + code)
    end = self.position + count * form.size
    if end > len(self.data):
      raise _DamagedError(f'is cut short: it ends within its header, at {len(self.data)} bytes')
    values = struct.unpack_from(f'<{count}{code}', self.data, self.position)
    self.position = end
    return values

  def string(self) -> str:
    (length,) = self.numbers('Q')
    start, self.position = self.position, self.position + length
    if self.position > len(self.data):
      raise _DamagedError(f'is cut short: it ends within its header, at {len(self.data)} bytes')
    try:
      return self.data[start : self.position].decode()
    except UnicodeDecodeError as error:
      raise _DamagedError(f'is damaged: text at byte {start} is not UTF-8') from error

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind in _SCALARS:
      return self.numbers(_SCALARS[kind])[0]
    if kind == _ARRAY:
      (item_kind,), (count,) = self.numbers('I'), self.numbers('Q')
      if item_kind in _SCALARS:
        return list(self.numbers(_SCALARS[item_kind], count))
      if item_kind == _ARRAY:
        raise _DamagedError(f'is damaged: arrays within arrays before byte {self.position}')
      return [self.value(item_kind) for _ in range(count)]
    raise _DamagedError(f'is damaged: unknown metadata type {kind} before byte {self.position}')


def _header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, Tensor]]:
  cursor = _Cursor(data, len(_MAGIC))
  (version,) = cursor.numbers('I')
  if version not in _VERSIONS:
    raise _DamagedError(f'has GGUF version {version}, and only 2 and 3 are read')
  num_tensors, num_keys = cursor.numbers('Q', 2)
  metadata = {}
  for _ in range(num_keys):
    key = cursor.string()
    metadata[key] = cursor.value(cursor.numbers('I')[0])
  places = []
  for _ in range(num_tensors):
    name = cursor.string()
    (num_dims,) = cursor.numbers('I')
    shape = tuple(reversed(cursor.numbers('Q', num_dims)))
    places.append((name, shape, cursor.numbers('I')[0], cursor.numbers('Q')[0]))
  alignment = metadata.get('general.alignment', _DEFAULT_ALIGNMENT)
  if not isinstance(alignment, int) or alignment < 1:
    raise _DamagedError(f'is damaged: general.alignment is {alignment!r}')
  first = -(-cursor.position // alignment) * alignment
  tensors = {
    name: _tensor(name, shape, kind, first + offset) for name, shape, kind, offset in places
  }
  needed = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=0)
  if needed > len(data):
    raise _DamagedError(f'is cut short: it has {len(data)} of {needed} bytes')
  return metadata, tensors


def _tensor(name: str, shape: tuple[int, ...], kind: int, start: int) -> Tensor:
  try:
    known = GGMLQuantizationType(kind)
  except ValueError as error:
    raise _DamagedError(f'has the unknown type {kind} for tensor {name}') from error
  block_size, block_bytes = GGML_QUANT_SIZES[known]
  if not shape or min(shape) < 1 or shape[-1] % block_size:
    raise _DamagedError(f'is damaged: tensor {name} of shape {shape} cannot be {known.name}')
  num_elements = 1
  for size in shape:
    num_elements *= size
  return Tensor(shape, known, start, num_elements // block_size * block_bytes)

"""Checkpoints in and out as Hugging Face lays them out: config.json and safetensors.

    config = huggingface.model_config(directory)
    params = huggingface.load_params(directory, config, 'bfloat16')
    huggingface.save(Path('merged'), config, params, like=directory, dtype='bfloat16')

Matrices are (out, in) and layers apart there, (in, out) and stacked here; names are the
same but for `attn`, `kernel` and `scale`. Which families there are is `hf_config`'s to say,
and which of them see `hf_vision`'s. No pickle is ever read.
"""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.config import ModelConfig
from lora_jax.errors import UserError
from lora_jax.hub import safetensors_file
from lora_jax.hub.hf_config import CONFIG, read
from lora_jax.hub.hf_llama import llama_settings
from lora_jax.hub.hf_names import full_name, is_stacked
from lora_jax.hub.hf_vision import model_config
from lora_jax.hub.safetensors_file import DTYPES, SafetensorsFile, Tensor
from lora_jax.records import write_json
from lora_jax.transformer import abstract_params
from lora_jax.vision import CHANNELS

__all__ = ['fingerprint', 'load_params', 'model_config', 'save', 'weights_kind']

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'

# Of a written checkpoint, in bytes, as transformers has it.
SHARD = 5_000_000_000

# What goes beside the weights from the directory a base came from, where it is there.
_COMPANIONS = (
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'tokenizer.model',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'chat_template.json',
  'preprocessor_config.json',
  'processor_config.json',
)
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt')
_HEAD, _TABLE = 'lm_head.weight', 'embed_tokens.weight'
# The one kernel that is no matrix there: a convolution's, (out, channels, rows, columns).
_PATCHES = 'vision/patch_embedding/kernel'
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight', 'bias': 'bias'}

# Columns of a matrix that are turned at a time: a whole one leaves the processor's caches.
_STRIP = 256


def load_params(directory: Path, config: ModelConfig, dtype: Any = None) -> dict[str, Any]:
  """Reads the weights into the Transformer's parameter tree, a tensor at a time.

  Beside the tree no more than the largest tensor is in memory.

  Args:
    directory: holds model.safetensors, or shards and their index.
    config: what `model_config` says of it.
    dtype: of the arrays; None: as they are stored, float32 where layers differ.

  Returns:
    A nested dict of numpy arrays as `transformer` has it; `lm_head/kernel` only when
    the embeddings are not tied.

  Raises:
    UserError: a file is missing, damaged, cut short or a pickle; a tensor is missing, of
      another shape or dtype, or one that the configuration has no place for.
  """
  files = _files(directory)
  leaves = _leaves(config)
  places: dict[str, list[str]] = {}
  for path, layer in _places(config):
    places.setdefault(path, []).append(_name(config, path, layer))
  _check_names(directory, files, {name for names in places.values() for name in names})
  params = {}
  for path, names in places.items():
    leaf, shape = leaves[path], _stored_shape(path, leaves[path])
    for name in names:
      found = files[name].tensors[name].shape
      if found != shape:
        raise UserError(
          f'{files[name].path}: tensor {name} is {found}, but config.json promises {shape}; '
          'give the config.json that belongs to these weights'
        )
    kinds = {files[name].tensors[name].kind for name in names}
    stored = DTYPES.get(kinds.pop(), np.float32) if len(kinds) == 1 else np.float32
    whole: np.ndarray = np.empty(leaf.shape, stored if dtype is None else dtype)
    parts = [*whole] if is_stacked(path) else [whole]
    for name, part in zip(names, parts, strict=True):
      # No name for what is read: it would be held while the next tensor is.
      _put(part, files[name].read(name), turned=path.endswith('/kernel'))
    params[path] = whole
  return unflatten_dict(params, sep='/')


def weights_kind(directory: Path) -> str:
  """How most of the blocks' weights are stored, as 'BF16'.

  Raises:
    UserError: as `load_params`.
  """
  numbers: Counter[str] = Counter()
  for name, file in _files(directory).items():
    if '.layers.' in name:
      numbers[file.tensors[name].kind] += file.tensors[name].size
  return numbers.most_common(1)[0][0] if numbers else 'F32'


def fingerprint(directory: Path) -> str:
  """SHA-256 over config.json and the files of the weights, as hexadecimal digits.

  Raises:
    UserError: as `load_params`.
  """
  read(directory)
  paths = {file.path for file in _files(directory).values()}
  digest = hashlib.sha256()
  for path in [directory / CONFIG, *sorted(paths)]:
    with path.open('rb') as stream:
      digest.update(path.name.encode() + b'\0' + hashlib.file_digest(stream, 'sha256').digest())
  return digest.hexdigest()


def save(
  directory: Path,
  config: ModelConfig,
  params: Mapping[str, Any],
  like: Path | None = None,
  dtype: Any = None,
  shard: int = SHARD,
) -> None:
  """Writes a checkpoint that transformers and servers load.

  config.json comes last, so that a directory which has one is whole.

  Args:
    directory: made if it is not there; an older checkpoint in it is replaced.
    config: the shape.
    params: a whole tree of plain arrays.
    like: the checkpoint that the base came from, whose config.json and tokenizer are
      copied; None: a config.json is written, for a plain Llama.
    dtype: of the weights, of `DTYPES`; None: as they are.
    shard: bytes of a file at most, but for a tensor that is larger.

  Raises:
    UserError: the directory cannot be written to or is `like` itself, `like` is of
      another shape, or there is no `like` and the model is no plain Llama.
  """
  leaves: dict[str, Any] = dict(flatten_dict(params, sep='/'))
  expected = {path: leaf.shape for path, leaf in _leaves(config).items()}
  if {path: leaf.shape for path, leaf in leaves.items()} != expected:
    raise ValueError('the parameters are not those of the configuration')
  if like is None:
    settings = llama_settings(config)
  else:
    if directory.resolve() == like.resolve():
      raise UserError(f'{directory} is where the base is; give another directory')
    if model_config(like) != config:
      raise UserError(f'{like / CONFIG} is of another model; give the directory of the base')
    settings = read(like)
  tensors, places = {}, {}
  for path, layer in _places(config):
    leaf, name = leaves[path], _name(config, path, layer)
    places[name] = (path, layer)
    tensors[name] = Tensor(_kind(leaf.dtype if dtype is None else dtype), _stored_shape(path, leaf))
  kinds = Counter(tensor.kind for tensor in tensors.values())
  named = DTYPES[kinds.most_common(1)[0][0]].name
  settings |= dict.fromkeys([*({'dtype', 'torch_dtype'} & {*settings})] or ['dtype'], named)

  def array(name: str) -> np.ndarray:
    path, layer = places[name]
    values = np.asarray(leaves[path] if layer is None else leaves[path][layer])
    return values.T.reshape(tensors[name].shape) if path.endswith('/kernel') else values

  try:
    directory.mkdir(parents=True, exist_ok=True)
    for old in [CONFIG, WEIGHTS, INDEX, 'model-*-of-*.safetensors']:
      for path in directory.glob(old):
        path.unlink()
    for name in _COMPANIONS:
      if like is not None and (like / name).is_file():
        shutil.copyfile(like / name, directory / name)
  except OSError as error:
    raise UserError(f'cannot write to {directory}: {error.strerror}; give another') from error
  shards = _shards(tensors, shard)
  for file, held in shards.items():
    safetensors_file.write(directory / file, held, array)
  if len(shards) > 1:
    total = sum(_bytes(tensor) for tensor in tensors.values())
    where = {name: file for file, held in shards.items() for name in held}
    write_json(directory / INDEX, {'metadata': {'total_size': total}, 'weight_map': where})
  write_json(directory / CONFIG, settings)


def _places(config: ModelConfig) -> list[tuple[str, int | None]]:
  """Each tensor's leaf, and its layer where it is a part of one; layer by layer."""
  leaves = _leaves(config)
  stacks: dict[str, list[str]] = {}
  for path in filter(is_stacked, leaves):
    stacks.setdefault(path.split('/')[0], []).append(path)
  places: list[tuple[str, int | None]] = [(path, None) for path in leaves if not is_stacked(path)]
  for paths in stacks.values():
    places += [(path, layer) for layer in range(leaves[paths[0]].shape[0]) for path in paths]
  return places


def _leaves(config: ModelConfig) -> dict[str, Any]:
  """Path -> shape of a leaf of the parameter tree."""
  return dict(flatten_dict(abstract_params(config), sep='/'))


def _name(config: ModelConfig, path: str, layer: int | None) -> str:
  """What Hugging Face calls a leaf, or a layer of it."""
  module, leaf = path.rsplit('/', 1)
  return f'{full_name(module, layer, config.vision is not None)}.{_LEAVES[leaf]}'


def _stored_shape(path: str, leaf: Any) -> tuple[int, ...]:
  shape = tuple(leaf.shape[1:] if is_stacked(path) else leaf.shape)
  if path == _PATCHES:
    side = math.isqrt(shape[0] // CHANNELS)
    return (shape[1], CHANNELS, side, side)
  return shape[::-1] if path.endswith('/kernel') else shape


def _files(directory: Path) -> dict[str, SafetensorsFile]:
  """Tensor -> the open file that holds it."""
  if (directory / WEIGHTS).is_file():
    file = safetensors_file.open_file(directory / WEIGHTS)
    return dict.fromkeys(file.tensors, file)
  index = directory / INDEX
  if not index.is_file():
    pickles = [path.name for path in directory.glob('*') if path.suffix in _PICKLES]
    remedy = 'copy the whole checkpoint'
    if pickles:
      remedy = f'{min(pickles)} is a pickle, which is never read: save it as safetensors'
    raise UserError(f'no {directory / WEIGHTS} and no {INDEX}; {remedy}')
  try:
    where = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    shards = sorted({*where.values()})
    away = [shard for shard in shards if Path(shard).name != shard]
    if away:
      raise ValueError(f'{away[0]!r} is not beside it')
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{index}: not the index of a checkpoint ({error}); copy it again') from error
  for shard in shards:
    if not (directory / shard).is_file():
      raise UserError(f'{index}: names {shard}, which is not there; copy the whole checkpoint')
    if not shard.endswith('.safetensors'):
      raise UserError(f'{index}: names {shard}, which is no safetensors file; no other is read')
  opened = {shard: safetensors_file.open_file(directory / shard) for shard in shards}
  for name, shard in where.items():
    if name not in opened[shard].tensors:
      raise UserError(f'{directory / shard}: has no tensor {name}, which {INDEX} promises')
  return {name: opened[shard] for name, shard in where.items()}


def _check_names(directory: Path, files: Mapping[str, SafetensorsFile], expected: set[str]) -> None:
  missing = sorted(expected - {*files})
  if missing:
    more = f' and {len(missing) - 1} more' if missing[1:] else ''
    raise UserError(f'{directory}: tensor {missing[0]}{more} is missing; copy the whole checkpoint')
  # Old checkpoints hold their rotary frequencies, which the configuration says too.
  extra = {name for name in files if not name.endswith('.rotary_emb.inv_freq')} - expected
  if extra == {_HEAD}:
    _check_tied(files)
  elif extra:
    first = min(extra)
    more = f' and {len(extra) - 1} more' if len(extra) > 1 else ''
    raise UserError(
      f'{files[first].path}: tensor {first}{more} has no place in the model of config.json'
    )


def _check_tied(files: Mapping[str, SafetensorsFile]) -> None:
  """A checkpoint may store its head although it is the embedding table, but no other head."""
  name = next(name for name in files if name.endswith(_TABLE))
  head, table = files[_HEAD], files[name]
  tied = head.tensors[_HEAD], table.tensors[name]
  same = (tied[0].kind, tied[0].shape) == (tied[1].kind, tied[1].shape)
  if not same or head.read(_HEAD).tobytes() != table.read(name).tobytes():
    raise UserError(
      f'{head.path}: tensor {_HEAD} is not {name}, though config.json ties them; set its '
      'tie_word_embeddings to false'
    )


def _put(part: np.ndarray, stored: np.ndarray, turned: bool) -> None:
  """Copies a tensor to its place, cast to the place's dtype."""
  if not turned:
    part[...] = stored
    return
  stored = stored.reshape(len(stored), -1)
  for at in range(0, len(stored), _STRIP):
    part[:, at : at + _STRIP] = stored[at : at + _STRIP].T


def _kind(dtype: Any) -> str:
  for kind, known in DTYPES.items():
    if known == np.dtype(dtype):
      return kind
  names = ', '.join(known.name for known in DTYPES.values())
  raise UserError(f'weights in {np.dtype(dtype).name} cannot be written; give {names}')


def _bytes(tensor: Tensor) -> int:
  return DTYPES[tensor.kind].itemsize * tensor.size


def _shards(tensors: Mapping[str, Tensor], most: int) -> dict[str, dict[str, Tensor]]:
  """File -> its tensors, in order, each file as full as it may be."""
  shards: list[dict[str, Tensor]] = [{}]
  room = most
  for name, tensor in tensors.items():
    if shards[-1] and _bytes(tensor) > room:
      shards.append({})
      room = most
    shards[-1][name] = tensor
    room -= _bytes(tensor)
  if len(shards) == 1:
    return {WEIGHTS: shards[0]}
  number = '{:05}'.format
  return {
    f'model-{number(i + 1)}-of-{number(len(shards))}.safetensors': held
    for i, held in enumerate(shards)
  }

"""Runs the PEFT peer on batches of ours and returns its record.

batches = pad([(tokens, completion), ...], rows_per_batch=8, pad_id=0)
record = run(config, params, batches, dtype='bfloat16', modules=('o_proj',), rank=8, steps=20)
record['real_tokens_per_second'], record['peak_bytes']
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch import local
from lora_jax.config import ModelConfig
from lora_jax.errors import UserError
from lora_jax.hub import huggingface

# The label that transformers' loss leaves out.
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
  """Rows padded to the longest of them.

  Attributes:
    tokens_BT: token ids.
    labels_BT: the same where a loss is taken on the token, else `IGNORED`.
    mask_BT: 1 on real tokens, 0 on padding.
  """

  tokens_BT: np.ndarray
  labels_BT: np.ndarray
  mask_BT: np.ndarray


def pad(
  rows: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]],
  rows_per_batch: int,
  pad_id: int,
) -> list[PaddedBatch]:
  """Batches rows in their order, as a collator that pads to the longest row does.

  Args:
    rows: token ids of a row, and for each whether a loss is taken on it.
    rows_per_batch: B; the last batch may be smaller.
    pad_id: the token that fills up, on the right.
  """
  batches = []
  for start in range(0, len(rows), rows_per_batch):
    chosen = rows[start : start + rows_per_batch]
    shape = (len(chosen), max(len(tokens) for tokens, _ in chosen))
    tokens_BT = np.full(shape, pad_id, np.int32)
    labels_BT = np.full(shape, IGNORED, np.int32)
    mask_BT = np.zeros(shape, np.int32)
    for i, (tokens, learned) in enumerate(chosen):
      tokens_BT[i, : len(tokens)] = tokens
      labels_BT[i, : len(tokens)] = np.where(learned, tokens, IGNORED)
      mask_BT[i, : len(tokens)] = 1
    batches.append(PaddedBatch(tokens_BT, labels_BT, mask_BT))
  return batches


def python() -> Path:
  """The interpreter of the environment that has the peer, made on first use.

  Raises:
    UserError: this machine has no Python for it, or it could not be installed.
  """
  try:
    return local.environment(('3.11',), ('test',))
  except local.LaunchError as error:
    raise UserError(f'the PEFT peer: {error}') from error


def run(
  config: ModelConfig,
  params: Mapping[str, Any],
  batches: Sequence[PaddedBatch],
  dtype: str,
  modules: Sequence[str],
  rank: int,
  steps: int,
  compiled: bool = False,
) -> dict[str, Any]:
  """Trains adapters with PEFT in a process of its own.

  Args:
    config: the base's shape.
    params: the base.
    batches: gone round as often as the steps need.
    dtype: of the base and its activations, 'float32' or 'bfloat16'; PEFT keeps the
      adapters float32.
    modules: names of the modules to adapt, such as 'o_proj'.
    rank: R.
    steps: timed steps, after two that are not.
    compiled: whether the peer compiles its model (needs a C++ compiler).

  Returns:
    The record that `benchmarks/peft_peer.py` writes.

  Raises:
    UserError: the peer could not be installed, or failed.
  """
  interpreter = python()
  with tempfile.TemporaryDirectory() as folder:
    work = Path(folder)
    huggingface.save(work / 'base', config, params, dtype='float32')
    arrays: dict[str, Any] = {}
    for i, batch in enumerate(batches):
      arrays |= {
        f'tokens_{i}': batch.tokens_BT,
        f'labels_{i}': batch.labels_BT,
        f'mask_{i}': batch.mask_BT,
      }
    np.savez(work / 'batches.npz', **arrays)
    command = [
      str(interpreter),
      str(Path(__file__).with_name('peft_peer.py')),
      f'--weights={work / "base"}',
      f'--dtype={dtype}',
      f'--targets={",".join(modules)}',
      f'--rank={rank}',
      f'--batches={work / "batches.npz"}',
      f'--steps={steps}',
      f'--out={work / "record.json"}',
      *(['--compile'] if compiled else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
      print(done.stderr, file=sys.stderr)
      raise UserError(f'the PEFT peer ended with exit code {done.returncode}')
    return json.loads((work / 'record.json').read_text())

"""Metrics of a run: as JSON lines always, and to TensorBoard and Weights & Biases when asked.

  check_trackers(['tensorboard'])             # a missing package shows before anything runs
  with open_trackers(out, ['tensorboard', 'wandb'], name='mine', config={...}) as log:
    log({'step': 1, 'loss': 2.3, 'grad_norm': 0.8})
    log({'step': 20, 'eval_loss': 2.1})

TensorBoard's files go to `OUT/tensorboard` and are written by tensorboardX, which needs no
TensorFlow. Weights & Biases reads its own variables: WANDB_MODE=offline keeps a run on
this machine, WANDB_PROJECT and WANDB_ENTITY say where it belongs.
"""

import contextlib
import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from lora_jax.errors import UserError, one_line

# Called with 'step' and the metrics of that step.
Log = Callable[[Mapping[str, float]], None]

# Name on the command line -> the package it needs.
PACKAGES = {'tensorboard': 'tensorboardX', 'wandb': 'wandb'}

_TAGS = {'loss': 'train/loss', 'grad_norm': 'train/grad_norm', 'eval_loss': 'eval/loss'}


def check_trackers(names: Iterable[str]) -> None:
  """Raises `UserError` for a name that is not known or whose package is not installed."""
  for name in names:
    if name not in PACKAGES:
      raise UserError(f'unknown tracker {name!r}; there are {", ".join(PACKAGES)}')
    if importlib.util.find_spec(PACKAGES[name]) is None:
      raise UserError(f'{name} needs a package: pip install {PACKAGES[name]}')


@contextlib.contextmanager
def open_trackers(
  directory: Path, names: Iterable[str], name: str, config: Mapping[str, Any]
) -> Iterator[Log]:
  """Opens all trackers of a run; they are closed, and so complete, at the end of the block.

  Args:
    directory: of the run; made if it is not there.
    names: of `PACKAGES`, from `check_trackers`.
    name: of the run, for Weights & Biases.
    config: its configuration, for the same.

  Yields:
    A function that logs one step's metrics to all of them.

  Raises:
    UserError: the directory cannot be written to, or Weights & Biases refuses.
  """
  opened = {
    'tensorboard': lambda: _tensorboard(directory / 'tensorboard'),
    'wandb': lambda: _wandb(directory, name, config),
  }
  with contextlib.ExitStack() as stack:
    logs = [stack.enter_context(_metrics_file(directory / 'metrics.jsonl'))]
    logs += [stack.enter_context(opened[name]()) for name in names]

    def log(metrics: Mapping[str, float]) -> None:
      for one in logs:
        one(metrics)

    yield log


def json_lines(file: TextIO) -> Log:
  """Logs one JSON object a line; what is not finite is no JSON number and becomes null."""

  def log(metrics: Mapping[str, float]) -> None:
    line = {name: finite(value) for name, value in metrics.items()}
    print(json.dumps(line, allow_nan=False), file=file, flush=True)

  return log


def finite(value: float) -> float | None:
  """The value, or None where it is not finite."""
  return value if math.isfinite(value) else None


@contextlib.contextmanager
def _metrics_file(path: Path) -> Iterator[Log]:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open('w', encoding='utf-8')
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}; give another --out') from error
  with file:
    yield json_lines(file)


@contextlib.contextmanager
def _tensorboard(directory: Path) -> Iterator[Log]:
  # Both packages are imported by name, since neither is needed to run or to check types.
  writer = importlib.import_module(PACKAGES['tensorboard']).SummaryWriter(str(directory))

  def log(metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
      if name != 'step':
        writer.add_scalar(_TAGS.get(name, name), value, int(metrics['step']))

  with contextlib.closing(writer):
    yield log


@contextlib.contextmanager
def _wandb(directory: Path, name: str, config: Mapping[str, Any]) -> Iterator[Log]:
  try:
    wandb = importlib.import_module(PACKAGES['wandb'])
    run = wandb.init(dir=str(directory), name=name, config=dict(config))
  except Exception as error:
    # Its errors share no class with each other across versions.
    raise UserError(
      f'Weights & Biases: {one_line(error):.200}; `wandb login`, or set WANDB_MODE=offline'
    ) from error

  def log(metrics: Mapping[str, float]) -> None:
    named = {_TAGS.get(name, name): value for name, value in metrics.items() if name != 'step'}
    run.log(named, step=int(metrics['step']))

  try:
    yield log
  except BaseException:
    run.finish(exit_code=1)
    raise
  run.finish()

"""A recipe carried out: stage after stage, each going on where it was stopped.

  OUT/recipe.json            all that decides the result, versions, and the device
  OUT/<stage>/metrics.jsonl  loss of every step, and of drawings kept out
  OUT/<stage>/checkpoint-*   how far the stage is
  OUT/curve.png              what was learnt
  OUT/sight.safetensors      the tower and its connector, float16
  OUT/base/                  joined to the language model: what `--base=OUT/base` takes

Every batch is a function of the stage and its number, so that a run which was killed ends with
the numbers of one that was not.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from lora_jax.align import state as states
from lora_jax.align.plot import curve
from lora_jax.align.recipe import Recipe, Stage
from lora_jax.align.work import Batches, Work, finished, watched, work
from lora_jax.drawings import fonts
from lora_jax.errors import UserError
from lora_jax.hub import seeing
from lora_jax.hub.base import Base
from lora_jax.progress import Progress
from lora_jax.records import (
  RunDirectory,
  new_directory,
  read_json,
  write_bytes,
  write_json,
  write_text,
)
from lora_jax.tracking import json_lines
from lora_jax.versions import versions

BASE, SIGHT, RECIPE = 'base', 'sight.safetensors', 'recipe.json'
METRICS = 'metrics.jsonl'

# Updates in a row that may not be finite.
_MOST_BAD = 5
_AHEAD = 4


def run(
  recipe: Recipe,
  base: Base,
  out: Path,
  workers: int = 0,
  stop: Callable[[], bool] = lambda: False,
) -> bool:
  """Does what is left of a recipe.

  Args:
    recipe: the recipe.
    base: its language model.
    out: the run's directory.
    workers: processes that draw; 0: threads of this one.
    stop: asked before each step; where it says so, what was learnt is kept and the run ends.

  Returns:
    Whether it is finished.

  Raises:
    UserError: the base sees already; the directory holds a run of another recipe, is in use or
      cannot be written to; the loss is not finite any more.
  """
  if base.config.vision is not None:
    raise UserError(f'{base.name} sees already; give a base of text alone')
  directory = RunDirectory(out)
  directory.lock()
  _claim(recipe, base, out / RECIPE)
  if (out / BASE).exists():
    return True
  held = None
  for stage in recipe.stages:
    of = work(recipe, stage, base, held)
    state = _train(recipe, stage, of, out / stage.name, workers, stop)
    if state is None:
      return False
    held = jax.tree.map(np.asarray, state.params['sight'])
    write_bytes(out / 'curve.png', curve(metrics(out, recipe)))
  assert held is not None
  seeing.write_sight(out / SIGHT, recipe.vision, recipe.images, finished(base, held))
  # What is joined is what the small file says, so that both are one base.
  with new_directory(out / BASE) as folder:
    seeing.save(folder, seeing.join(base, *seeing.read_sight(out / SIGHT, base.config)))
  return True


def metrics(out: Path, recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
  """What each stage of a run has logged so far."""
  held = {stage.name: out / stage.name / METRICS for stage in recipe.stages}
  return {name: _lines(path) for name, path in held.items() if path.is_file()}


def _claim(recipe: Recipe, base: Base, file: Path) -> None:
  held = json.loads(json.dumps(dataclasses.asdict(recipe)))
  faces = [face.name for face in fonts.FACES]
  record = {'recipe': held, 'base': base.record, 'faces': faces}
  if file.exists():
    before = read_json(file)
    for key, value in record.items():
      if before.get(key) != value:
        raise UserError(
          f'{file} says another {key} than this run has; give another --out or the same settings'
        )
    return
  where = {'backend': jax.default_backend(), 'device': jax.devices()[0].device_kind}
  write_json(file, {**record, 'versions': versions(), **where})


def _train(
  recipe: Recipe,
  stage: Stage,
  of: Work,
  directory: Path,
  workers: int,
  stop: Callable[[], bool],
) -> states.State | None:
  """A stage's state at its end, or None where it was stopped."""
  directory.mkdir(parents=True, exist_ok=True)
  state = states.fresh(recipe, stage, of.fresh)
  if found := states.latest(directory):
    state = states.load(found[1], state)
  start = int(state.step)
  if start >= stage.steps:
    return state
  step = states.make_step(recipe, stage, of.loss)
  look = jax.jit(lambda params, frozen, batch: of.loss(params, frozen, batch)[1])
  sets = watched(stage, of, recipe.seed)
  file = directory / METRICS
  kept = [json.dumps(line) + '\n' for line in _lines(file) if line['step'] <= start]
  write_text(file, ''.join(kept))
  batches = _stream(of.batches(fonts.FACES, recipe.seed), start, stage.steps, workers)
  began, seen = time.perf_counter(), 0
  with (
    file.open('a', encoding='utf-8') as opened,
    Progress(f'{stage.name}, from step {start}', stage.steps - start) as progress,
  ):
    log = json_lines(opened)
    pending = None

    def told() -> None:
      """Reads the metrics of the step before, so that the device never waits for us."""
      if pending is None:
        return
      number, held = pending
      if int(held.pop('bad_in_a_row')) >= _MOST_BAD:
        raise UserError(
          f'{stage.name}: {_MOST_BAD} updates in a row were not finite, up to step {number}; '
          'lower --lr'
        )
      numbers = _ratios([held])
      log({'step': number, 'tiles_per_second': seen / (time.perf_counter() - began), **numbers})
      shown: Any = {name: value for name, value in numbers.items() if math.isfinite(value)}
      progress.advance(**shown)

    for number in range(start + 1, stage.steps + 1):
      if stop():
        told()
        states.save(directory, state)
        return None
      batch = next(batches)
      state, held = step(state, of.frozen, batch)
      told()
      seen += len(batch['pixels'])
      pending = (number, held)
      if number % stage.eval_every == 0 or number == stage.steps:
        told()
        pending = None
        for name, held_out in sets.items():
          found = _ratios([look(state.params, of.frozen, one) for one in held_out])
          log({'step': number, **{f'{name}/{key}': value for key, value in found.items()}})
        states.save(directory, state)
  return state


def _stream(batches: Batches, start: int, end: int, workers: int) -> Iterator[Mapping[str, Any]]:
  """Batches from one number up to another, drawn ahead."""
  dataset = grain.MapDataset.range(start, end).map(batches.__getitem__)
  if not workers:
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_AHEAD)
    return iter(dataset.to_iter_dataset(ahead))
  alone = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
  options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
  return iter(alone.mp_prefetch(options))


def _ratios(held: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Metrics of several batches, each a sum over what it is to be divided by."""
  sums = {name: np.sum([np.asarray(one[name]) for one in held], axis=0) for name in held[0]}
  return {
    name: float(total / count) if count else float('nan') for name, (total, count) in sums.items()
  }


def _lines(file: Path) -> list[dict[str, Any]]:
  """What was logged; the last line of a run that was killed may be cut short."""
  lines = []
  for text in file.read_text(encoding='utf-8').splitlines() if file.is_file() else []:
    try:
      lines.append(json.loads(text))
    except ValueError:
      break
  return lines

"""Ranks target sets from a few training batches, without training.

  python -m experiments.probe
  python -m experiments.probe --datasets=medmcqa,fincot --targets=o_proj --targets=o_proj,fc2
  python -m experiments.probe --data=my.jsonl --metric=exact --out=runs/mine
  python -m experiments.probe --out=runs/quick          # a study's base, rows, adapters and report

Each set is scored by what a first step of training would gain, from one batch to another (as
it is, for its parameters, and for its latency where that is known), and by PLoP's feature
norm; it says how often another draw of batches would have had another set first. Datasets that
--out holds are not probed again. Where --out is a run of `experiments.ablate`, its report is
written anew, and says how well the probe foresaw what was trained.
"""

import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import _data_flags, _flags, _launcher, _lora_flags
from lora_jax.config import METRICS
from lora_jax.errors import UserError
from lora_jax.presets import ARTICLE_TARGETS, PRESETS, Settings

if TYPE_CHECKING:
  from lora_jax.data.sources import Source
  from lora_jax.data.task import Task
  from lora_jax.probe import Prober
  from lora_jax.records import RunDirectory

_TARGETS = flags.DEFINE_multi_string(
  'targets', [], "A set of modules; repeat the flag for more sets. None: the article's eight."
)
_BATCHES = flags.DEFINE_integer('batches', 8, 'Training batches of each dataset.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the order of rows and of A, as in training.')
_OUT = flags.DEFINE_string('out', 'runs/probe', 'Directory of results, or of a study.')
_flags.define_base()
_flags.define_changes(
  'lr', 'lr_ratio', 'tokens_per_batch', 'max_length', 'train_rows', of=PRESETS['quick']
)


def main() -> None:
  """Checks everything that can be checked, then probes dataset after dataset."""
  metric = _data_flags.own_metric()
  _flags.check_seed(_SEED.value)
  # They take seconds to import, and a mistake above should not.
  from lora_jax import lora, ranking
  from lora_jax.hub import bases
  from lora_jax.records import RunDirectory, check_room

  _launcher.imported()
  if _BATCHES.value < ranking.FEWEST_BATCHES:
    raise UserError(
      f'--batches={_BATCHES.value}: give at least {ranking.FEWEST_BATCHES}; fewer do not tell how '
      'sure a ranking is'
    )
  run = RunDirectory(Path(_OUT.value).expanduser())
  check_room(run.path)
  shared = _shared(run)
  cells = run.cells()
  own = dict.fromkeys(record['cell']['targets'] for record in cells)
  targets = tuple(dict.fromkeys(map(lora.canonical, _TARGETS.value)))
  targets = targets or (*ARTICLE_TARGETS, *(t for t in own if t not in ('base', *ARTICLE_TARGETS)))
  _flags.check_targets(targets)
  settings = _settings(run.path, shared)
  bases.check_name(settings.base)
  seen = {record['cell']['dataset']: record['provenance'].get('rows') for record in cells}
  tasks, source, data = _rows(run.path, shared, settings, metric, [*seen])
  held = run.probe() or {'about': None, 'sets': {}, 'datasets': {}}
  cache = _flags.cache()

  base = _flags.load_base(settings.base)
  from lora_jax.probe import Prober

  model, params = _flags.put_on_device(base, settings.train)
  about = _about(settings, base.record, data)
  _check_same(held['about'], about, run.path)
  prober = Prober(settings, base, model, params, source, cache / 'rows')
  sets = {**held['sets'], **prober.sets(targets)}
  tasks = prober.posed(tasks)
  for task in tasks:
    if seen.get(task.name) not in (None, prober.fingerprint(task)):
      raise UserError(f'{run.path} was run on other rows of {task.name}; give another --out')
  run.lock()
  try:
    _probe(run, about, prober, tasks, sets, held['datasets'])
  except KeyboardInterrupt:
    print(f'\nstopped; datasets that are done are in {run.path}', file=sys.stderr)
    sys.exit(130)
  _report(run, run.probe() or held)


def _probe(
  run: 'RunDirectory',
  about: dict[str, Any],
  prober: 'Prober',
  tasks: 'Sequence[Task]',
  sets: dict[str, Any],
  held: dict[str, Any],
) -> None:
  """Probes what is not held, and keeps it dataset by dataset."""
  from lora_jax.versions import versions

  modules = {path for of in sets.values() for path in of['modules']}
  lacks = lambda name: not modules <= {*held[name]['decreases']}
  made_from = {task.name: prober.fingerprint(task) for task in tasks}
  for name, of in held.items():
    if made_from.get(name, of['rows']) != of['rows']:
      raise UserError(f'{run.path} holds a probe of other rows of {name}; give another --out')
    if name not in made_from and lacks(name):
      raise UserError(
        f'{run.path} holds a probe of {name} without some of these modules; add it to --datasets'
      )
  done = dict(held)
  keep = lambda: run.write_probe(
    {'about': about, 'versions': versions(), 'sets': sets, 'datasets': done}
  )
  for task in tasks:
    if task.name not in held or lacks(task.name):
      start = time.perf_counter()
      found = prober.probe(task, sets, _BATCHES.value, _SEED.value)
      done[task.name] = {
        'title': task.title,
        'rows': made_from[task.name],
        'seconds': round(time.perf_counter() - start, 1),
        **found.record(),
      }
      keep()
  # There may be more sets, of modules that were probed before.
  keep()


def _shared(run: 'RunDirectory') -> dict[str, Any] | None:
  """What the cells of the study share that `run` is; None: it is none."""
  from lora_jax.records import read_json

  file = run.path / 'run.json'
  return read_json(file)['shared'] if file.exists() else None


def _settings(path: Path, shared: dict[str, Any] | None) -> Settings:
  """The study's, or those of the flags.

  Raises:
    UserError: flags that a study has settled already.
  """
  if shared is None:
    settings = _flags.changed(PRESETS['quick'])
    return dataclasses.replace(settings, lora=_lora_flags.lora_config(settings.lora))
  try:
    held = Settings.from_record(shared['settings'])
  except (KeyError, TypeError):
    raise UserError(f'{path} is a run of another version; give another --out') from None
  if _flags.given('base') not in (None, held.base):
    raise UserError(
      f'{path} is a run on {held.base}, not {_flags.given("base")}; leave --base out, or give '
      'another --out'
    )
  changed = dataclasses.replace(_flags.changed(held), lora=_lora_flags.lora_config(held.lora))
  # These have values of their own where no flag is given.
  own = {'dtype': held.train.dtype, 'quantize': held.train.quantize}
  if dataclasses.replace(changed, train=dataclasses.replace(changed.train, **own)) != held:
    raise UserError(f'{path} has its own adapters and training; leave their flags out')
  return held


def _rows(
  path: Path, shared: dict[str, Any] | None, settings: Settings, metric: str, datasets: list[str]
) -> 'tuple[tuple[Task, ...], Source, str]':
  """The tasks, their source, and its name in a record; a study's where `shared` is one's.

  Raises:
    UserError: rows that are not the study's.
  """
  if shared is None:
    return _data_flags.chosen(settings, metric)
  held, given = shared['data'], flags.FLAGS['data'].present
  own = re.fullmatch(r'(.+) \((\w+)\)', held)
  if own and own[2] in METRICS and not metric:
    raise UserError(
      f'{path} is a run on rows of a file; give them again: --data={own[1]} --metric={own[2]}'
    )
  names = None if own or not datasets else [*dict.fromkeys(datasets)]
  found = _data_flags.chosen(settings, metric, None if given else held, names)
  if found[2] != held:
    raise UserError(f'{path} is a run on {held}, not {found[2]}; give another --out')
  return found


def _about(settings: Settings, base: dict[str, str], data: str) -> dict[str, Any]:
  import jax

  train = settings.train
  return {
    'base': settings.base,
    'sha256': base['sha256'],
    'dtype': train.dtype,
    'quantize': train.quantize,
    'lora': dataclasses.asdict(settings.lora),
    'learning_rate': settings.optim.learning_rate,
    'lr_ratio': settings.optim.lr_ratio,
    'data': data,
    'tokens_per_batch': train.tokens_per_batch,
    'max_length': train.max_length,
    'train_rows': train.train_rows,
    'batches': _BATCHES.value,
    'seed': _SEED.value,
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
  }


def _check_same(held: dict[str, Any] | None, about: dict[str, Any], out: Path) -> None:
  for key, value in json.loads(json.dumps(about)).items():
    if held is not None and held.get(key) != value:
      raise UserError(
        f'{out} holds a probe with {key}={held.get(key)}, not {value}; give another --out'
      )


def _report(run: 'RunDirectory', held: dict[str, Any]) -> None:
  from lora_jax.report import probe, report

  latency = run.latency()
  print(probe.text(held, latency, shutil.get_terminal_size().columns))
  if any((run.path / 'cells').glob('*.json')):
    print(report.write(run))
    return
  report.save(probe.document(held, latency), run.path, 'probe')
  print(f'probe: {run.path / "probe.html"} and {run.path / "probe.md"}')


if __name__ == '__main__':
  _launcher.run(main)

"""Flags that say which tasks, and where their rows come from.

metric = _data_flags.own_metric()
tasks, source, data = _data_flags.chosen(settings, metric)
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from lora_jax.config import METRICS, SHORT_METRICS
from lora_jax.errors import UserError
from lora_jax.presets import SYNTHETIC_TEST, SYNTHETIC_TRAIN, Settings

if TYPE_CHECKING:
  from collections.abc import Sequence

  from lora_jax.data.sources import Source
  from lora_jax.data.task import Task

DATASETS = flags.DEFINE_list('datasets', None, 'Datasets; all seven if not given.')
DATA = flags.DEFINE_string(
  'data',
  'synthetic',
  "Where rows come from: 'synthetic', 'hub', a directory, or a file of your own (.jsonl).",
)
_METRIC = flags.DEFINE_enum(
  'metric', None, [*METRICS, *SHORT_METRICS], 'How answers to rows of your own are compared.'
)
_TEST_DATA = flags.DEFINE_string(
  'test_data', None, 'File of your own rows to test on; a fifth of --data if not given.'
)
_CHOICES = flags.DEFINE_list(
  'choices', [], 'For --metric=choice: what to choose from; the answers in the file if not given.'
)


def own_metric() -> str:
  """How --data is compared where it is a file of the user's own rows; '' where it is not.

  Raises:
    UserError: a flag that goes with such a file is missing, or is given without one.
  """
  data = DATA.value
  own, metric = data.endswith('.jsonl') or Path(data).expanduser().is_file(), _METRIC.value or ''
  if own and not metric:
    names = ', '.join(sorted({*METRICS, *SHORT_METRICS} - {*SHORT_METRICS.values()}))
    raise UserError(f'--data={data}: say by --metric how answers are compared: {names}')
  if own and DATASETS.value is not None:
    raise UserError(f'--datasets: {data} is a task of its own; leave one of the two out')
  for flag in (_METRIC, _TEST_DATA, _CHOICES):
    if flag.value and not own:
      raise UserError(f'--{flag.name} is for rows of your own; give them by --data=FILE.jsonl')
  if _CHOICES.value and metric != 'choice':
    raise UserError('--choices is for --metric=choice')
  return SHORT_METRICS.get(metric, metric)


def chosen(
  settings: Settings, metric: str, data: str | None = None, names: 'Sequence[str] | None' = None
) -> 'tuple[tuple[Task, ...], Source, str]':
  """The tasks, where their rows come from, and what a run's record says of that.

  Args:
    settings: how many rows are generated.
    metric: from `own_metric`.
    data: where rows come from; None: as --data says.
    names: datasets where --datasets is not given; None: all.

  Raises:
    UserError: there are no such rows, before anything is prepared.
  """
  from lora_jax.data import own_rows, sources, tasks

  if metric:
    test = None if _TEST_DATA.value is None else Path(_TEST_DATA.value).expanduser()
    own = own_rows.read(Path(DATA.value).expanduser(), test)
    return (own_rows.make(own, metric, _CHOICES.value),), own, f'{own.path.resolve()} ({metric})'
  wanted = tasks.TASKS if names is None else names
  found = tasks.by_names(wanted if DATASETS.value is None else DATASETS.value)
  source = _source(settings, DATA.value if data is None else data)
  for task in found:
    source.check(task)
  told = str(source.path.resolve()) if isinstance(source, sources.Directory) else source.kind
  return found, source, told


def _source(settings: Settings, data: str) -> 'Source':
  from lora_jax.data import sources

  if data == 'synthetic':
    train = settings.train.train_rows or SYNTHETIC_TRAIN
    return sources.Synthetic(seed=0, train=train, test=settings.eval.test_rows or SYNTHETIC_TEST)
  if data == 'hub':
    return sources.Hub()
  return sources.Directory(Path(data).expanduser())

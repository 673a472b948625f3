"""Scores a base on your own JSON lines, and an adapter beside it, unmerged.

  python -m experiments.evaluate --data=test.jsonl
  python -m experiments.evaluate --data=test.jsonl --adapter=mine --metric=exact_match --out=scores

The loss of the answers is taken always; with --metric the last answer of each row is
predicted and compared too. Differences are paired by row. `--adapter` is what
`experiments.train` left, a cell's .adapter, or a directory in PEFT's format.
"""

import math
from pathlib import Path

from absl import flags

from experiments import _flags, _launcher
from lora_jax.config import METRICS, SHORT_METRICS, FileConfig
from lora_jax.errors import UserError
from lora_jax.presets import Settings

_DATA = flags.DEFINE_string('data', None, 'The file of rows.')
_ADAPTER = flags.DEFINE_string('adapter', None, 'Directory of an adapter; none: the base alone.')
_METRIC = flags.DEFINE_enum(
  'metric', 'none', ['none', *METRICS, *SHORT_METRICS], 'How predictions are compared.'
)
_CHOICES = flags.DEFINE_list(
  'choices', [], "For --metric=choice: the answers to choose from, where rows have no 'choices'."
)
_LAST_ONLY = flags.DEFINE_bool(
  'last_only', FileConfig().last_only, 'Take the loss of the last answer of each row alone.'
)
_OUT = flags.DEFINE_string('out', None, 'Directory for predictions.jsonl and scores.json.')
_flags.define_base(Settings().base)
_flags.define_mesh()
_flags.define_changes('max_length', 'max_new_tokens', 'batch_rows', of=Settings())


def main() -> None:
  """Checks everything that can be checked, then scores."""
  if not _DATA.value:
    raise UserError('give --data=FILE.jsonl')
  # They take seconds to import, and a mistake above should not.
  from lora_jax import file_scores, records
  from lora_jax.data import messages, own_task
  from lora_jax.hub import adapters, bases

  _launcher.imported()
  _flags.set_mesh()
  settings = _flags.changed(Settings())
  out = Path(_OUT.value).expanduser() if _OUT.value else None
  if out is not None:
    records.check_room(out)
  bases.check_name(settings.base)
  directory = Path(_ADAPTER.value).expanduser() if _ADAPTER.value else None
  if directory is not None:
    adapters.check(directory)
  data = messages.read(Path(_DATA.value).expanduser())
  task, metric = None, SHORT_METRICS.get(_METRIC.value, _METRIC.value)
  if metric != 'none':
    task = own_task.make(data, metric, _CHOICES.value)
  base = _flags.load_base(settings.base)
  length = min(settings.train.max_length, base.config.max_length)
  generates = task is not None and task.choices is None
  new = min(settings.eval.max_new_tokens, length // 2) if generates else 1
  rows = file_scores.encode_rows(data, base.tokenizer, length, new, _LAST_ONLY.value)
  if not rows.conversations:
    raise UserError(f'{_DATA.value}: no row fits in {length} tokens; raise --max_length')
  adapter = None if directory is None else adapters.load(directory, base)
  model, params = _flags.put_on_device(base, settings.train)
  take = lambda params, what: file_scores.score(
    model, params, rows, base.tokenizer, task, settings.eval.batch_rows, what
  )
  of_base = take(params, 'base')
  of_adapter = None
  if adapter is not None:
    of_adapter = take(adapters.attach(params, adapter), 'adapter')
  lines = file_scores.compare(of_base, of_adapter)
  print(_table(lines))
  print(_about(rows))
  if out is not None:
    from lora_jax.file_records import write

    about = {'data': _DATA.value, 'adapter': _ADAPTER.value or '', 'metric': metric}
    write(out, about, base, rows, of_base, of_adapter, lines)
    print(f'predictions and scores: {out}')


def _table(lines) -> str:
  from lora_jax.report.tables import markdown

  paired = lines[0].adapter is not None
  table = []
  for line in lines:
    loss = line.name == 'loss'
    cells = [line.base, line.adapter, line.difference] if paired else [line.base]
    shown = [_number(value, 3 if loss else 1, i == 2) for i, value in enumerate(cells)]
    table.append(['loss, nats a token' if loss else line.name, *shown])
    if loss:
      means = [value[0] for value in cells[:2]]
      table.append(['perplexity', *(_perplexity(mean) for mean in means), *['-'] * paired])
  return markdown(['', 'base', *(['adapter', 'difference'] if paired else [])], table)


def _number(value: tuple[float, float | None], decimals: int, signed: bool) -> str:
  mean, se = value
  # 'z': what rounds to zero has no sign to show.
  text = f'{mean:+z.{decimals}f}' if signed else f'{mean:.{decimals}f}'
  return text if se is None else f'{text} ± {se:.{decimals}f}'


def _perplexity(loss: float) -> str:
  return f'{math.exp(loss):.2f}' if loss < 50 else 'more than 1e21'


def _about(rows) -> str:
  text = f'{len(rows.conversations)} rows'
  if rows.left_out:
    text += f', {rows.left_out} left out as too long (--max_length)'
  return f'{text}; ± standard error over rows, of the difference paired by row'


if __name__ == '__main__':
  _launcher.run(main)

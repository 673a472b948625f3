r"""Trains a LoRA adapter on your own JSON lines.

  python -m experiments.train --data=my.jsonl --out=mine
  python -m experiments.train --data=my.jsonl --base=model.gguf --targets=qkv,o_proj --rank=8 \
    --epochs=2 --eval_every=10 --patience=3 --track=tensorboard --out=mine

A line is {"messages": [{"role", "content"}, ...]} or {"prompt": ..., "completion": ...};
the assistant's answers are learned. Some rows are for validation, and the adapter of the
lowest loss on them is written to OUT/adapter in PEFT's format, which `experiments.evaluate`,
`.merge`, `.chat`, PEFT and servers read. Ctrl-C keeps the best so far.
"""

import dataclasses
import math
import sys
from pathlib import Path

from absl import flags

from experiments import _flags, _launcher, _lora_flags
from lora_jax.config import FileConfig
from lora_jax.errors import UserError
from lora_jax.presets import OWN_ROWS
from lora_jax.tracking import PACKAGES, check_trackers

_ROWS = FileConfig()

_DATA = flags.DEFINE_string('data', None, 'The file of rows to learn.')
_EVAL_DATA = flags.DEFINE_string('eval_data', None, 'A file of validation rows.')
_EVAL_SHARE = flags.DEFINE_float(
  'eval_share', _ROWS.eval_share, 'Without --eval_data: share of the rows that is for validation.'
)
_LAST_ONLY = flags.DEFINE_bool(
  'last_only', _ROWS.last_only, 'Learn the last answer of each row alone.'
)
_EPOCHS = flags.DEFINE_float('epochs', _ROWS.epochs, 'Passes over the rows; --steps goes before.')
_TARGETS = flags.DEFINE_string('targets', 'o_proj,fc2', 'Modules to adapt, joined by commas.')
_SEED = flags.DEFINE_integer(
  'seed', 0, 'Of the adapter, the order of rows and the validation rows.'
)
_OUT = flags.DEFINE_string('out', None, 'Directory to write.')
_TRACK = flags.DEFINE_list('track', [], f'Where metrics go too: {", ".join(PACKAGES)}.')
_flags.define_base()
_flags.define_mesh()
_flags.define_changes(
  'steps', 'lr', 'lr_ratio', 'tokens_per_batch', 'positions', 'max_length', 'eval_every',
  'patience', 'keep_best', 'remat', of=OWN_ROWS,
)  # fmt: skip


def main() -> None:
  """Checks everything that can be checked, then trains and writes."""
  if not _DATA.value or not _OUT.value:
    raise UserError('give --data=FILE.jsonl and --out=DIRECTORY')
  rows_config = _file_config()
  _flags.check_seed(_SEED.value)
  check_trackers(_TRACK.value)
  settings = dataclasses.replace(OWN_ROWS, lora=_lora_flags.lora_config(OWN_ROWS.lora))
  settings = _flags.changed(settings)
  # They take seconds to import, and a mistake above should not.
  from lora_jax import finetune, records
  from lora_jax.data import messages
  from lora_jax.hub import bases
  from lora_jax.train import DivergedError

  _launcher.imported()
  _flags.set_mesh()
  out = Path(_OUT.value).expanduser()
  records.check_new(out / finetune.ADAPTER)
  _flags.check_targets([_TARGETS.value])
  bases.check_name(settings.base)
  data = messages.read(Path(_DATA.value).expanduser())
  eval_data = messages.read(Path(_EVAL_DATA.value).expanduser()) if _EVAL_DATA.value else []
  job = finetune.Job(
    base=settings.base,
    targets=_TARGETS.value,
    data=_DATA.value,
    eval_data=_EVAL_DATA.value or '',
    seed=_SEED.value,
    lora=settings.lora,
    optim=settings.optim,
    train=settings.train,
    file=rows_config,
  )
  base = _flags.load_base(settings.base)
  rows = finetune.prepare(job, data, eval_data, base)
  for note in rows.notes:
    print(note, file=sys.stderr)
  print(
    f'{len(rows.train)} rows to learn, {len(rows.watched)} for validation, {rows.steps} steps of '
    f'{rows.shape.rows} x {rows.shape.length} tokens',
    file=sys.stderr,
  )
  if settings.train.patience and not rows.watched:
    print('there are no validation rows, so --patience changes nothing', file=sys.stderr)
  model, params = _flags.put_on_device(base, settings.train)
  with _launcher.stop_on_interrupt('stopping after this step') as stop:
    try:
      outcome = finetune.run(job, base, model, params, rows, out, _TRACK.value, stop)
    except DivergedError as error:
      raise UserError(f'{error}; lower --lr, or look at the rows') from error
  _report(outcome, out / finetune.ADAPTER)
  if outcome.stopped == 'interrupted':
    sys.exit(130)


def _file_config() -> FileConfig:
  if not (_EPOCHS.value > 0 and math.isfinite(_EPOCHS.value)):
    raise UserError(f'--epochs={_EPOCHS.value}: give a number above zero')
  if not 0 <= _EVAL_SHARE.value < 1:
    raise UserError(f'--eval_share={_EVAL_SHARE.value}: give a share from zero to below 1')
  return dataclasses.replace(
    _ROWS, epochs=_EPOCHS.value, eval_share=_EVAL_SHARE.value, last_only=_LAST_ONLY.value
  )


def _report(outcome, adapter: Path) -> None:
  reasons = {
    'patience': 'stopped early: the validation loss fell no more',
    'interrupted': 'stopped',
    'diverged': 'stopped: updates were not finite any more',
  }
  if outcome.stopped in reasons:
    print(f'{reasons[outcome.stopped]}, after step {len(outcome.losses)}', file=sys.stderr)
  if not outcome.kept_step:
    print('no step was finished, so there is no adapter', file=sys.stderr)
    return
  watched = dict(outcome.eval_losses)
  line = f'step {outcome.kept_step} is kept'
  if outcome.kept_step in watched:
    best = 'the best, ' if watched[outcome.kept_step] == min(watched.values()) else ''
    line += f': {best}validation loss {watched[outcome.kept_step]:.4f}'
    if 0 in watched:
      line += f', base {watched[0]:.4f}'
  elif not watched:
    line += ', the last: there are no validation rows'
  print(line)
  if 0 in watched and watched.get(outcome.kept_step, 0.0) >= watched[0]:
    print('no adapter had a lower validation loss than the base', file=sys.stderr)
  print(f'adapter: {adapter}')


if __name__ == '__main__':
  _launcher.run(main)

"""Times unmerged adapters beside the base and beside merged, in batches.

  python -m experiments.latency --targets=o_proj --targets=o_proj,fc2
  python -m experiments.latency --rows=1,8,32 --adapters=1,8 --out=runs/latency
  python -m experiments.latency --out=runs/quick        # a study's base, adapters and report

Each batch of --rows is timed with as many different adapters as --adapters says. Everything
takes turns within one process, and ratios are taken within a turn. Batches that --out holds
are not timed again. Where --out is a run of `experiments.ablate`, its base, arithmetic and
adapters are taken, and its report is written anew with these times in it.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments import _flags, _launcher, _lora_flags
from lora_jax.config import LoraConfig
from lora_jax.errors import UserError
from lora_jax.presets import ARTICLE_TARGETS, Settings

_TARGETS = flags.DEFINE_multi_string(
  'targets', [], "A set of modules; repeat the flag for more sets. None: the article's eight."
)
_ROWS = flags.DEFINE_list('rows', ['1', '8', '32'], 'Prompts in a batch.')
_ADAPTERS = flags.DEFINE_list('adapters', ['1', '8'], 'Different adapters that they have.')
_PROMPT = flags.DEFINE_integer('prompt_tokens', 256, 'Tokens of each prompt.')
_TURNS = flags.DEFINE_integer('turns', 10, 'How often each is timed, after once to warm up.')
_OUT = flags.DEFINE_string('out', 'runs/latency', 'Directory of results, or of a study.')
_flags.define_base()


def main() -> None:
  """Checks everything that can be checked, then times batch after batch."""
  for flag in (_PROMPT, _TURNS):
    if flag.value < 1:
      raise UserError(f'--{flag.name}={flag.value}: give a number above zero')
  # They take seconds to import, and a mistake above should not.
  from lora_jax import batch, lora
  from lora_jax.hub import bases
  from lora_jax.records import RunDirectory, check_room

  _launcher.imported()
  wanted = batch.batches(_numbers(_ROWS), _numbers(_ADAPTERS))
  targets = tuple(dict.fromkeys(map(lora.canonical, _TARGETS.value))) or ARTICLE_TARGETS
  _flags.check_targets(targets)
  run = RunDirectory(Path(_OUT.value).expanduser())
  check_room(run.path)
  settings = _settings(run)
  bases.check_name(settings.base)
  held = run.batches() or {'about': None, 'batches': []}

  base = _flags.load_base(settings.base)
  room = base.config.max_length
  if _PROMPT.value + 8 > room:
    raise UserError(f'--prompt_tokens={_PROMPT.value}: {base.name} has room for {room - 8}')
  model, params = _flags.put_on_device(base, settings.train)
  about = _about(settings, base.record)
  _check_same(held['about'], about, run.path)
  # Times that do not say on which processor they were taken are not given this one.
  about = held['about'] or about
  sets = {name: (lora.resolve(name, params), settings.lora) for name in targets}

  from lora_jax import batch_latency

  run.lock()
  done = {batch.Batch(b['rows'], b['adapters']): b for b in held['batches']}
  try:
    for one in wanted:
      if one not in done or not {*targets} <= {*done[one]['times']}:
        times = batch_latency.measure(model, params, sets, one, _TURNS.value, _PROMPT.value)
        done[one] = {'rows': one.rows, 'adapters': one.adapters, 'times': times}
        run.write_batches(about, [done[key] for key in sorted(done)])
  except KeyboardInterrupt:
    print(f'\nstopped; finished batches are in {run.path}', file=sys.stderr)
    sys.exit(130)
  _report(run)


def _numbers(flag: flags.FlagHolder[list[str]]) -> list[int]:
  try:
    return [int(number) for number in flag.value]
  except ValueError:
    given = ','.join(flag.value)
    raise UserError(f'--{flag.name}={given}: give whole numbers, as 1,8') from None


def _settings(run: Any) -> Settings:
  """The study's that `run` is, or those of the flags.

  Raises:
    UserError: flags that a study has settled already.
  """
  from lora_jax.records import read_json

  file = run.path / 'run.json'
  if not file.exists():
    settings = _flags.changed(Settings())
    return dataclasses.replace(settings, lora=_lora_flags.lora_config(settings.lora))
  held = read_json(file)['shared']['settings']
  given = _flags.given('base')
  if given not in (None, held['base']):
    raise UserError(
      f'{run.path} is a run on {held["base"]}, not {given}; leave --base out, or give another --out'
    )
  adapters = LoraConfig.from_record(held['lora'])
  if _lora_flags.lora_config(adapters) != adapters:
    raise UserError(f'{run.path} has its own adapters; leave their flags out')
  train = dataclasses.replace(
    Settings().train, dtype=held['train']['dtype'], quantize=held['train']['quantize']
  )
  return Settings(base=held['base'], lora=adapters, train=train)


def _about(settings: Settings, base: dict[str, str]) -> dict[str, Any]:
  import jax

  from lora_jax.versions import device

  return {
    'base': settings.base,
    'sha256': base['sha256'],
    'dtype': settings.train.dtype,
    'quantize': settings.train.quantize,
    'rank': settings.lora.rank,
    'lora': dataclasses.asdict(settings.lora),
    'prompt_tokens': _PROMPT.value,
    'turns': _TURNS.value,
    **device(),
    'jax': jax.__version__,
  }


def _check_same(held: dict[str, Any] | None, about: dict[str, Any], out: Path) -> None:
  for key, value in json.loads(json.dumps(about)).items():
    if held is not None and held.get(key) != value and (key in held or key != 'processor'):
      raise UserError(
        f'{out} holds times with {key}={held.get(key)}, not {value}; give another --out'
      )


def _report(run: Any) -> None:
  from lora_jax.report import batches, report

  held = run.batches()
  print(batches.text(held))
  if any((run.path / 'cells').glob('*.json')):
    print(report.write(run))
    return
  report.save(batches.document(held), run.path, 'latency')
  print(f'latency: {run.path / "latency.html"} and {run.path / "latency.md"}')


if __name__ == '__main__':
  _launcher.run(main)

"""Writes a trained adapter in PEFT's format, for PEFT and for servers.

  python -m experiments.export --adapter=runs/quick/cells/CELL.adapter --out=adapter

`--adapter` is what a finished cell of `experiments.ablate` left. In Python on the other
side: `peft.PeftModel.from_pretrained(model, 'adapter')`.
"""

from pathlib import Path

from absl import flags

from experiments import _launcher
from lora_jax.errors import UserError

_ADAPTER = flags.DEFINE_string('adapter', None, 'The .adapter directory of a finished cell.')
_OUT = flags.DEFINE_string('out', None, 'Directory to write.')
_BAKE_SCALE = flags.DEFINE_bool(
  'bake_scale', False, 'Multiply B by alpha / rank, for servers that read no alpha.'
)


def main() -> None:
  """Reads the cell's record and adapter, and writes them anew."""
  if not _ADAPTER.value or not _OUT.value:
    raise UserError('give --adapter=RUN/cells/CELL.adapter and --out=DIRECTORY')
  # They take seconds to import, and a mistake above should not.
  from lora_jax import checkpoint, lora, records
  from lora_jax.hub import peft

  _launcher.imported()
  directory, out = Path(_ADAPTER.value).expanduser(), Path(_OUT.value).expanduser()
  record_file = directory.with_suffix('.json')
  if directory.suffix != '.adapter' or not directory.is_dir():
    raise UserError(f'no adapter in {directory}; give the .adapter directory of a finished cell')
  if not record_file.is_file():
    raise UserError(f'no {record_file}; the cell did not finish, run the ablation again')
  record = records.read_record(record_file)
  settings = record['settings']['lora']
  hub_id = record['base'].get('hub_id', '')
  tree = checkpoint.load(directory)
  adapter = peft.uniform(tree, settings['rank'], settings['alpha'], base=hub_id)
  peft.save(out, adapter, bake_scale=_BAKE_SCALE.value)
  print(f'{lora.summarise(tree)}, rank {settings["rank"]}, alpha {settings["alpha"]:g}')
  print(f'base {hub_id or record["base"]["name"]}: trained on {record["base"]["weights"]}')
  if _BAKE_SCALE.value:
    print('the scale is multiplied into B, and alpha is the rank')
  print(f'adapter: {out}')


if __name__ == '__main__':
  _launcher.run(main)

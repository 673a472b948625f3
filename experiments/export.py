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
  from lora_jax import lora, records
  from lora_jax.hub import adapters, bases, peft

  _launcher.imported()
  directory, out = Path(_ADAPTER.value).expanduser(), Path(_OUT.value).expanduser()
  adapters.check(directory)
  records.check_new(out)
  if adapters.is_cell(directory):
    adapter = adapters.of_cell(directory)
  else:
    bases.check_name(_flags.given('base'))
    adapter = adapters.load(directory, _flags.load_base(_flags.given('base')))
  with records.new_directory(out) as temporary:
    peft.save(temporary, adapter, _BAKE_SCALE.value)
  print(lora.summarise(adapter.params, adapter.ranks))
  print(f'base {adapter.base or "without a name on the hub"}')
  if _BAKE_SCALE.value:
    print('the scale is multiplied into B, and alpha is the rank')
  print(f'adapter: {out}')


if __name__ == '__main__':
  _launcher.run(main)

"""Writes an adapter in PEFT's format, for PEFT and for servers.

  python -m experiments.export --adapter=runs/quick/cells/CELL.adapter --out=adapter
  python -m experiments.export --adapter=mine --bake_scale --out=adapter

`--adapter` is what a finished cell of `experiments.ablate` left, or what is in the format
already, as `experiments.train` leaves it, and is written anew; for the latter --base says
for which base it is. In Python on the other side:
`peft.PeftModel.from_pretrained(model, 'adapter')`.
"""

from pathlib import Path

from absl import flags

from experiments import _flags, _launcher
from lora_jax.errors import UserError
from lora_jax.presets import Settings

_ADAPTER = flags.DEFINE_string('adapter', None, 'Directory of an adapter.')
_OUT = flags.DEFINE_string('out', None, 'Directory to write.')
_BAKE_SCALE = flags.DEFINE_bool(
  'bake_scale', False, 'Multiply B by its scale, for servers that read no alpha or no patterns.'
)
_flags.define_base(Settings().base, arithmetic=False)


def main() -> None:
  """Reads the adapter, and writes it anew."""
  if not _ADAPTER.value or not _OUT.value:
    raise UserError('give --adapter=DIRECTORY and --out=DIRECTORY')
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

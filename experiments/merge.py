"""Adds an adapter into its base and writes the sum as a Hugging Face checkpoint.

  python -m experiments.merge --adapter=mine --out=merged
  python -m experiments.merge --base=model.gguf --adapter=mine --dtype=float32 --out=merged

The sum is taken in float32 and rounded once, to --dtype; how far that moves the logits is
measured and said. The directory has a tokenizer and chat template, and loads in
transformers and in servers.
"""

from pathlib import Path

from absl import flags

from experiments import _flags, _launcher
from lora_jax.config import CHECKPOINT_DTYPES
from lora_jax.errors import UserError
from lora_jax.presets import Settings

_ADAPTER = flags.DEFINE_string('adapter', None, 'Directory of an adapter.')
_OUT = flags.DEFINE_string('out', None, 'Directory to write.')
_DTYPE = flags.DEFINE_enum(
  'dtype', 'bfloat16', CHECKPOINT_DTYPES, 'Of the weights that are written.'
)
_flags.define_base(Settings().base, arithmetic=False)


def main() -> None:
  """Checks everything that can be checked, then merges, measures and writes."""
  if not _ADAPTER.value or not _OUT.value:
    raise UserError('give --adapter=DIRECTORY and --out=DIRECTORY')
  # They take seconds to import, and a mistake above should not.
  from lora_jax import merging, records
  from lora_jax.hub import adapters, bases

  _launcher.imported()
  out = Path(_OUT.value).expanduser()
  records.check_new(out)
  name = _flags.given('base')
  bases.check_name(name)
  directory = Path(_ADAPTER.value).expanduser()
  adapters.check(directory)
  base = _flags.load_base(name)
  adapter = adapters.load(directory, base)
  params = merging.merge(base, adapter)
  change = merging.rounding(base, adapter, params, _DTYPE.value)
  merging.save(out, base, params, _DTYPE.value, merging.checkpoint_of(name))
  print(
    f'largest change of a logit, over {change.tokens} tokens of logits up to {change.largest:.3g}:'
  )
  print(f'  by merging, in float32     {change.merging:.2g}')
  print(f'  by the cast to {_DTYPE.value:<11} {change.casting:.2g}')
  print(f'  together                   {change.together:.2g}')
  print(f'another token is the likeliest after {change.other_choices} of them')
  print(f'checkpoint: {out}')


if __name__ == '__main__':
  _launcher.run(main)

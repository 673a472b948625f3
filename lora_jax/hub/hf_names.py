"""Names of modules in Hugging Face's models, where layers are apart, and paths of ours.

>>> name_of('layers/attn/q_proj', 3)
'layers.3.self_attn.q_proj'
>>> path_of('norm')
('norm', None)

The model's own prefix, `model.`, is left to who needs it.
"""

import re

# Our block -> the Hugging Face name of the module that holds its Dense layers.
_BLOCKS = {'attn': 'self_attn'}


def name_of(path: str, layer: int | None) -> str:
  """The name of a module of ours; `layer` is None for one outside the blocks."""
  first, *rest = path.split('/')
  if layer is None:
    return '.'.join([first, *rest])
  return '.'.join([first, str(layer), *(_BLOCKS.get(part, part) for part in rest)])


def path_of(name: str) -> tuple[str, int | None]:
  """The inverse of `name_of`; a name that is none of ours gives a path that no base has."""
  match = re.fullmatch(r'layers\.(\d+)\.(.+)', name)
  if match is None:
    return name, None
  ours = {theirs: block for block, theirs in _BLOCKS.items()}
  parts = [ours.get(part, part) for part in match[2].split('.')]
  return '/'.join(['layers', *parts]), int(match[1])

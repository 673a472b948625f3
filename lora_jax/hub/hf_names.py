"""Names of modules in Hugging Face's models, where layers are apart, and paths of ours.

>>> name_of('layers/attn/q_proj', 3)
'layers.3.self_attn.q_proj'
>>> name_of('vision/layers/attn/q_proj', 3)
'vision_model.encoder.layers.3.self_attn.q_proj'
>>> path_of('norm')
('norm', None)

>>> full_name('layers/attn/q_proj', 3, sees=True)
'model.text_model.layers.3.self_attn.q_proj'
"""

import re

# Stacks of modules of ours that adapters can sit on -> where Hugging Face has their layers;
# a stack of one has no number there.
_STACKS = {
  'layers/': 'layers.{}.',
  'vision/layers/': 'vision_model.encoder.layers.{}.',
  'connector/': 'connector.',
}
# Modules outside of them whose names are not ours.
_ALONE = {
  'vision/patch_embedding': 'vision_model.embeddings.patch_embedding',
  'vision/position_embedding': 'vision_model.embeddings.position_embedding',
  'vision/post_layernorm': 'vision_model.post_layernorm',
}
# Our block -> the Hugging Face name of the module that holds its Dense layers.
_BLOCKS = {'attn': 'self_attn'}


def is_stacked(path: str) -> bool:
  """Whether a module or leaf of ours leads with an axis of layers."""
  return path.startswith((*_STACKS,))


def name_of(path: str, layer: int | None) -> str:
  """The name of a module of ours; `layer` is None for one outside the stacks."""
  if layer is None:
    return _ALONE.get(path, path.replace('/', '.'))
  stack = next(stack for stack in _STACKS if path.startswith(stack))
  rest = [_BLOCKS.get(part, part) for part in path.removeprefix(stack).split('/')]
  return _STACKS[stack].format(layer) + '.'.join(rest)


def full_name(path: str, layer: int | None, sees: bool) -> str:
  """The name in a whole model: of text alone, or of one that sees and keeps its text apart."""
  if path == 'lm_head':
    return path
  apart = sees and path.split('/')[0] not in ('vision', 'connector')
  return f'model.{"text_model." if apart else ""}{name_of(path, layer)}'


def path_of(name: str) -> tuple[str, int | None]:
  """The inverse of `name_of`; a name that is none of ours gives a path that no base has."""
  ours = {theirs: block for block, theirs in _BLOCKS.items()}
  for stack, theirs in _STACKS.items():
    pattern = re.escape(theirs).replace(r'\{\}', r'(\d+)') + '(.+)'
    if match := re.fullmatch(pattern, name):
      *layer, rest = match.groups()
      parts = [ours.get(part, part) for part in rest.split('.')]
      return stack + '/'.join(parts), int(layer[0]) if layer else 0
  return {theirs: path for path, theirs in _ALONE.items()}.get(name, name), None

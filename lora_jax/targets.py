"""Names of modules: what a user calls them, and which paths of the tree that means."""

import re
from collections.abc import Mapping
from typing import Any

from lora_jax.errors import UserError

# The article's names for sets of modules, in the order of a block.
GROUPS = {
  'qkv': ('q_proj', 'k_proj', 'v_proj'),
  'o_proj': ('o_proj',),
  'fc1': ('gate_proj', 'up_proj'),
  'fc2': ('down_proj',),
}
# Modules that can share one A, as servers that join their kernels have it.
FUSED = {'qkv_proj': GROUPS['qkv'], 'gate_up_proj': GROUPS['fc1']}
GROUPS['all'] = tuple(name for names in tuple(GROUPS.values()) for name in names)


# What a model sees with. It is meant where a path says so, and never by a name alone.
_SIGHT = ('vision/layers/', 'connector/')


def language(params: Mapping[str, Any]) -> tuple[str, ...]:
  """Paths of the Dense modules in the blocks of the language model."""
  return _dense(params, 'layers/')


def targetable(params: Mapping[str, Any]) -> tuple[str, ...]:
  """Paths of the modules that an adapter can sit on, the language model's first."""
  return language(params) + _dense(params, *_SIGHT)


def _dense(params: Mapping[str, Any], *stacks: str) -> tuple[str, ...]:
  from flax.traverse_util import flatten_dict  # who only names modules does without

  return tuple(
    path.removesuffix('/kernel')
    for path in flatten_dict(params, sep='/')
    if path.startswith(stacks) and path.endswith('/kernel')
  )


def is_sight(path: str) -> bool:
  """Whether a module or leaf is of what a model sees with, and not of its language model."""
  return path.split('/')[0] in ('vision', 'connector')


def parts(path: str) -> tuple[str, ...]:
  """Paths of the kernels that a module stands for: its own, or those of a fused one."""
  parent, name = path.rsplit('/', 1)
  return tuple(f'{parent}/{part}' for part in FUSED.get(name, (name,)))


def fused(path: str) -> str | None:
  """Path of the fused module that a kernel's module can be a part of."""
  parent, name = path.rsplit('/', 1)
  return next((f'{parent}/{whole}' for whole in FUSED if name in FUSED[whole]), None)


def label(path: str) -> str:
  """A short name for people: the module's, or `input_layernorm/scale` of what is no module."""
  if is_sight(path):
    return path
  *_, parent, name = ['', *path.split('/')]
  return f'{parent}/{name}' if name in ('scale', 'bias') else name


def resolve(targets: str, params: Mapping[str, Any]) -> tuple[str, ...]:
  """Finds the modules that a set of targets names.

  Args:
    targets: comma-joined names; each an article's target (`qkv`, `o_proj`, `fc1`,
      `fc2`, `all`), a module's name (`gate_proj`), a fused one (`qkv_proj`,
      `gate_up_proj`: one A for all its parts) or a regular expression that matches a
      module's whole path (`layers/attn/.*`), itself without a comma. Of a model that sees,
      names are those of its language model; paths reach the rest (`vision/layers/.*`).
    params: the model's parameters, or their shapes.

  Returns:
    Paths in the order of the tree, each once, fused ones after the others.

  Raises:
    UserError: a name matches no module, or a module would have two adapters.
  """
  paths = targetable(params)
  wholes = dict.fromkeys(filter(None, map(fused, language(params))))
  wholes = [whole for whole in wholes if set(parts(whole)) <= {*paths}]
  chosen = set()
  for target in split(targets):
    found = {whole for whole in wholes if target == whole.rsplit('/', 1)[-1]}
    found = found or {path for path in paths if matches(target, path)}
    if not found:
      modules = ', '.join(label(path) for path in [*paths, *wholes])
      raise UserError(
        f'target {target!r} matches no module; targets are {", ".join(GROUPS)}; modules are '
        f'{modules}; or a regular expression on a path such as {paths[0]}'
      )
    chosen |= found
  for whole in chosen & {*wholes}:
    twice = chosen.intersection(parts(whole))
    if twice:
      raise UserError(f'{targets!r} adapts {min(twice)} twice, since {whole} holds it too')
  return tuple(path for path in [*paths, *wholes] if path in chosen)


def matches(pattern: str, path: str, layer: int | None = None) -> bool:
  """Whether a pattern names a module: by name, by group, or by its whole path.

  Names and groups are of the language model alone.

  Args:
    pattern: a module's name, an article's target, or a regular expression.
    path: of the module, `layers/attn/o_proj`.
    layer: which of its layers is meant; the path `layers/3/attn/o_proj` then counts too.
  """
  name = path.rsplit('/', 1)[-1]
  named = pattern == name or {*FUSED.get(name, (name,))} <= {*GROUPS.get(pattern, ())}
  if named and not is_sight(path):
    return True
  spelled = [path] if layer is None else [path, path.replace('layers/', f'layers/{layer}/', 1)]
  try:
    return any(re.fullmatch(pattern, one) for one in spelled)
  except (re.error, OverflowError, RecursionError):
    return False


def split(targets: str) -> tuple[str, ...]:
  """The names in a comma-joined set of targets.

  Raises:
    UserError: the set is empty.
  """
  names = tuple(name.strip() for name in targets.split(',') if name.strip())
  if not names:
    raise UserError(f'empty set of targets {targets!r}; targets are {", ".join(GROUPS)}')
  return names


def canonical(targets: str) -> str:
  """One spelling for a set of targets: no spaces or repeats, the article's names first."""
  names = dict.fromkeys(split(targets))
  return ','.join([*(n for n in GROUPS if n in names), *(n for n in names if n not in GROUPS)])

"""`adapter_config.json`: what PEFT's settings mean, and which of them are not read here.

PEFT's patterns see a module's name with the model's own prefix, `model.layers.3.mlp.up_proj`.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError

CONFIG = 'adapter_config.json'

# Settings that are read, and those that say nothing about what a finished adapter computes.
_READ = {
  *('peft_type', 'r', 'lora_alpha', 'rank_pattern', 'alpha_pattern', 'use_rslora', 'use_dora'),
  *('target_modules', 'exclude_modules', 'layers_to_transform', 'layers_pattern'),
  *('bias', 'modules_to_save', 'init_lora_weights', 'base_model_name_or_path'),
}
_HARMLESS = {
  *('auto_mapping', 'revision', 'inference_mode', 'task_type', 'peft_version', 'lora_dropout'),
  *('loftq_config', 'eva_config', 'corda_config', 'lora_ga_config', 'velora_config'),
  *('megatron_config', 'megatron_core', 'runtime_config', 'qalora_group_size'),
}
# Initialisations that change the base too, so that A and B mean nothing without it.
_CHANGES_BASE = ('pissa', 'corda', 'olora', 'loftq', 'lora_ga')


def read_settings(directory: Path) -> dict[str, Any]:
  """Reads and checks the settings of an adapter.

  Raises:
    UserError: they are missing, damaged, or say something that is not read here.
  """
  file = directory / CONFIG
  if not file.is_file():
    raise UserError(f'no {file}; give the directory of an adapter in PEFT format')
  try:
    settings = json.loads(file.read_text(encoding='utf-8'))
    kind = settings['peft_type']
    alphas = {'lora_alpha': settings['lora_alpha'], **(settings.get('alpha_pattern') or {})}
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{file}: not the configuration of an adapter ({error})') from error
  if kind != 'LORA':
    raise UserError(f'{file}: peft_type is {kind!r}, and only LORA is read')
  for name, alpha in alphas.items():
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
      raise UserError(f'{file}: the alpha of {name} is {alpha!r}, not a number')
  for key in ('use_rslora', 'use_dora'):
    if settings.get(key) not in (True, False, None):
      raise UserError(f'{file}: {key} is {settings[key]!r}, not true or false')
  if settings.get('bias', 'none') not in ('none', 'all', 'lora_only'):
    raise UserError(f"{file}: bias is {settings['bias']!r}, not 'none', 'all' or 'lora_only'")
  init = str(settings.get('init_lora_weights')).lower()
  if init.startswith(_CHANGES_BASE):
    raise UserError(
      f'{file}: init_lora_weights is {init!r}, which changed the base; convert it to plain LoRA '
      'with PEFT (`path_initial_model_for_weight_conversion`)'
    )
  for key in sorted(settings.keys() - _READ - _HARMLESS):
    # What is off, or not there, computes nothing.
    if settings[key] not in (None, False, '', [], {}):
      raise UserError(f'{file}: {key} is {settings[key]!r}, which is not supported')
  _check_patterns(file, settings)
  return settings


def _check_patterns(file: Path, settings: Mapping[str, Any]) -> None:
  patterns = []
  for key in ('alpha_pattern', 'rank_pattern'):
    held = settings.get(key) or {}
    if not isinstance(held, dict):
      raise UserError(f'{file}: {key} is {held!r}, not an object of patterns')
    patterns += [(key, name) for name in held]
  for key in ('target_modules', 'exclude_modules', 'modules_to_save'):
    held = settings.get(key)
    names = [held] if isinstance(held, str) else held or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
      raise UserError(f'{file}: {key} is {held!r}, not a list of names')
    if isinstance(held, str) and key != 'modules_to_save':
      patterns.append((key, held))
  if not settings.get('target_modules'):
    raise UserError(f'{file}: target_modules names nothing; give an adapter on some modules')
  for key, pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(f'{file}: {key} {pattern!r} is no pattern ({error})') from error


def is_target(settings: Mapping[str, Any], name: str) -> bool:
  """Whether PEFT puts an adapter on a linear module, named with the model's prefix."""
  excluded, targets = settings.get('exclude_modules'), settings['target_modules']
  if excluded and _named(excluded, name):
    return False
  saved = settings.get('modules_to_save') or []
  if any(re.match(rf'(^|.*\.){re.escape(module)}($|\..*)', name) for module in saved):
    return False
  if targets == 'all-linear':
    return True
  if isinstance(targets, str) or not _named(targets, name) or name in targets:
    return _named(targets, name)
  layers = settings.get('layers_to_transform')
  if layers is None or layers == []:
    return True
  patterns = settings.get('layers_pattern') or [r'[^.]*']
  patterns = [patterns] if isinstance(patterns, str) else patterns
  found = (re.match(rf'(?:^|.*?\.){pattern}\.(\d+)\.', name) for pattern in patterns)
  index = next((int(match[1]) for match in found if match), None)
  return index in (layers if isinstance(layers, list) else [layers])


def is_saved(settings: Mapping[str, Any], name: str) -> bool:
  """Whether PEFT trains and saves a whole module beside the adapters."""
  return any(name.endswith(module) for module in settings.get('modules_to_save') or [])


def alpha_of(settings: Mapping[str, Any], name: str) -> float:
  """The alpha of a module: of the first pattern that its name ends with, or the common one."""
  return float(_of_pattern(settings.get('alpha_pattern'), name, settings['lora_alpha']))


def rank_of(settings: Mapping[str, Any], name: str) -> Any:
  """The rank of a module, found as its alpha is; None where the settings have no `r`."""
  return _of_pattern(settings.get('rank_pattern'), name, settings.get('r'))


def _of_pattern(patterns: Mapping[str, Any] | None, name: str, common: Any) -> Any:
  for pattern, value in (patterns or {}).items():
    if re.match(rf'(.*\.)?({pattern})$', name):
      return value
  return common


def _named(names: str | list[str], name: str) -> bool:
  if isinstance(names, str):
    return re.fullmatch(names, name) is not None
  return any(name == one or name.endswith(f'.{one}') for one in names)

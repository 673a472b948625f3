"""The seven datasets of the study, by name and in the article's order."""

from collections.abc import Iterable

from lora_jax.data import (
  cocohd,
  fincot,
  govreport,
  invoice_ocr,
  llava_cot,
  medmcqa,
  medreason,
)
from lora_jax.data.task import Task
from lora_jax.errors import UserError

TASKS: dict[str, Task] = {
  module.TASK.name: module.TASK
  for module in (fincot, govreport, medmcqa, medreason, cocohd, llava_cot, invoice_ocr)
}


def by_names(names: Iterable[str]) -> tuple[Task, ...]:
  """The named tasks, each once, in the order given.

  Raises:
    UserError: a name is unknown, or there is none; lists what exists.
  """
  chosen = tuple(dict.fromkeys(names))
  unknown = [name for name in chosen if name not in TASKS]
  if unknown:
    raise UserError(f'unknown dataset {unknown[0]!r}; there are {", ".join(TASKS)}')
  if not chosen:
    raise UserError(f'no dataset given; there are {", ".join(TASKS)}')
  return tuple(TASKS[name] for name in chosen)

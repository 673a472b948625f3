"""What scoring a user's file leaves on disk: predictions row by row, and the scores.

OUT/predictions.jsonl   id, answer, and of base and adapter: loss, prediction, scores
OUT/scores.json         means, standard errors, what was scored and with what
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.file_scores import FileRows, FileScores, Line
from lora_jax.hub.base import Base
from lora_jax.records import FORMAT, write_json, write_text
from lora_jax.versions import versions


def write(
  out: Path,
  about: Mapping[str, str],
  base: Base,
  rows: FileRows,
  of_base: FileScores,
  of_adapter: FileScores | None,
  lines: Sequence[Line],
) -> None:
  """Writes both files; the scores last, so that they mark the end.

  Args:
    out: the directory.
    about: what was scored: file, adapter, metric.
    base: the base.
    rows: the rows.
    of_base: the base's scores.
    of_adapter: the adapter's, or None.
    lines: the comparison.

  Raises:
    UserError: it cannot be written.
  """
  sides = {'base': of_base} if of_adapter is None else {'base': of_base, 'adapter': of_adapter}
  said = []
  for i, row in enumerate(rows.conversations):
    entry: dict[str, Any] = {'id': row.id, 'answer': row.answer}
    for name, scores in sides.items():
      entry[name] = {'loss': float(scores.losses_N[i]), 'tokens': int(scores.tokens_N[i])}
      if scores.predictions is not None:
        predicted = scores.predictions.rows[i]
        entry[name] |= {'prediction': predicted.prediction, **predicted.scores}
    said.append(json.dumps(entry, ensure_ascii=False))
  write_text(out / 'predictions.jsonl', '\n'.join(said) + '\n')
  record = {
    'format': FORMAT,
    **about,
    'base': base.record,
    'rows': {'scored': len(rows.conversations), 'left_out': rows.left_out},
    'scores': [dataclasses.asdict(line) for line in lines],
    'unfinished': {
      name: scores.predictions.unfinished
      for name, scores in sides.items()
      if scores.predictions is not None
    },
    'versions': versions(),
  }
  write_json(out / 'scores.json', record)

"""What the grid benchmark makes of the records of our side, without running it."""

import json
from pathlib import Path

from benchmarks import grid


def test_training_counts_what_its_cells_took_and_they_count_compilation(monkeypatch):
  def run(command, record, who, environ):
    (out,) = [Path(given.removeprefix('--out=')) for given in command if given[:6] == '--out=']
    (out / 'cells').mkdir(parents=True)
    for targets, seconds in (('base', None), ('o_proj', 2.5), ('fc2', 2.5)):
      train = {} if seconds is None else {'train': {'seconds': seconds}}
      cell = {'cell': {'targets': targets}, 'status': 'done', **train}
      (out / 'cells' / f'{targets}.json').write_text(json.dumps(cell))
    return {'score_seconds': 1.0, 'programs': 3}

  monkeypatch.setattr(grid.side, 'run', run)
  options = grid.Options(
    base='tiny', data=None, dataset='medmcqa', targets=('o_proj', 'fc2'), rank=4, steps=1,
    tokens_per_batch=1024, max_length=512, train_rows=40, test_rows=6, batch_rows=4,
    max_new_tokens=2, dtype='float32', peer_dtypes=('float32',),
  )  # fmt: skip
  ours = grid.run_ours(options)
  assert ours.measured['train_seconds'] == 5.0
  assert [*sorted(ours.cells)] == ['base', 'fc2', 'o_proj']

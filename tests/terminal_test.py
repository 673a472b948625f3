"""The table for a terminal: whole at any width, and no surer than the records."""

import pytest
from planted_run import plant, plant_status, start, written
from report_test import section

from lora_jax.presets import ARTICLE_TARGETS
from lora_jax.report import results, terminal


@pytest.mark.parametrize('width', [40, 80, 120, 200])
def test_the_articles_grid_fits_a_terminal(tmp_path, width):
  run = start(tmp_path)
  for targets in ('base', *ARTICLE_TARGETS):
    for dataset in ('fincot', 'govreport', 'medmcqa', 'medreason', 'cocohd', 'invoice_ocr'):
      plant(run, dataset, targets, [0.3, 0.4, 0.7])
    plant_status(run, 'llava_cot', targets, 'needs vision')
  plant_status(run, 'fincot', 'qkv', 'diverged', why='not finite')
  table = terminal.render(results.gather(run), width)
  assert max(map(len, table.split('scores 0 to 100')[0].splitlines())) <= width
  # Cells may break at a space, never within a word, and none is lost.
  assert table.count('46.7') == 6 * 9 - 1 + 9
  assert table.count('±12.0') == 6 * 9 - 1
  for word in ('diverged', 'Invoice OCR', 'MedReason', 'base', 'o_proj,', 'all'):
    assert word in table


def test_rows_that_all_score_alike_claim_no_certainty(tmp_path):
  run = start(tmp_path)
  plant(run, 'medmcqa', 'base', [0.0] * 12)
  plant(run, 'medmcqa', 'o_proj', [0.0, 1.0] * 6)
  plant(run, 'cocohd', 'base', [0.1, 0.2])
  plant(run, 'cocohd', 'o_proj', [0.3, 0.5])
  text, held, said = written(run)
  assert section(text, 'Scores')['MedMCQA']['base'] == '0.0 (0.0 to 26.4)'
  assert held['datasets']['medmcqa']['configurations']['base']['se'] is None
  row = next(line for line in said.splitlines() if line.startswith('MedMCQA'))
  assert row.split() == ['MedMCQA', '0.0', '50.0', '±15.1*']
  assert 'no ±: all rows score alike' in said
  plant(run, 'medmcqa', 'base', [0.0, 1.0] * 6)
  assert 'no ±' not in written(run)[2]

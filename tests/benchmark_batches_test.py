"""benchmarks/batches.py: rows become the batches that a PEFT user's collator would make."""

import numpy as np

from benchmarks import batches


def test_pad_keeps_rows_and_marks_what_is_real_and_what_is_learned():
  rows = [([5, 6, 7], [False, True, True]), ([8], [True]), ([9, 4], [False, True])]
  first, second = batches.pad(rows, rows_per_batch=2, pad_id=0)
  np.testing.assert_array_equal(first.tokens_BT, [[5, 6, 7], [8, 0, 0]])
  np.testing.assert_array_equal(first.mask_BT, [[1, 1, 1], [1, 0, 0]])
  np.testing.assert_array_equal(first.labels_BT, [[-100, 6, 7], [8, -100, -100]])
  np.testing.assert_array_equal(second.tokens_BT, [[9, 4]])

"""Draws of the means of rows: as other rows would have them, and as chance alone would."""

import numpy as np

# Scores are averages of at most some thousand numbers up to 100: what differs by less is equal.
EQUAL = 1e-7
# Draws made at a time, so that a long test split does not fill the memory.
_BATCH = 250


def resampled(x_CR: np.ndarray, random: np.random.Generator, draws: int) -> np.ndarray:
  """Means over resampled rows, the same rows for all configurations; widened for few rows."""
  rows, means_C1 = x_CR.shape[1], x_CR.mean(axis=1, keepdims=True)
  if rows < 2:
    return np.repeat(means_C1, draws, axis=1)
  from scipy import stats  # takes a second to import

  def means(picked_NR: np.ndarray, axis: int) -> np.ndarray:
    # A product with how often each row was picked is much faster than picking.
    places = picked_NR + rows * np.arange(len(picked_NR))[:, None]
    counts_NR = np.bincount(places.ravel(), minlength=picked_NR.size).reshape(picked_NR.shape)
    return x_CR @ counts_NR.T.astype(float) / rows

  held = stats.bootstrap(
    (np.arange(rows),),
    means,
    n_resamples=draws,
    batch=_BATCH,
    vectorized=True,
    method='percentile',
    rng=random,
  )
  return means_C1 + (held.bootstrap_distribution - means_C1) * np.sqrt(rows / (rows - 1))


def alike(x_R: np.ndarray) -> bool:
  """Whether resampling these rows would give nothing but themselves."""
  return bool(np.ptp(x_R) < EQUAL)


def unseen(
  x_R: np.ndarray, ends: tuple[float, float], random: np.random.Generator, draws: int
) -> np.ndarray:
  """How far rows that were not drawn may move the mean of these, which are all alike.

  With confidence 1 - a, at most 1 - a ** (1 / R) of all rows are unlike R that are alike
  (Clopper and Pearson 1934, none of R), and they are at an end of the scale at most. Half
  of the draws go to either end.
  """
  # A grid rather than random numbers, so that quantiles are the bound itself.
  chance_N = random.permutation((np.arange(draws) + 0.5) / draws)
  share_N = 1 - np.minimum(chance_N, 1 - chance_N) ** (1 / x_R.size)
  return share_N * (np.where(chance_N < 0.5, *ends) - x_R.mean())


def flipped(d_PR: np.ndarray, random: np.random.Generator, draws: int) -> np.ndarray:
  """Mean differences under random signs of the rows: `scipy.stats.permutation_test`'s samples.

  One matrix of signs serves all comparisons, which is what makes hundreds of them fast.
  """
  count, rows = d_PR.shape
  null_PN = np.empty((count, draws))
  for start in range(0, draws, _BATCH):
    some = min(_BATCH, draws - start)
    signs_NR = 2.0 * random.integers(0, 2, (some, rows), dtype=np.int8) - 1
    null_PN[:, start : start + some] = d_PR @ signs_NR.T / rows
  return null_PN

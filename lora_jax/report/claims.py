"""The article's claims C1 to C8 against a run: holds, does not hold, or undetermined.

A claim is a few statements, and each of them is true, false or open (`None`). A
difference decides only beyond the noise: significant after Holm's correction, or with
its whole interval on one side of a threshold. From there on it is three-valued logic: one
false statement refutes a claim, all have to be true for it to hold, and a cell that is
missing or diverged leaves open whatever needs it. What is said of datasets in general
needs `ENOUGH` of them; a counterexample needs one.

  for verdict in judge(results):
    print(verdict.claim, verdict.verdict, verdict.numbers)

The article's own figures pull apart in places: `o_proj` cannot nearly match the best on
CoCoHD (C1) and be 12 points below `o_proj,fc2` there (C4); a gain of 2 to 12 % on the
benchmarks (C5) leaves little room for one of at most 2 % on average (C6); and LoRA does
not beat the base throughout (C8) where `qkv` is below it (C2). Each is judged alone.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lora_jax.batch import Batch
from lora_jax.presets import ARTICLE_TARGETS
from lora_jax.report.results import BASE, DONE, Results
from lora_jax.report.statistics import LEVEL, interval
from lora_jax.report.tables import code, spread
from lora_jax.report.view import (
  ENOUGH,
  Statement,
  View,
  all_of,
  count,
  most_of,
  numbers_of,
  spearman,
  threshold,
  too_few,
)

HOLDS, DOES_NOT_HOLD, UNDETERMINED = 'holds', 'does not hold', 'undetermined'
# What is meant by 'a few points'.
FEW = 3.0
# The article's figures: gain of combinations in points (C3), relative gains in % (C5, C6),
# latency in % (C7). Upper ends (3 points, 12 %) are told and decide nothing.
LEAST_GAIN = 1.0
LEAST_PERCENT, NEAR_PERCENT = 2.0, 2.0
FASTER_PERCENT = 22.6

O_PROJ, O_PROJ_FC2, QKV = 'o_proj', 'o_proj,fc2', 'qkv'
SINGLE = ('qkv', 'o_proj', 'fc1', 'fc2')
COMBINED = tuple(name for name in ARTICLE_TARGETS if name not in SINGLE)
_NAMED_IN_C1 = ('medmcqa', 'cocohd', 'govreport', 'llava_cot', 'invoice_ocr')


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a run says of a claim.

  Attributes:
    claim: 'C1' to 'C8'.
    states: the claim, in our words.
    verdict: one of the three.
    numbers: a sentence for each statement, with what decides it.
  """

  claim: str
  states: str
  verdict: str
  numbers: tuple[str, ...]


def judge(results: Results) -> list[Verdict]:
  """All eight claims, in order."""
  view = View(results)
  pair = (O_PROJ, O_PROJ_FC2)
  claims: tuple[tuple[str, Sequence[str], Callable[[View], list[Statement]]], ...] = (
    ('`o_proj` is the most robust single target', SINGLE, _robust),
    ('`qkv` alone is unstable', (QKV,), _unstable),
    ('the best score is a combination’s on most datasets', ARTICLE_TARGETS, _combined),
    ('harder tasks widen the spread between target sets', pair, _harder),
    ('`o_proj,fc2` is best for accuracy: 2 to 12 % above `o_proj`', pair, _accuracy),
    ('`o_proj` is within 2 % of `o_proj,fc2` on average', pair, _near),
    ('`o_proj` has 22.6 % less latency than `o_proj,fc2`', pair, _faster),
    ('LoRA beats the base throughout', (), _throughout),
  )
  told = {True: 'yes', False: 'no', None: 'open'}
  verdicts = []
  for number, (states, needs, claim) in enumerate(claims, 1):
    statements = claim(view)
    so = all_of(statement.so for statement in statements)
    verdict = UNDETERMINED if so is None else HOLDS if so else DOES_NOT_HOLD
    numbers = [f'{told[s.so]}: {s.says}' for s in statements]
    missing = [code(name) for name in needs if name not in view.trained]
    if missing:
      numbers.insert(0, f'not run: {", ".join(missing)}')
    verdicts.append(Verdict(f'C{number}', states, verdict, tuple(numbers)))
  return verdicts


def _robust(view: View) -> list[Statement]:
  """C1. `o_proj` is the most robust single target.

  - It fails nowhere. False where it is below the base beyond the noise on a dataset; true
    where the interval of its difference to the base stays above -3 points on all.
  - It is usually within a few points of the best other configuration: the interval of
    that gap stays below 3 points on more than half of the datasets, and of those the
    article names (three at least). Not so where the gap is above 3 beyond the noise.
  - Its worst difference to the base over the datasets is above that of each other single
    target, with the whole interval of the bootstrap.
  """
  fails, near, named, gaps = [], [], [], []
  for dataset in view.datasets:
    held, gap = view.compare(dataset, O_PROJ, BASE), view.ahead(dataset, O_PROJ)
    so = None
    if held:
      so = False if held.beyond_noise < 0 else True if held.low >= -FEW else None
    fails.append(so)
    close = None
    if gap:
      close = True if gap.high <= FEW else False if gap.low > FEW else None
      gaps.append(f'{dataset.title} {gap.difference:+.1f}')
    near.append(close)
    if dataset.name in _NAMED_IN_C1:
      named.append(close)
  below, enough = fails.count(False), len(fails) >= ENOUGH
  return [
    Statement(f'it fails nowhere ({below} of {len(fails)} below the base)', all_of(fails, enough)),
    Statement(
      f'within {FEW:g} points of the best other set on most datasets '
      f'({count(near)}{": " if gaps else ""}{", ".join(gaps)})',
      most_of(near),
    ),
    Statement(f'the same where the article names it ({count(named)})', most_of(named, enough=3)),
    _worst(view),
  ]


def _worst(view: View) -> Statement:
  known = [view.known(dataset, SINGLE) for dataset in view.datasets]
  found = [statistics for statistics in known if statistics is not None]
  says = 'its worst difference to the base is the highest of the single targets'
  if len(found) < len(known) or len(found) < ENOUGH:
    return Statement(f'{says} ({len(found)} of {len(known)} datasets have all four)', None)
  lowest = {
    single: np.min([s.draws(single) - s.draws(BASE) for s in found], axis=0) for single in SINGLE
  }
  shown, sides = [], []
  for single in SINGLE:
    compared = [s.compare(single, BASE) for s in found]
    shown.append(f'{code(single)} {min(c.difference for c in compared if c):+.1f}')
    if single != O_PROJ:
      low, high = interval(lowest[O_PROJ] - lowest[single], LEVEL / (len(SINGLE) - 1))
      sides.append(True if low > 0 else False if high < 0 else None)
  return Statement(f'{says} ({", ".join(shown)})', all_of(sides))


def _unstable(view: View) -> list[Statement]:
  """C2. `qkv` alone is good on MedMCQA, below the base on CoCoHD, middling elsewhere.

  - Good: above the base beyond the noise. Below: the same the other way.
  - Middling, on most of the other datasets, two at least: another configuration is above
    it beyond the noise, and it is not below the base. Not so where it is below the
    base, or above all others, beyond the noise.
  """
  by_name = {dataset.name: dataset for dataset in view.datasets}
  statements = []
  for name, sign, word in (('medmcqa', 1, 'above'), ('cocohd', -1, 'below')):
    held = view.compare(by_name[name], QKV, BASE) if name in by_name else None
    title = by_name[name].title if held else {'medmcqa': 'MedMCQA', 'cocohd': 'CoCoHD'}[name]
    so = held.beyond_noise * sign if held else 0
    statements.append(
      Statement(f'{word} the base on {title} ({numbers_of(held)})', None if not so else so > 0)
    )
  others = []
  for dataset in view.datasets:
    if dataset.name in ('medmcqa', 'cocohd'):
      continue
    base, above = view.compare(dataset, QKV, BASE), view.ahead(dataset, QKV)
    if not base or not above:
      others.append(None)
    elif base.beyond_noise < 0 or above.beyond_noise < 0:
      others.append(False)
    else:
      others.append(True if above.beyond_noise > 0 else None)
  return [
    *statements,
    Statement(f'middling elsewhere ({count(others)})', most_of(others, enough=2)),
  ]


def _combined(view: View) -> list[Statement]:
  """C3. Combinations have the best score on most datasets, by 1 to 3 points.

  - On more than half of the datasets the best combination is above the best single
    target, with the whole interval of the bootstrap, in which both are chosen anew.
  - On average it is by at least one point: the whole interval is; not so where it is
    below. More than three does not refute the claim; the number is told.
  """
  sides, gains, points = [], [], []
  for dataset in view.datasets:
    held = view.known(dataset, ARTICLE_TARGETS)
    if held is None:
      sides.append(None)
      continue
    best = [np.max([held.draws(n) for n in of], axis=0) for of in (COMBINED, SINGLE)]
    gains.append(best[0] - best[1])
    mean = lambda names, d=dataset: max(d.entries[n].mean or 0.0 for n in names)
    points.append(mean(COMBINED) - mean(SINGLE))
    low, high = interval(gains[-1])
    sides.append(True if low > 0 else False if high < 0 else None)
  above = Statement(
    f'the best combination is above the best single target on most datasets ({count(sides)})',
    most_of(sides),
  )
  if len(gains) < ENOUGH:
    return [above, Statement(f'by 1 to 3 points on average ({too_few(len(gains))})', None)]
  low, high = interval(np.mean(gains, axis=0))
  says = f'by 1 to 3 points on average ({spread(float(np.mean(points)), low, high)})'
  return [above, Statement(says, threshold(low, high, LEAST_GAIN))]


def _harder(view: View) -> list[Statement]:
  """C4. Harder tasks (low base score) widen the spread between configurations.

  - The rank correlation (Spearman) between the base's score and the range of the trained
    configurations' scores, over datasets, is negative with its whole interval; not so
    where it is positive with its whole interval.
  - On CoCoHD `o_proj,fc2` gains more than `o_proj`, beyond the noise (the article: +15
    and +3 points over the base).
  """
  base, ranges = [], []
  for dataset in view.datasets:
    held = view.known(dataset, ())
    done = [n for n in view.trained if held and dataset.entries[n].status == DONE]
    if held and len(done) > 2 and len(done) == len(view.trained):
      base.append(held.draws(BASE))
      ranges.append(np.ptp([held.draws(name) for name in done], axis=0))
  says = 'the lower the base’s score, the wider the spread'
  if len(base) < ENOUGH:
    widens = Statement(f'{says} ({too_few(len(base))})', None)
  else:
    draws = spearman(np.array(base), np.array(ranges))
    low, high = interval(draws)
    middle = float(np.median(draws))
    so = True if high < 0 else False if low > 0 else None
    widens = Statement(f'{says} (rank correlation {spread(middle, low, high, 2)})', so)
  cocohd = next((d for d in view.datasets if d.name == 'cocohd'), None)
  held = cocohd and view.compare(cocohd, O_PROJ_FC2, O_PROJ)
  so, numbers = None, numbers_of(None)
  if cocohd and held:
    so = None if not held.beyond_noise else held.beyond_noise > 0
    both = [view.compare(cocohd, name, BASE) for name in (O_PROJ_FC2, O_PROJ)]
    numbers = ' and '.join(f'{numbers_of(c)}' for c in both) + ' over the base'
  return [widens, Statement(f'on CoCoHD `o_proj,fc2` gains more than `o_proj` ({numbers})', so)]


def _accuracy(view: View) -> list[Statement]:
  """C5. `o_proj,fc2` is the best choice for accuracy, 2 to 12 % above `o_proj`.

  - On more than half of the datasets its score is at least 2 % above `o_proj`'s, with the
    whole interval; not so where the interval is below 2 %.
  - On average over the datasets that are complete, no configuration is above it: not so
    where one is beyond the noise; true where the intervals stay below 3 points.
  """
  sides, shown = [], []
  for dataset in view.datasets:
    percent = view.percent([dataset], O_PROJ_FC2, O_PROJ, of=O_PROJ)
    if percent is None:
      sides.append(None)
      continue
    middle, low, high = percent
    sides.append(threshold(low, high, LEAST_PERCENT))
    shown.append(f'{dataset.title} {middle:+.1f} %')
  held, best, leads = view.results.average_statistics, [], []
  for name in view.trained if held else ():
    lead = held.compare(name, O_PROJ_FC2) if held else None
    if lead:
      best.append(False if lead.beyond_noise > 0 else True if lead.high <= FEW else None)
      leads.append((lead.difference, name))
  largest = f'{code(max(leads)[1])} leads by {max(leads)[0]:+.1f}' if leads else 'no average'
  enough = len(view.results.complete) >= ENOUGH
  return [
    Statement(
      f'2 % or more above `o_proj` on most datasets '
      f'({count(sides)}{": " if shown else ""}{", ".join(shown)}; the article: 2 to 12 %)',
      most_of(sides),
    ),
    Statement(f'no other set is above it on average ({largest})', all_of(best) if enough else None),
  ]


def _near(view: View) -> list[Statement]:
  """C6. On average `o_proj` is within 2 % of `o_proj,fc2`.

  The average is over the datasets that have both, each counted alike. True where the
  whole interval of the shortfall, as a share of `o_proj,fc2`'s average, is at most 2 %.
  """
  pair = (O_PROJ, O_PROJ_FC2)
  both = [dataset for dataset in view.datasets if view.known(dataset, pair)]
  percent = view.percent(both, O_PROJ_FC2, O_PROJ, of=O_PROJ_FC2)
  says = 'shortfall on average'
  if len(both) < ENOUGH:
    return [Statement(f'{says} ({too_few(len(both))})', None)]
  if len(both) < len(view.datasets):
    return [Statement(f'{says} ({len(both)} of {len(view.datasets)} datasets have both)', None)]
  if percent is None:
    return [Statement(f'{says} (scores are too low for a share of them)', None)]
  middle, low, high = percent
  so = True if high <= NEAR_PERCENT else False if low > NEAR_PERCENT else None
  return [Statement(f'{says} {spread(middle, low, high)} %', so)]


def _faster(view: View) -> list[Statement]:
  """C7. `o_proj` has 22.6 % less latency than `o_proj,fc2`, adapters unmerged.

  For prefill and for decoding, of one row and in the batches that were timed: true where it
  is faster and 22.6 % is within reach of the quartiles of both, false where even the quartiles
  furthest apart give less, and open where nothing was measured or the quartiles reach from
  slower to 22.6 %.
  """
  statements = _less('', [view.results.times(name) for name in (O_PROJ, O_PROJ_FC2)])
  for batch in (view.results.batches or {}).get('batches', ()):
    times = [batch['times'].get(name) for name in (O_PROJ, O_PROJ_FC2)]
    # A row at a time is what is told of already.
    if None not in times and batch['rows'] > 1:
      label = f'{Batch(batch["rows"], batch["adapters"]).label}, '
      statements += _less(label, times)
  return statements


def _less(of: str, times: Sequence[Mapping[str, float] | None]) -> list[Statement]:
  """By how much the first of two is faster."""
  statements = []
  for work in ('prefill', 'decode'):
    if None in times:
      statements.append(Statement(f'{of}{work}: not measured', None))
      continue
    one, two = (
      [t[f'{work}_ratio{end}'] for end in ('', '_low', '_high')] for t in times if t is not None
    )
    middle, low, high = (
      100 * (1 - one[i] / two[j]) for i, j in ((0, 0), (2, 1), (1, 2))
    )  # fmt: skip
    so = False if high < FASTER_PERCENT else True if low > 0 else None
    statements.append(Statement(f'{of}{work} {spread(middle, low, high)} % less', so))
  return statements


def _throughout(view: View) -> list[Statement]:
  """C8. LoRA beats the base throughout.

  True where every trained configuration is above the base beyond the noise on every
  dataset; false where one is below it beyond the noise on one.
  """
  found = []
  for dataset in view.datasets:
    held = view.known(dataset, ())
    for name in view.trained:
      done = held is not None and dataset.entries[name].status == DONE
      found.append((held.compare(name, BASE) if held and done else None, dataset, name))
  sides = [None if not c or not c.beyond_noise else c.beyond_noise > 0 for c, _, _ in found]
  known = [(c.difference, d.title, n) for c, d, n in found if c]
  worst = ''
  if known:
    difference, title, name = min(known)
    worst = f'; lowest: {title} {code(name)} {difference:+.1f}'
  says = (
    f'above in {sides.count(True)} of {len(sides)} cells, below in {sides.count(False)}, '
    f'inside the noise or missing in {sides.count(None)}{worst}'
  )
  return [Statement(says, all_of(sides, len(view.datasets) >= ENOUGH))]

"""Generated audit reports with a summary that can only be written by reading them.

Each report is about one programme of one agency: what it is for, its money over some
years, how many sites were visited, what was found wrong, why, and what is recommended.
The figures, the finding, its cause and the remedy are drawn anew for each row and are
told in other words in the report than in the summary; passages about method and about
matters in good order belong to no summary.
"""

import random
from typing import Any

_AGENCIES = (
  ('Office of Inland Waterways', 'OIW'), ('Bureau of Rural Clinics', 'BRC'),
  ('Agency for Flood Insurance', 'AFI'), ('National Apprenticeship Board', 'NAB'),
  ('Coastal Survey Administration', 'CSA'), ('Department of School Meals', 'DSM'),
  ('Federal Seed Inspection Office', 'FSIO'), ('Office of Public Housing Repair', 'OPHR'),
  ('Bridge Safety Commission', 'BSC'), ('Veterans Retraining Administration', 'VRA'),
)  # fmt: skip
_PROGRAMS = (
  ('Equipment Renewal Program', 'replace worn pumps, engines and cranes'),
  ('Community Grants Program', 'fund projects that local groups propose'),
  ('Emergency Reserve Program', 'keep food, water and shelter ready for disasters'),
  ('Field Inspection Program', 'inspect licensed sites at least once a year'),
  ('Digital Records Program', 'move paper files to one electronic archive'),
  ('Workforce Training Program', 'train apprentices together with local colleges'),
  ('Small Contractor Program', 'open bidding to firms with fewer than fifty workers'),
  ('Loan Guarantee Program', 'help first-time borrowers obtain bank credit'),
)
# Each finding, cause and remedy: as the report tells it, and as the summary does.
_FINDINGS = (
  ('had not completed the reviews that the law requires', 'skipped legally required reviews'),
  ('could not show receipts for what they had bought', 'lacked receipts for their purchases'),
  ('took more than a year to close an application', 'needed over a year per application'),
  ('kept books that disagreed with the central ledger', 'kept books at odds with the ledger'),
  ('had left at least one safety defect unrepaired', 'tolerated unrepaired safety defects'),
  ('paid some claims twice', 'made duplicate payments on claims'),
  ('stored medicines past their expiry date', 'held expired medicines in storage'),
  ('let former employees keep their passwords', 'left accounts of former employees open'),
)
_CAUSES = (
  (
    'Managers told us that about {n} positions had stood empty since the year before',
    'about {n} unfilled positions',
  ),
  (
    'Staff in {n} offices said that guidance had never been put in writing',
    'a lack of written guidance in {n} offices',
  ),
  (
    'The software in use dates from {n} years ago and cannot share data',
    '{n}-year-old software that cannot share data',
  ),
  ('Some {n} supervisors had never been trained for these duties', '{n} untrained supervisors'),
  (
    'Since the last reorganization, {n} districts have had no one in charge of this',
    'unclear responsibility across {n} districts',
  ),
)
_REMEDIES = (
  ('issue written guidance and check each year that it is followed', 'annual checks of guidance'),
  ('draw up a hiring plan with a target for each region', 'a hiring plan with regional targets'),
  ('set a date by which every office uses one system', 'a deadline for moving to one system'),
  ('report to Congress each quarter on what remains to be done', 'quarterly reports to Congress'),
  ('recover the money that was wrongly spent', 'recovery of misspent money'),
  ('name one official who answers for results', 'naming one accountable official'),
  ('train all supervisors within a year', 'training for all supervisors within a year'),
)
_GOOD_ORDER = (
  'Payroll, travel and leave records agreed with the supporting papers.',
  'Visitors rated the public counter well, and complaints were answered in time.',
  'Vehicles were insured and serviced at the intervals that the maker sets.',
)
_METHOD = (
  'We read policies and budget documents, interviewed officials and compared a sample of files '
  'with the ledger. We judged the data fit for our purpose.',
  'Our sites were chosen to cover large and small offices, and cannot stand for all of them. We '
  'spoke with managers, staff and two outside experts.',
  'We tested a random sample of cases, repeated a part of the tests, and shared a draft with the '
  'officials concerned.',
)


def rows(seed: int, count: int) -> list[dict[str, Any]]:
  """`count` reports with the fields of `lora_jax.data.govreport`; row i depends on (seed, i)."""
  return [_row(random.Random(f'report:{seed}:{i}'), f'report-{seed}-{i}') for i in range(count)]


def _row(rng: random.Random, row_id: str) -> dict[str, Any]:
  agency, short = rng.choice(_AGENCIES)
  program, purpose = rng.choice(_PROGRAMS)
  founded = rng.randint(1948, 2006)
  first_year = rng.randint(2009, 2018)
  last_year = first_year + rng.randint(2, 5)
  before, after = _two_budgets(rng)
  visited = rng.randint(14, 60)
  failing = rng.randint(visited // 5, visited - 3)
  (found, found_short), (cause, cause_short) = rng.choice(_FINDINGS), rng.choice(_CAUSES)
  extent = rng.randint(3, 40)
  (remedy, remedy_short), other = rng.sample(_REMEDIES, 2)
  second = rng.random() < 0.5
  agrees = rng.random() < 0.7
  trend = 'grew' if after > before else 'fell'

  background = rng.choice(
    (
      f'The {agency} ({short}) has run the {program} since {founded}. Its purpose is to {purpose}. '
      f'About {rng.randint(20, 900)} people work on it in {rng.randint(4, 30)} regional offices.',
      f'In {founded} Congress directed the {agency} ({short}) to {purpose}. {short} does so '
      f'through the {program}, with help from {rng.randint(5, 48)} states.',
    )
  )
  money = rng.choice(
    (
      f'Appropriations for the program were ${before} million in fiscal year {first_year} and '
      f'${after} million in fiscal year {last_year}. Administration took about '
      f'{rng.randint(4, 19)} percent.',
      f'In fiscal year {first_year} the program received ${before} million. By fiscal year '
      f'{last_year} the figure was ${after} million, of which ${rng.randint(1, 9)} million was '
      'carried over.',
    )
  )
  result = (
    f'We visited {visited} sites. At {failing} of them officials {found}. '
    f'{cause.format(n=extent)}. {short} officials said that they knew of the problem '
    'but had not set a date to correct it.'
  )
  advice = f'We recommend that the head of {short} {remedy}.'
  if second:
    advice += f' We also recommend that {short} {other[0]}.'
  comment = (
    f'{short} agreed with what we recommend and described steps under way.'
    if agrees
    else f'{short} disagreed with what we recommend, and said that its own plan would suffice.'
  )

  sections = [
    ('Background', background),
    ('Budget', money),
    ('Scope and Method', rng.choice(_METHOD)),
    ('Matters in Good Order', rng.choice(_GOOD_ORDER)),
    ('Findings', result),
  ]
  middle = sections[1:]
  rng.shuffle(middle)
  sections = [sections[0], *middle, ('Recommendations', advice), ('Agency Comments', comment)]
  remedies = f'{remedy_short} and {other[1]}' if second else remedy_short
  verdict = 'agreed' if agrees else 'disagreed'
  return {
    'id': row_id,
    'report': '\n\n'.join(f'{heading}\n\n{text}' for heading, text in sections),
    'summary': (
      f'The {program} of the {agency} exists to {purpose}. Funding {trend} from ${before} million '
      f'in {first_year} to ${after} million in {last_year}. Auditors found that {failing} of '
      f'{visited} sites {found_short}, owing to {cause_short.format(n=extent)}. They recommend '
      f'{remedies}. {short} {verdict}.'
    ),
  }


def _two_budgets(rng: random.Random) -> tuple[int, int]:
  """Two different amounts in millions of dollars."""
  before, after = rng.sample(range(12, 480), 2)
  return before, after

"""The page is one well-formed file that asks nothing of a network and trusts no name."""

import html.parser
import itertools
import json
import re

import pytest
from planted_run import plant, plant_latency, plant_status, start

from lora_jax.records import Cell, RunDirectory, write_json
from lora_jax.report import comparison, plots, report, results, svg
from lora_jax.report.document import Bullets, Card, Cards, Document, Section, Table, markdown
from lora_jax.report.document import Cell as TableCell
from lora_jax.report.page import render

EVIL = '<img src=x onerror=alert(1)>'
_VOID = {'meta', 'wbr'}


class Page(html.parser.HTMLParser):
  """Elements of a page; every one is closed where it must be."""

  def __init__(self, text):
    super().__init__()
    self.open, self.elements, self.texts = [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in _VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)

  def count(self, tag):
    return sum(name == tag for name, _ in self.elements)


@pytest.fixture
def run(tmp_path):
  run = start(tmp_path / 'run')
  for dataset in ('medmcqa', 'cocohd'):
    plant(run, dataset, 'base', [0, 0.5, 1, 1])
    plant(run, dataset, 'o_proj', [0.5, 1, 1, 1])
    plant(run, dataset, 'all', [0.2, 1, 1, 1])
  return run


def page_of(run):
  report.write(run)
  return Page((run.path / 'report.html').read_text())


def assert_offline(page, text):
  """Nothing is fetched: no element or style that points outside."""
  for tag, attributes in page.elements:
    assert tag not in ('link', 'img', 'iframe', 'object', 'embed', 'base', 'form')
    assert not {'src', 'srcset', 'data', 'action'} & {*attributes}
    assert attributes.get('href', '#').startswith('#')
    assert not any(name.startswith('on') for name in attributes)
  assert not re.search(r'https?://|url\(|@import|fetch\(|XMLHttpRequest', text)


def test_the_page_is_whole_and_offline(run):
  plant_latency(run, o_proj=1.05, all=1.2)
  page = page_of(run)
  assert_offline(page, (run.path / 'report.html').read_text())
  assert page.count('h1') == 1
  # Differences of two datasets, two of latency, one of difficulty.
  assert page.count('svg') == 5
  assert page.count('article') == 4
  targets = {attributes['href'][1:] for tag, attributes in page.elements if tag == 'a'}
  ids = [attributes['id'] for _, attributes in page.elements if 'id' in attributes]
  assert targets == {*ids}
  assert len(ids) == len({*ids})
  labelled = [a for tag, a in page.elements if tag == 'svg']
  assert all(a['role'] == 'img' and a['aria-label'] for a in labelled)


def test_every_column_of_a_table_sorts_by_a_button(run):
  page = page_of(run)
  assert page.count('button') == sum(a.get('scope') == 'col' for _, a in page.elements)
  values = [a['data-value'] for tag, a in page.elements if tag == 'td' and 'data-value' in a]
  assert len(values) > 20
  assert all(float(value) == float(value) for value in values)


def test_markdown_and_page_say_the_same(run):
  page = page_of(run)
  said = ' '.join(''.join(page.texts).split())
  text = (run.path / 'report.md').read_text()
  for title in re.findall(r'^## (.*)$', text, re.MULTILINE):
    assert title in said
  held = json.loads((run.path / 'results.json').read_text())
  for verdicts in held['claims'].values():
    for verdict in verdicts:
      for numbers in verdict['numbers']:
        assert numbers in text
        assert numbers.replace('`', '') in said


def test_names_of_users_are_text_everywhere(tmp_path):
  run = start(tmp_path, data=f'/rows/{EVIL}')
  plant(run, EVIL, 'base', [0, 1, 0.5], description=EVIL)
  plant(run, EVIL, f'.*({EVIL})', [1, 1, 0.5], others={EVIL: 0.5})
  plant(run, EVIL, '**`o_proj', [1, 1, 0.25])
  plant_status(run, EVIL, 'qkv', 'diverged', why=EVIL)
  plant_latency(run, **{f'.*({EVIL})': 1.1})
  for file in (tmp_path / 'cells').glob('*.json'):
    record = json.loads(file.read_text())
    record['base'] |= {'name': EVIL, 'weights': EVIL}
    record['rows']['note'] = EVIL
    write_json(file, record)
  page = page_of(run)
  assert_offline(page, '')
  assert page.count('img') == 0
  assert page.count('script') == 1
  assert EVIL in ''.join(page.texts)
  # In Markdown nothing outside code begins a tag.
  text = re.sub('`[^`]*`', '', (tmp_path / 'report.md').read_text())
  assert '<img' not in text


@pytest.mark.parametrize('seeds', [(0,), (0, 1, 2)])
def test_partial_runs_have_a_report(tmp_path, seeds):
  run = start(tmp_path)
  plant(run, 'medmcqa', 'base', [0, 1, 1, 1])
  assert 'Only the base was run' in ''.join(page_of(run).texts)
  plant_status(run, 'cocohd', 'base', 'needs vision')
  for seed in seeds:
    plant(run, 'medmcqa', 'o_proj', [1, 1, 1, 0], seed)
  plant_status(run, 'medmcqa', 'fc2', 'diverged', why='not finite')
  said = ''.join(page_of(run).texts)
  assert 'diverged' in said
  assert ('with one seed, what another training run would give' in said) == (len(seeds) == 1)
  run.cell_file(Cell('', 'medmcqa', 'base', '', 0)).unlink()
  assert 'no dataset has scores of the base' in ''.join(page_of(run).texts)


def test_a_document_of_every_kind_of_block():
  made = Document(
    'A `b`',
    ['**bold** & <i>'],
    ['careful'],
    [
      Section('Empty', []),
      Section(
        'Full',
        [
          Bullets(['one', '`two`']),
          Cards([Card('speed', '`qkv`', 'fast', 'proof')]),
          Table(['x', 'y'], [['a|b', TableCell('1', 1.0, 'good', '0 to 2', '▲')]], note='n'),
        ],
      ),
    ],
  )
  text = markdown(made)
  assert '## Empty' not in text
  assert '**bold** & &lt;i>' in text
  assert '| a\\|b | 1 (0 to 2) ▲ |' in text
  page = Page(render(made))
  assert ('b', {}) in page.elements
  assert page.count('i') == 0
  assert '1 ▲' in page.texts
  assert '0 to 2' in page.texts


def test_labels_keep_their_distance_and_their_order():
  wanted = [50, 50, 51, 10, 200, 52]
  places = svg.apart(wanted, 0, 200, gap=15)
  in_order = [places[i] for i in sorted(range(6), key=lambda i: (wanted[i], i))]
  gaps = [after - before for before, after in itertools.pairwise(in_order)]
  assert min(gaps) >= 15 - 1e-9
  assert min(places) >= 0
  assert max(places) <= 200
  assert svg.apart([20, 80], 0, 100) == [20, 80]


@pytest.mark.parametrize(('low', 'high'), [(0, 1), (-3.2, 17.9), (0.98, 1.31), (40, 40), (0, 9e4)])
def test_ticks_are_round_and_inside(low, high):
  found = svg.ticks(low, high)
  assert 1 <= len(found) <= 6
  assert all(low <= tick <= high for tick in found)


def test_the_front_is_what_nothing_beats():
  points = [
    plots.Point(*held)
    for held in (('a', 1, 5), ('b', 2, 4), ('c', 2, 9), ('d', 3, 9), ('e', 4, 10))
  ]
  assert [point.label for point in plots.front(points)] == ['a', 'c', 'e']


def test_several_runs_side_by_side(run, tmp_path):
  other = start(tmp_path / 'other')
  for targets, rows in (('base', [0, 0, 1]), ('o_proj', [1, 1, 1])):
    plant(other, 'medmcqa', targets, rows)
  found = {name: results.gather(RunDirectory(tmp_path / name)) for name in ('run', 'other')}
  said = comparison.write(found, tmp_path / 'both')
  assert said.startswith('comparison: ')
  text = (tmp_path / 'both/comparison.md').read_text()
  page = Page((tmp_path / 'both/comparison.html').read_text())
  assert_offline(page, '')
  # Bases of one name are told apart by their directories.
  for name in ('smollm2-135m-instruct, run', 'smollm2-135m-instruct, other'):
    assert f'`{name}`' in text
    assert name in ''.join(page.texts)
  assert '## CoCoHD' in text
  assert '**Note:**' not in text

"""Sources give checked rows, and name file, line and field where they cannot."""

import io
import json
import os
import zipfile

import pytest
from PIL import Image

from lora_jax.data import canonical, llava_cot, medmcqa, medreason, sources
from lora_jax.errors import UserError

ROW = {
  'question': 'Which planet is red?',
  'opa': 'Venus',
  'opb': 'Mars',
  'opc': 'Saturn',
  'opd': 'Neptune',
  'cop': 1,
}


def write(root, train, test=None, name='medmcqa'):
  folder = root / name
  folder.mkdir(parents=True, exist_ok=True)
  for split, rows in (('train', train), ('test', [ROW] if test is None else test)):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f'{split}.jsonl').write_text('\n'.join(lines), encoding='utf-8')
  return sources.Directory(root)


def read(source, task=medmcqa.TASK):
  return {split: list(rows) for split, rows in source.rows(task).items()}


def test_directory_keeps_order_drops_extras_and_names_rows(tmp_path):
  source = write(tmp_path, [{**ROW, 'id': 'a', 'other': 1}, {**ROW, 'id': 7}, ROW])
  source.check(medmcqa.TASK)
  rows = read(source)
  assert [row['id'] for row in rows['train']] == ['a', '7', 'train-2']
  assert [row['id'] for row in rows['test']] == ['test-0']
  assert set(rows['train'][0]) == {*medmcqa.TASK.features, 'id'}
  assert rows['train'][0]['exp'] is None
  assert '3 train, 1 test' in source.describe(medmcqa.TASK)


def test_directory_reads_blank_lines_and_a_byte_order_mark(tmp_path):
  source = write(tmp_path, ['\ufeff' + json.dumps(ROW), '', json.dumps(ROW), ''])
  source.check(medmcqa.TASK)
  assert len(read(source)['train']) == 2


@pytest.mark.parametrize(
  ('bad', 'field'),
  [
    ({k: v for k, v in ROW.items() if k != 'opb'}, 'opb'),
    ({**ROW, 'question': None}, 'question'),
    ({**ROW, 'cop': '1'}, 'cop'),
    ({**ROW, 'cop': True}, 'cop'),
    ({**ROW, 'cop': -1}, 'cop'),
    ({**ROW, 'cop': 10**30}, 'cop'),
    ({**ROW, 'exp': ['x']}, 'exp'),
    ({**ROW, 'id': ['x']}, 'id'),
    ('{"question": "half \\ud800", "opa": "", "opb": "", "opc": "", "opd": "", "cop": 0}', 'quest'),
    ('{"question": ', 'JSON'),
    ('[1, 2]', 'object'),
    ('[' * 100_000, 'JSON'),
  ],
)
def test_directory_names_file_line_and_field(tmp_path, bad, field):
  source = write(tmp_path, [ROW, bad])
  with pytest.raises(UserError) as error:
    source.check(medmcqa.TASK)
  text = str(error.value)
  assert f'{tmp_path / "medmcqa" / "train.jsonl"}:2' in text
  assert field in text
  assert '\n' not in text


def test_directory_names_repeated_ids_and_bytes_that_are_not_text(tmp_path):
  source = write(tmp_path, [{**ROW, 'id': 'a'}, {**ROW, 'id': 'a'}])
  with pytest.raises(UserError, match=r"train\.jsonl:2: id 'a' was used on line 1"):
    source.check(medmcqa.TASK)
  (tmp_path / 'medmcqa' / 'train.jsonl').write_bytes(b'{"question": "\xff"}')
  with pytest.raises(UserError, match=r'train\.jsonl:1: not UTF-8'):
    source.check(medmcqa.TASK)


def test_directory_names_what_it_looked_for(tmp_path):
  with pytest.raises(UserError, match=r'no directory .*nowhere'):
    sources.Directory(tmp_path / 'nowhere').check(medmcqa.TASK)
  with pytest.raises(UserError, match=r'no folder .*medmcqa'):
    sources.Directory(tmp_path).check(medmcqa.TASK)
  source = write(tmp_path, [ROW], test=[])
  with pytest.raises(UserError, match=r'test\.jsonl has no rows'):
    source.check(medmcqa.TASK)
  (tmp_path / 'medmcqa' / 'test.jsonl').unlink()
  with pytest.raises(UserError, match=r'no file .*test\.jsonl'):
    source.check(medmcqa.TASK)


def test_directory_reads_images_and_names_one_that_is_missing(tmp_path):
  row = llava_cot.TASK.synthetic(0, 1)[0]
  image, row = row['image'], {**row, 'image': 'images/0.png'}
  source = write(tmp_path, [row], [row], name='llava_cot')
  with pytest.raises(UserError, match=r"train\.jsonl:1: field 'image' names .*0\.png"):
    source.check(llava_cot.TASK)
  (tmp_path / 'llava_cot' / 'images').mkdir()
  (tmp_path / 'llava_cot' / 'images' / '0.png').write_bytes(image)
  source.check(llava_cot.TASK)
  assert read(source, llava_cot.TASK)['test'][0]['image'] == image


@pytest.mark.parametrize('name', ['../secret.png', 'images/../../secret.png', '/etc/passwd'])
def test_an_image_outside_its_folder_is_refused(tmp_path, name):
  row = {**llava_cot.TASK.synthetic(0, 1)[0], 'image': name}
  source = write(tmp_path, [row], [row], name='llava_cot')
  (tmp_path / 'secret.png').write_bytes(b'1')
  with pytest.raises(UserError, match=r"train\.jsonl:1: field 'image' names .* not under"):
    source.check(llava_cot.TASK)


def test_fingerprint_follows_rows_and_images(tmp_path):
  row = {**llava_cot.TASK.synthetic(0, 1)[0], 'image': '0.png'}
  source = write(tmp_path, [row], [row], name='llava_cot')
  image = tmp_path / 'llava_cot' / '0.png'
  image.write_bytes(b'1')
  prints = [source.fingerprint(llava_cot.TASK)]
  assert source.fingerprint(llava_cot.TASK) == prints[0]
  os.utime(image, (0, 0))
  assert source.fingerprint(llava_cot.TASK) == prints[0]
  image.write_bytes(b'2')
  prints.append(source.fingerprint(llava_cot.TASK))
  write(tmp_path, [row, {**row, 'id': 'b'}], [row], name='llava_cot')
  prints.append(source.fingerprint(llava_cot.TASK))
  assert len(set(prints)) == 3


def test_synthetic_test_rows_do_not_depend_on_the_size_of_train():
  small = read(sources.Synthetic(seed=3, train=5, test=20))
  large = read(sources.Synthetic(seed=3, train=50, test=20))
  assert small['test'] == large['test']
  assert large['train'][:5] == small['train']
  other = read(sources.Synthetic(seed=4, train=5, test=20))
  assert other['test'] != small['test']


def test_synthetic_refuses_what_the_generator_cannot_give():
  import dataclasses

  one = dataclasses.replace(medmcqa.TASK, synthetic=lambda seed, count: [ROW] * count)
  with pytest.raises(UserError, match='only 1 different'):
    sources.Synthetic(seed=0, train=2, test=2).rows(one)
  with pytest.raises(UserError, match='0 synthetic test rows'):
    sources.Synthetic(seed=0, train=2, test=0).check(medmcqa.TASK)


def no_download(*args, **kwargs):
  raise AssertionError('nothing to download')


def test_hub_maps_splits_and_fills_ids():
  def load(hub_id, split):
    assert hub_id == 'openlifescienceai/medmcqa'
    return [{**ROW, 'question': split, 'id': 'same'}] * 2

  rows = read(sources.Hub(load=load, download=no_download))
  assert [row['question'] for row in rows['test']] == ['validation'] * 2
  assert [row['id'] for row in rows['train']] == ['same', 'train-1']


def test_hub_holds_out_one_split_by_question():
  def load(hub_id, split):
    assert split == 'train'
    rows = medreason.TASK.synthetic(0, 300)
    return [{**row, 'id': f'{copy} {row["id"]}'} for row in rows for copy in range(2)]

  rows = read(sources.Hub(load=load, download=no_download), medreason.TASK)
  asked = {split: {row['question'] for row in rows[split]} for split in rows}
  assert asked['test']
  assert len(asked['test']) < len(asked['train'])
  assert not asked['test'] & asked['train']
  assert len(rows['train']) + len(rows['test']) == 600


def test_hub_reads_images_from_a_zip_in_parts(tmp_path):
  made = llava_cot.TASK.synthetic(0, 250)
  archive = io.BytesIO()
  with zipfile.ZipFile(archive, 'w') as images:
    for row in made:
      images.writestr(f'set/{row["id"]}.png', row['image'])
  data = archive.getvalue()
  third = len(data) // 3
  for name, part in (('aa', data[:third]), ('ab', data[third:-7]), ('ac', data[-7:])):
    (tmp_path / f'image.zip.part-{name}').write_bytes(part)
  (tmp_path / 'train.jsonl').write_text(
    '\n'.join(json.dumps({**row, 'image': f'set/{row["id"]}.png'}) for row in made)
  )

  hub = sources.Hub(load=no_download, download=lambda *args, **kwargs: str(tmp_path))
  rows = read(hub, llava_cot.TASK)
  assert rows['test']
  images = {row['id']: row['image'] for split in rows.values() for row in split}
  assert images == {row['id']: row['image'] for row in made}


def test_hub_joins_transcripts_with_their_details(tmp_path):
  from lora_jax.data import cocohd

  made = cocohd.TASK.synthetic(0, 100)
  for index, row in enumerate(made):
    (tmp_path / f'h{index}.txt').write_text(row['transcript'], encoding='utf-8')
  (tmp_path / 'unknown.txt').write_text('no details')

  def load(hub_id, split):
    details = [row['details'] for row in made]
    details = [json.loads(text) if isinstance(text, str) else text for text in details]
    return [{**row, 'govinfo_id': f'h{index}'} for index, row in enumerate(details)]

  hub = sources.Hub(load=load, download=lambda *args, **kwargs: str(tmp_path))
  rows = read(hub, cocohd.TASK)
  assert rows['test']
  found = {row['id']: row for split in rows.values() for row in split}
  assert len(found) == len(made)
  assert found['h3']['transcript'] == made[3]['transcript']
  assert cocohd.TASK.score(cocohd.TASK.target(found['h3']), found['h3'])['field_score'] == 1


def test_hub_images_come_as_encoded_bytes():
  picture = Image.new('RGB', (3, 2), 'red')
  data = canonical._image_bytes(picture)
  assert Image.open(io.BytesIO(data)).size == (3, 2)
  assert canonical._image_bytes({'bytes': data, 'path': None}) == data


def test_hub_failures_are_one_line_with_a_remedy():
  def load(hub_id, split):
    raise ConnectionError('no route\nto host')

  with pytest.raises(UserError) as error:
    sources.Hub(load=load, download=no_download).rows(medmcqa.TASK)
  assert 'openlifescienceai/medmcqa' in str(error.value)
  assert '\n' not in str(error.value)


def test_hub_failures_while_rows_are_read_are_one_line_too():
  def lazily():
    yield medmcqa.TASK.synthetic(0, 1)[0]
    raise ConnectionError('reset\nby peer')

  rows = sources.Hub(load=lambda hub_id, split: lazily(), download=no_download).rows(medmcqa.TASK)
  with pytest.raises(UserError) as error:
    list(rows['train'])
  assert 'openlifescienceai/medmcqa could not be fetched (reset by peer)' in str(error.value)


def test_hub_without_its_library_says_how_to_install_it(monkeypatch):
  import sys

  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(UserError, match=r'pip install .*\[hub\]'):
    sources.Hub().check(medmcqa.TASK)

"""A study over a base that sees: each image once, whatever the grid, and bad images first."""

import dataclasses
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import seeing
import tiny_vlm
from PIL import Image

from lora_jax.data import sources, tasks
from lora_jax.errors import UserError
from lora_jax.hub import bases
from lora_jax.presets import ARTICLE_TARGETS, PRESETS
from lora_jax.records import RunDirectory
from lora_jax.study import Grid, Study

ROOT = Path(__file__).resolve().parent.parent
SMOKE = PRESETS['smoke']
# Prompts of the datasets are long in a vocabulary of bytes.
LENGTH = 1280
SETTINGS = dataclasses.replace(
  SMOKE,
  train=dataclasses.replace(
    SMOKE.train, steps=1, tokens_per_batch=512, max_length=LENGTH, eval_rows=2, dtype='float32'
  ),
  eval=dataclasses.replace(SMOKE.eval, test_rows=2, max_new_tokens=2),
  latency_turns=1,
)
BOTH = ('llava_cot', 'invoice_ocr')


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  loaded = bases.load(str(tiny_vlm.write(tmp_path_factory.mktemp('checkpoint'))))
  return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, max_length=LENGTH))


@pytest.fixture
def tiles(monkeypatch):
  """How many tiles the tower saw, padding included, each time it ran."""
  given = []
  real = jax.jit(
    lambda params, pixels: tiny_vlm.MODEL.apply({'params': params}, pixels, method='see')
  )

  def counted(model, params, pixels_IYXC):
    given.append(len(pixels_IYXC))
    return real(params, pixels_IYXC)

  monkeypatch.setattr('lora_jax.sight.see', counted)
  return given


def run(out, base, names=BOTH, targets=('o_proj',), settings=SETTINGS, source=None):
  directory = RunDirectory(out)
  directory.lock()
  source = sources.Synthetic(seed=0, train=6, test=2) if source is None else source
  study = Study(settings, base, source, directory, out.parent / 'cache', cells=8)
  with pytest.MonkeyPatch.context() as patch:
    # How long adapters take is not the question, and takes most of the time.
    patch.setattr(Study, '_time_targets', lambda self, grid: None)
    study.run(Grid(tasks.by_names(names), targets, (0,)))


def records(out):
  files = sorted((out / 'cells').glob('*.json'))
  return {file.stem: json.loads(file.read_text()) for file in files}


@pytest.fixture(scope='module')
def grid(tmp_path_factory, base):
  """The article's eight configurations over both datasets, and what was printed."""
  out = tmp_path_factory.mktemp('grid') / 'out'
  said, given = io.StringIO(), []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sys.stderr', said)
    seen = jax.jit(
      lambda params, pixels: tiny_vlm.MODEL.apply({'params': params}, pixels, method='see')
    )
    patch.setattr(
      'lora_jax.sight.see', lambda model, params, x: (given.append(len(x)), seen(params, x))[1]
    )
    run(out, base, targets=ARTICLE_TARGETS)
  return out, said.getvalue(), given


@pytest.mark.slow
def test_in_a_grid_of_eight_the_tower_runs_once_an_image(grid):
  out, said, given = grid
  held = records(out)
  assert len(held) == 2 * (1 + len(ARTICLE_TARGETS))
  assert all(record['status'] == 'done' for record in held.values())
  # 6 + 2 rows a dataset, no two of them alike.
  assert 'sight: 16 images, 16 of them new\n' in said
  tiles = 0
  for name in BOTH:
    made = sources.Synthetic(seed=0, train=6, test=2).rows(tasks.TASKS[name])
    for row in [*made['train'], *made['test']]:
      tiles += seeing.EYES.picture(row['image'], '').tiles
  # Each split of a dataset ends with a batch that may not be full.
  assert tiles <= sum(given) < tiles + 4 * 4
  assert len([*(out.parent / 'cache' / 'features').rglob('*.npz')]) == 16


def test_records_say_how_the_task_was_posed(grid):
  out, _, _ = grid
  for name, record in records(out).items():
    assert record['rows']['note'].startswith('Posed by image'), name
    assert record['settings']['sight'] == {'image_edge': 0, 'blank_images': False}
    assert record['base']['sees'] == 'images'
    assert record['rows']['shared_prefix'] == 0


def test_a_later_run_looks_at_nothing_and_finds_the_same(grid, base, tiles, capsys):
  out, _, _ = grid
  again = out.parent / 'again'
  run(again, base, names=['llava_cot'])
  assert 'sight: 8 images, 0 of them new\n' in capsys.readouterr().err
  assert tiles == []
  for name, record in records(again).items():
    other = records(out)[name]
    assert record['scores']['rows'] == other['scores']['rows'], name
    if 'train' in record:
      # Alone here, with seven others there.
      np.testing.assert_allclose(record['train']['losses'], other['train']['losses'], rtol=1e-5)
  # Whoever has all records reads no row.
  run(again, base, names=['llava_cot'])
  assert 'sight' not in capsys.readouterr().err


def test_blank_images_are_other_images_and_other_records(grid, base, tiles, capsys):
  out, _, _ = grid
  blank = dataclasses.replace(
    SETTINGS, sight=dataclasses.replace(SETTINGS.sight, blank_images=True)
  )
  run(out.parent / 'blank', base, names=['llava_cot'], settings=blank)
  # All puzzles have one size, and so one blank image.
  assert 'sight: 1 images, 1 of them new\n' in capsys.readouterr().err
  assert tiles == [4, 4]
  record = records(out.parent / 'blank')['llava_cot-o_proj-equal_rank-seed0']
  assert record['settings']['sight']['blank_images'] is True
  assert 'grey' in record['rows']['note']
  seeing_record = records(out)['llava_cot-o_proj-equal_rank-seed0']
  assert record['train']['losses'] != seeing_record['train']['losses']


def test_a_smaller_edge_takes_fewer_tokens_and_other_features(grid, base, tiles):
  out, _, _ = grid
  small = dataclasses.replace(
    SETTINGS, sight=dataclasses.replace(SETTINGS.sight, image_edge=tiny_vlm.TILE)
  )
  run(out.parent / 'small', base, names=['invoice_ocr'], settings=small)
  assert sum(tiles) >= 8
  name = 'invoice_ocr-o_proj-equal_rank-seed0'
  one, other = records(out.parent / 'small')[name], records(out)[name]
  assert one['train']['tokens'] / one['train']['examples'] < (
    other['train']['tokens'] / other['train']['examples']
  )


def test_adapters_on_the_tower_are_refused_before_anything_is_read(base, tmp_path):
  with pytest.raises(UserError, match=r'vision/\.\* adapts vision/layers/.* seen once'):
    run(tmp_path / 'out', base, targets=('o_proj', 'vision/.*'))
  with pytest.raises(UserError, match='connector/'):
    run(tmp_path / 'out', base, targets=('connector/.*',))
  assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize('change', [{'blank_images': True}, {'image_edge': 56}])
def test_settings_of_images_need_a_base_that_sees(change, tmp_path):
  settings = dataclasses.replace(SETTINGS, sight=dataclasses.replace(SETTINGS.sight, **change))
  with pytest.raises(UserError, match=f'--{next(iter(change))}: tiny does not see'):
    run(tmp_path / 'out', bases.load('tiny'), settings=settings)


def png(width, height, data=b''):
  """Of one grey channel, whatever it claims and holds."""
  chunk = lambda kind, held: (
    struct.pack('>I', len(held)) + kind + held + struct.pack('>I', zlib.crc32(kind + held))
  )
  header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
  body = chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + header + body


def saved(image, kind, **options):
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def write_rows(directory, change=None, at=2, split='train'):
  """A directory of puzzles, the image of one of them (counted from 1) changed."""
  folder = directory / 'llava_cot'
  folder.mkdir(parents=True)
  made = tasks.TASKS['llava_cot'].synthetic(1, 8)
  for name, part in (('train', made[:6]), ('test', made[6:])):
    lines = []
    for number, row in enumerate(part, start=1):
      file = f'{name}{number}.png'
      data = row['image']
      if change is not None and (name, number) == (split, at):
        data = change(data)
      if data is not None:
        (folder / file).write_bytes(data)
      lines.append(json.dumps({**row, 'id': f'{name}_{number}', 'image': file}))
    (folder / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
  return sources.Directory(directory)


EARLY = {
  'missing': (lambda data: None, r"train\.jsonl:2: field 'image' names .*train2\.png"),
  'empty': (lambda data: b'', r'train\.jsonl:2: has no image'),
  'no image': (lambda data: b'GIF87', r'train\.jsonl:2: its image \(5 bytes\) is damaged'),
  'bomb': (lambda data: png(40_000, 40_000), r'train\.jsonl:2: its image has more than'),
  'large': (lambda data: png(9_000, 9_000), r'train\.jsonl:2: its image is 9000 x 9000, more'),
  'no pixels': (lambda data: png(0, 20), r'train\.jsonl:2: its image'),
}


@pytest.mark.parametrize('kind', EARLY)
def test_a_bad_head_is_found_by_the_check_and_names_file_and_line(kind, tmp_path):
  change, says = EARLY[kind]
  source = write_rows(tmp_path / 'data', change)
  with pytest.raises(UserError, match=says):
    source.check(tasks.TASKS['llava_cot'])


LATE = {
  'cut short': lambda data: data[: len(data) // 2],
  'no data': lambda data: png(64, 64),
}


@pytest.mark.parametrize('kind', LATE)
def test_damage_past_the_head_is_found_before_anything_is_trained(kind, base, tmp_path):
  source = write_rows(tmp_path / 'data', LATE[kind], at=3)
  with pytest.raises(UserError, match='llava_cot row train_3: its image is damaged or cut short'):
    run(tmp_path / 'out', base, ['llava_cot'], source=source)
  assert records(tmp_path / 'out') == {}
  # The rows before it were looked at, and will not be again.
  assert len([*(tmp_path / 'cache' / 'features').rglob('*.npz')]) == 2


def test_unusual_images_are_seen_as_a_user_would_expect(base, tmp_path, capsys):
  picture = tiny_vlm.image(192, 192)
  deep = np.linspace(0, 65_535, 192 * 192).astype(np.uint16).reshape(192, 192)
  unusual = [
    saved(picture.convert('CMYK'), 'JPEG'),
    saved(Image.fromarray(deep), 'PNG'),
    saved(picture, 'GIF', save_all=True, append_images=[Image.new('RGB', (192, 192))] * 3),
    saved(picture.convert('RGBA'), 'WEBP'),
    saved(picture.resize((192, 20)), 'TIFF'),
    saved(picture.resize((1, 192)), 'BMP'),
  ]
  source = write_rows(tmp_path / 'data')
  for number, data in enumerate(unusual, start=1):
    (tmp_path / 'data' / 'llava_cot' / f'train{number}.png').write_bytes(data)
  run(tmp_path / 'out', base, ['llava_cot'], source=source)
  assert 'sight: 8 images, 8 of them new\n' in capsys.readouterr().err
  assert {record['status'] for record in records(tmp_path / 'out').values()} == {'done'}


def ablate(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.ablate', *arguments],
    capture_output=True, text=True, cwd=ROOT, check=False, timeout=600,
  )  # fmt: skip


def test_the_launcher_says_in_one_line_what_is_wrong_with_an_image(tmp_path):
  checkpoint = tiny_vlm.write(tmp_path)
  common = ('--preset=smoke', f'--base={checkpoint}', '--datasets=llava_cot')
  common += (f'--cache={tmp_path / "cache"}', f'--out={tmp_path / "out"}')
  write_rows(tmp_path / 'early', EARLY['large'][0])
  write_rows(tmp_path / 'late', LATE['cut short'], split='test')
  early = ablate(*common, f'--data={tmp_path / "early"}')
  assert early.returncode == 2
  assert len(early.stderr.splitlines()) == 1, early.stderr
  assert 'train.jsonl:2: its image is 9000 x 9000' in early.stderr
  late = ablate(*common, f'--data={tmp_path / "late"}', '--max_length=512')
  assert late.returncode == 2, late.stderr
  assert late.stderr.splitlines()[-1].startswith(
    'error: llava_cot row test_2: its image is damaged'
  )
  assert 'Traceback' not in late.stderr

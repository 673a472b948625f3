"""What every launcher does to its process before JAX starts."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import _launcher

ROOT = Path(__file__).resolve().parent.parent

SAYS = """
import os, sys
print('started', flush=True)
from experiments import _launcher
_launcher.prefer_huge_pages()
print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a setting of glibc')
@pytest.mark.parametrize(
  ('held', 'becomes', 'starts'),
  [
    ({}, 'glibc.malloc.hugetlb=1', 2),
    (
      {'GLIBC_TUNABLES': 'glibc.malloc.check=0'},
      'glibc.malloc.check=0:glibc.malloc.hugetlb=1',
      2,
    ),
    ({'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0'}, 'glibc.malloc.hugetlb=0', 1),
    # As after a restart that lost the setting on its way.
    ({'LORA_JAX_STARTED_AGAIN': '1'}, 'None', 1),
  ],
)
def test_a_process_starts_again_at_most_once_for_large_pages(tmp_path, held, becomes, starts):
  script = tmp_path / 'says.py'
  script.write_text(SAYS)
  others = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
  env = {**others, 'PYTHONPATH': str(ROOT), **held}
  command = [sys.executable, str(script), '--rank=4', 'a b']
  said = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
  assert said.splitlines() == ['started'] * starts + [f"{becomes} ['--rank=4', 'a b']"]


@pytest.mark.parametrize(
  ('text', 'fast'),
  [
    ('flags : fma avx2 avx512f avx512_bf16 avx512_vnni', True),
    ('flags : fma avx avx2 f16c', False),
    ('Features : fp asimd i8mm bf16', True),
  ],
)
def test_a_cpu_has_bfloat16_where_it_says_so(tmp_path, text, fast):
  (tmp_path / 'cpuinfo').write_text(text)
  assert _launcher.cpu_has_bfloat16(tmp_path / 'cpuinfo') is fast


def test_a_system_that_does_not_tell_has_no_fast_bfloat16(tmp_path):
  assert not _launcher.cpu_has_bfloat16(tmp_path / 'missing')


@pytest.mark.parametrize('command', ['ablate', 'train', 'evaluate'])
def test_help_lists_the_flags_that_commands_share(command):
  done = subprocess.run(
    [sys.executable, '-m', f'experiments.{command}', '--help'],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=True,
  )
  listed = set(re.findall(r'^  --(?:\[no\])?(\w+)', done.stdout, re.MULTILINE))
  assert {'base', 'data', 'dtype', 'max_length', 'quantize'} <= listed
  if command == 'ablate':
    table = (ROOT / 'README.md').read_text().split('| flag | |')[1].split('\n\n')[0]
    promised = re.findall(r'--(\w+)', ''.join(re.findall(r'^\| `(.*?)` \|', table, re.MULTILINE)))
    assert len(promised) > 20
    assert {*promised} <= listed

"""A record says which of this project made it, and on what."""

import os
import shutil
import subprocess

import pytest

import lora_jax
from lora_jax import versions

X86 = 'processor\t: 0\nmodel name\t: AMD EPYC 9454 48-Core Processor\nflags\t\t: avx512_bf16\n'


def git(root, *arguments):
  own = ('-c', 'user.name=A', '-c', 'user.email=a@b.c', '-C', str(root))
  subprocess.run(['git', *own, *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which('git') is None, reason='needs git')
def test_a_checkout_is_named_by_its_commit_and_by_what_was_changed(tmp_path, monkeypatch):
  for name in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE'):
    monkeypatch.delenv(name, raising=False)
  (tmp_path / 'package').mkdir()
  (tmp_path / 'x.py').write_text('1')
  git(tmp_path, 'init', '-q')
  assert versions.commit.__wrapped__(tmp_path) is None
  git(tmp_path, 'add', '.')
  git(tmp_path, 'commit', '-qm', 'one')
  git(tmp_path, 'tag', 'v1', '-m', 'a name that says less')
  said = subprocess.run(
    ['git', '-C', str(tmp_path), 'rev-parse', 'HEAD'], check=True, capture_output=True, text=True
  )
  assert versions.commit.__wrapped__(tmp_path) == said.stdout[:12]
  (tmp_path / 'x.py').write_text('2')
  assert versions.commit.__wrapped__(tmp_path) == f'{said.stdout[:12]}-dirty'
  # Installed below a repository that has nothing to do with it.
  assert versions.commit.__wrapped__(tmp_path / 'package') is None


def test_without_git_there_is_no_commit_and_no_error(tmp_path, monkeypatch):
  (tmp_path / '.git').mkdir()
  monkeypatch.setenv('PATH', str(tmp_path))
  assert versions.commit.__wrapped__(tmp_path) is None
  monkeypatch.setattr(versions, 'commit', lambda: None)
  found = versions.versions()
  assert 'commit' not in found
  assert found['lora_jax'] == lora_jax.__version__


def test_a_cpu_is_known_by_its_model_and_usable_cores(tmp_path, monkeypatch):
  (tmp_path / 'x86').write_text(X86)
  (tmp_path / 'arm').write_text('processor\t: 0\nFeatures\t: bf16\n')
  monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {2, 5}, raising=False)
  assert versions.processor(tmp_path / 'x86') == 'AMD EPYC 9454 48-Core Processor, 2 cores'
  monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {2})
  monkeypatch.setattr('platform.processor', lambda: 'arm')
  assert versions.processor(tmp_path / 'arm') == 'arm, 1 core'
  assert versions.processor(tmp_path / 'none') == 'arm, 1 core'
  found = versions.versions()
  assert (found['device'], found['processor']) == ('cpu', versions.processor())

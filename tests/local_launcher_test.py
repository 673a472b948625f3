"""launch/local.py: which Python, when to install, and what a mistake says."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local

HERE = f'{sys.version_info[0]}.{sys.version_info[1]}'


@pytest.fixture
def checkout(tmp_path):
  (tmp_path / 'setup.py').write_text('first')
  (tmp_path / 'experiments').mkdir()
  for name in ('ablate', 'train', '_shared'):
    (tmp_path / 'experiments' / f'{name}.py').touch()
  return tmp_path


class FakeRun:
  """Stands in for `venv` and `pip`: notes the calls, makes the interpreter's file."""

  def __init__(self, fail_on=None):
    self.calls, self.fail_on = [], fail_on

  def __call__(self, command, log):
    tool = command[command.index('-m') + 1]
    self.calls.append(tool)
    with log.open('a') as file:
      file.write(f'{tool} {command[-1]}\n')
    if tool == 'venv':
      python = Path(command[-1]) / 'bin' / 'python'
      python.parent.mkdir(parents=True, exist_ok=True)
      python.touch()
    return int(tool == self.fail_on)


def search_of(*versions):
  """A machine that has just these versions."""
  return lambda v: (
    local.Interpreter(v, f'/opt/python{v}') if v in versions else local.LaunchError(f'no {v}')
  )


def make(checkout, run, extras=(), versions=local.RUN_VERSIONS, has=('3.11', '3.12')):
  return local.environment(versions, extras, checkout, search_of(*has), run)


@pytest.mark.parametrize(
  ('order', 'has', 'chosen'),
  [
    (local.RUN_VERSIONS, ('3.11', '3.12', '3.13'), '3.12'),
    (local.RUN_VERSIONS, ('3.11', '3.13'), '3.13'),
    (local.RUN_VERSIONS, ('3.11',), '3.11'),
    (local.TEST_VERSIONS, ('3.11', '3.12', '3.13'), '3.11'),
    (local.TEST_VERSIONS, ('3.13', '3.12'), '3.12'),
    (('3.13',), ('3.11', '3.12', '3.13'), '3.13'),
  ],
)
def test_takes_the_best_python_there_is(checkout, order, has, chosen):
  python = make(checkout, FakeRun(), versions=order, has=has)
  assert python == checkout / '.venv' / chosen / 'bin' / 'python'


def test_find_passes_over_what_does_not_run_or_is_another_version():
  answers = {
    'shim': None,
    'other': local.Interpreter('3.10', '/other'),
    'good': local.Interpreter('3.12', '/good'),
    'late': local.Interpreter('3.12', '/late'),
  }
  assert local.find('3.12', answers, answers.get) == answers['good']
  assert 'no Python 3.13' in str(local.find('3.13', answers, answers.get))


def test_find_says_what_a_python_lacks():
  def bare(path):
    raise local.LaunchError(f'{path} cannot make environments')

  assert '/usr/bin/python3.12' in str(local.find('3.12', ['/usr/bin/python3.12'], bare))


def test_candidates_are_running_then_path_then_newest_of_pyenv(tmp_path):
  shim = tmp_path / 'shims' / 'python3.12'
  shim.parent.mkdir()
  shim.write_text('#!/bin/sh\nexit 127\n')
  shim.chmod(0o755)
  for release in ('3.12.9', '3.12.10', '3.1.12', '3.13.0'):
    (tmp_path / 'versions' / release).mkdir(parents=True)
  environ = {'PATH': f'{shim.parent}{os.pathsep}/nowhere', 'PYENV_ROOT': str(tmp_path)}
  assert local.candidates('3.12', environ, '/running') == [
    '/running',
    str(shim),
    str(tmp_path / 'versions' / '3.12.10' / 'bin' / 'python'),
    str(tmp_path / 'versions' / '3.12.9' / 'bin' / 'python'),
  ]
  assert local.probe(str(shim)) is None


def test_probe_knows_the_running_python():
  assert local.probe(sys.executable) == local.Interpreter(HERE, os.path.realpath(sys.executable))


def test_second_run_installs_nothing(checkout):
  run = FakeRun()
  first = make(checkout, run)
  assert run.calls == ['venv', 'pip']
  assert make(checkout, run) == first
  assert run.calls == ['venv', 'pip']


def test_ready_environment_is_used_without_looking_for_its_python(checkout):
  make(checkout, FakeRun())
  refuse = lambda version: pytest.fail('looked for an interpreter')
  assert local.environment(local.RUN_VERSIONS, (), checkout, refuse).exists()


def test_changed_setup_is_installed_over_the_old_and_keeps_extras(checkout):
  run = FakeRun()
  make(checkout, run, extras=('test',), versions=('3.12',))
  (checkout / 'setup.py').write_text('second')
  make(checkout, run)
  assert run.calls == ['venv', 'pip', 'pip']
  assert (checkout / '.venv' / '3.12.log').read_text().endswith(f'pip {checkout}[test]\n')


def test_missing_extra_is_added_and_a_present_one_is_enough(checkout):
  run = FakeRun()
  make(checkout, run)
  make(checkout, run, extras=('test',), versions=('3.12',))
  assert run.calls == ['venv', 'pip', 'pip']
  make(checkout, run)
  assert run.calls == ['venv', 'pip', 'pip']


@pytest.mark.parametrize('tool', ['venv', 'pip'])
def test_half_made_environment_is_made_again(checkout, tool, capsys):
  with pytest.raises(local.LaunchError, match=rf'^{tool} failed .*3\.12\.log') as caught:
    make(checkout, FakeRun(fail_on=tool))
  assert '\n' not in str(caught.value)
  assert f'{tool} {checkout}' in capsys.readouterr().err
  run = FakeRun()
  make(checkout, run)
  assert run.calls == ['venv', 'pip']


def test_failed_update_does_not_pass_for_the_old_environment(checkout):
  make(checkout, FakeRun())
  (checkout / 'setup.py').write_text('second')
  with pytest.raises(local.LaunchError):
    make(checkout, FakeRun(fail_on='pip'))
  (checkout / 'setup.py').write_text('first')
  run = FakeRun()
  make(checkout, run)
  assert run.calls == ['venv', 'pip']


def test_moved_checkout_and_removed_python_are_made_again(checkout, tmp_path_factory):
  run = FakeRun()
  python = make(checkout, run)
  python.unlink()
  make(checkout, run)
  assert run.calls == ['venv', 'pip'] * 2
  moved = tmp_path_factory.mktemp('elsewhere') / 'checkout'
  checkout.rename(moved)
  make(moved, run)
  assert run.calls == ['venv', 'pip'] * 3


def _slow_first_run(checkout, calls):
  def run(command, log):
    time.sleep(0.1)
    calls.append(command[command.index('-m') + 1])
    return FakeRun()(command, log)

  make(checkout, run)


def test_two_first_runs_at_once_make_one_environment(checkout):
  # Spawned, since forking a process that holds JAX's threads is a warning.
  context = multiprocessing.get_context('spawn')
  with context.Manager() as manager:
    calls = manager.list()
    both = [context.Process(target=_slow_first_run, args=(checkout, calls)) for _ in range(2)]
    for process in both:
      process.start()
    for process in both:
      process.join()
    assert list(calls) == ['venv', 'pip']
    assert [process.exitcode for process in both] == [0, 0]
  assert json.loads((checkout / '.venv' / '3.12' / 'stamp.json').read_text())['extras'] == []


def test_plan_reads_command_and_its_arguments(checkout):
  assert local.plan(['ablate', '--targets=o_proj,fc2'], checkout) == (
    local.RUN_VERSIONS,
    (),
    ['-m', 'experiments.ablate', '--targets=o_proj,fc2'],
  )
  (checkout / 'experiments' / 'serve.py').write_text('')
  assert local.plan(['serve'], checkout)[1] == ('serve',)
  versions, extras, rest = local.plan(['--python=3.13', 'test', '-q'], checkout)
  assert (versions, extras, rest) == (
    ('3.13',),
    ('test',),
    ['-m', 'pytest', *local.PARALLEL, '-q'],
  )


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    ([], 'no command given; one of: ablate, train, test, python'),
    (['banana'], "unknown command 'banana'; one of: ablate, train, test, python"),
    (['_shared'], 'unknown command'),
    (['--fast', 'ablate'], 'unknown option --fast'),
    (['--python', '3.12', 'ablate'], '--python=VERSION_OR_PATH'),
  ],
)
def test_mistakes_on_the_command_line(checkout, arguments, says):
  with pytest.raises(local.LaunchError, match=says.replace('.', r'\.')) as caught:
    local.plan(arguments, checkout)
  assert '\n' not in str(caught.value)


def test_no_suitable_python_names_what_is_needed_and_what_was_found(checkout):
  with pytest.raises(local.LaunchError, match=r'3\.11, 3\.12, 3\.13: no 3\.12; no 3\.13; no 3\.11'):
    make(checkout, FakeRun(), has=())


@pytest.mark.parametrize('python', ['2.7', 'banana', '/nowhere/python'])
def test_unsuitable_choice_of_python(checkout, python):
  with pytest.raises(local.LaunchError, match=f'--python={python}'):
    make(checkout, FakeRun(), versions=(python,))


def test_a_mistake_is_one_line_and_exit_code_2():
  done = subprocess.run(
    [sys.executable, local.__file__, 'banana'], capture_output=True, text=True, check=False
  )
  assert done.returncode == 2
  assert done.stdout == ''
  assert done.stderr.startswith('error: ')
  assert done.stderr.count('\n') == 1

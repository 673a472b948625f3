"""What a user can mend is one line and an exit code; what is a fault of ours stays one."""

from pathlib import Path

import pytest

from lora_jax.errors import UserError, exit_on_user_error


def leave(error, capsys):
  with pytest.raises(SystemExit) as ended, exit_on_user_error():
    raise error
  said = capsys.readouterr()
  assert said.out == ''
  return ended.value.code, said.err.strip()


@pytest.mark.parametrize(
  ('error', 'says'),
  [
    (UserError('no row; give one'), 'error: no row; give one'),
    (FileExistsError(17, 'File exists', '/a/b'), 'error: /a/b: File exists'),
    (
      OSError(28, 'No space left on device'),
      'error: No space left on device; make room, the same command goes on from there',
    ),
    (OSError(36, 'File name too long', 'x'), 'error: x: File name too long'),
  ],
)
def test_a_mistake_is_one_line_and_code_2(error, says, capsys):
  assert leave(error, capsys) == (2, says)


def test_a_home_that_does_not_exist_is_one_line(capsys):
  with pytest.raises(SystemExit) as left, exit_on_user_error():
    Path('~no_such_user/x').expanduser()
  assert left.value.code == 2
  assert capsys.readouterr().err.startswith('error: a path begins with "~"')


@pytest.mark.parametrize(
  'error', [RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating'), MemoryError()]
)
def test_no_memory_left_says_what_to_lower(error, capsys):
  code, said = leave(error, capsys)
  assert code == 2
  assert said.startswith('error: out of memory; lower --tokens_per_batch')
  assert len(said.splitlines()) == 1


def test_ctrl_c_is_130(capsys):
  assert leave(KeyboardInterrupt(), capsys) == (130, 'stopped')


@pytest.mark.parametrize('error', [RuntimeError('a fault'), OSError('socket'), SystemExit(3)])
def test_anything_else_passes(error):
  with pytest.raises(type(error)) as passed, exit_on_user_error():
    raise error
  assert passed.value is error

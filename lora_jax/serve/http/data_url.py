"""Images as chats send them: within the request. Nothing is ever fetched, nor read from a disk."""

import base64
import binascii
import re
from typing import Any

# RFC 2397, of which base64 alone is taken.
_HEAD = re.compile(
  r'data:image/[\w.+-]{1,64}(;[\w.-]{1,64}=[\w.-]{1,64}){0,4};base64,', re.IGNORECASE
)
# How exactly to look, as OpenAI's interface has it; there is one way here, and it is exact.
_DETAILS = ('auto', 'high', None)


def read(value: Any) -> bytes:
  """The encoded image of a part's `image_url`.

  Args:
    value: `{"url": ...}`, or the URL alone.

  Raises:
    ValueError: it is no such thing; the message says what would be.
  """
  held = {'url': value} if isinstance(value, str) else value
  if not isinstance(held, dict) or not isinstance(held.get('url'), str):
    raise ValueError('image_url is {"url": "data:image/png;base64,..."}')
  if held.get('detail') not in _DETAILS:
    raise ValueError(f'an image has detail {held["detail"]!r}, and there is only "auto" or "high"')
  found = _HEAD.match(held['url'])
  if found is None:
    raise ValueError(
      'an image comes within the request, as "data:image/png;base64,..."; nothing is fetched'
    )
  try:
    data = base64.b64decode(held['url'][found.end() :], validate=True)
  except (binascii.Error, ValueError):
    raise ValueError('an image is no base64; encode its file anew') from None
  if not data:
    raise ValueError('an image is empty; send its file')
  return data

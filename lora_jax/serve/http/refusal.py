"""A request that is not answered, and how that is said: OpenAI's form of an error."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_KINDS = {401: 'authentication_error', 429: 'rate_limit_error'}


class RefusalError(Exception):
  """Why a request is not answered.

  Attributes:
    status: of HTTP.
    content: what is said.
    headers: that go with it.
  """

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    """Says it.

    Args:
      status: of HTTP.
      message: one line: what is wrong and what would work.
      param: the part of the request that is wrong.
      code: a word for programs.
      headers: that go with it.
    """
    super().__init__(message)
    kind = 'server_error' if status >= 500 else _KINDS.get(status, 'invalid_request_error')
    self.status, self.headers = status, headers
    self.content: dict[str, Any] = {
      'error': {'message': message, 'type': kind, 'param': param, 'code': code}
    }

  @property
  def response(self) -> JSONResponse:
    """It, to be sent."""
    return JSONResponse(self.content, self.status, self.headers)


def later(status: int, message: str, seconds: float, code: str) -> RefusalError:
  """A refusal that would be none in so many seconds."""
  return RefusalError(
    status, message, code=code, headers={'Retry-After': str(max(1, round(seconds)))}
  )

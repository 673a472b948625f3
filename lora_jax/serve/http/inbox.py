"""Answers on their way from the engine's thread to a coroutine.

  inbox = Inbox(runner)
  try:
    await asyncio.to_thread(inbox.submit, requests)
    while inbox.expects:
      for news in await inbox.news():
        print(news.index, news.text)
  finally:
    inbox.close()

The engine never waits for whoever reads: what comes meanwhile is put together, and is never
more than the answers.
"""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Iterable

from lora_jax.serve.answer import Answer, Finish, Request
from lora_jax.serve.runner import Runner


@dataclasses.dataclass
class News:
  """What has been said since the last time.

  Attributes:
    index: of the request.
    answer: to it.
    text: the next of it, maybe none.
    finish: how it ended, or None: it goes on.
  """

  index: int
  answer: Answer
  text: str = ''
  finish: Finish | None = None


class Inbox:
  """The answers to some requests, for one coroutine.

  Attributes:
    answers: to what was submitted, in that order.
  """

  def __init__(self, runner: Runner):
    """Empty; for the event loop that runs."""
    self.answers: list[Answer] = []
    self._runner = runner
    self._loop = asyncio.get_running_loop()
    self._news: dict[int, News] = {}
    self._some = asyncio.Event()
    self._ended = 0
    self._closed = False

  @property
  def expects(self) -> bool:
    """Whether there is more to come of what was submitted."""
    return self._ended < len(self.answers)

  def submit(self, requests: Iterable[Request]) -> None:
    """Puts requests into the engine's queue; for any thread, since it may read a disk.

    Raises:
      UserError: as `Runner.submit`.
    """
    # Whoever waited for a thread may have left.
    if self._closed:
      return
    for index, request in enumerate(requests):
      answer = self._runner.submit(request, functools.partial(self._deliver, index))
      self.answers.append(answer)
      # Whoever closes meanwhile may not have seen this one.
      if self._closed:
        self._runner.cancel(answer)
        return

  async def news(self) -> list[News]:
    """What is new, as soon as there is something."""
    await self._some.wait()
    self._some.clear()
    news, self._news = self._news, {}
    self._ended += sum(one.finish is not None for one in news.values())
    return [*news.values()]

  def close(self) -> None:
    """Cancels what has not ended; its rows and slots are free."""
    self._closed = True
    for answer in [*self.answers]:
      if answer.finish is None:
        self._runner.cancel(answer)

  def _deliver(self, index: int, answer: Answer, piece: str) -> None:
    # The loop may be closed, and then nobody waits.
    with contextlib.suppress(RuntimeError):
      self._loop.call_soon_threadsafe(self._take, index, answer, piece, answer.finish)

  def _take(self, index: int, answer: Answer, piece: str, finish: Finish | None) -> None:
    news = self._news.setdefault(index, News(index, answer))
    news.text += piece
    news.finish = finish
    self._some.set()

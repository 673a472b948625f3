"""An engine in a thread of its own, and requests from any other.

Leaving the block waits for all answers:

  with Runner(engine) as runner:
    for piece in runner.stream(Request(ids, adapter='medicine')):
      print(piece, end='', flush=True)
"""

import concurrent.futures
import queue
import threading
from collections.abc import Callable, Generator
from types import TracebackType
from typing import TypeVar

from lora_jax.errors import UserError
from lora_jax.serve.answer import Answer, Request
from lora_jax.serve.engine import Engine

Result = TypeVar('Result')


class StoppedError(UserError):
  """Nothing is answered any more."""


class Runner:
  """Steps an engine while there is something to answer.

  Attributes:
    error: what ended the thread, if something did; then nothing is answered any more.
  """

  def __init__(self, engine: Engine):
    """Takes the engine for itself until it is closed."""
    self._engine = engine
    self.error: Exception | None = None
    self._closing = False
    self._calls: list[Callable[[], None]] = []
    # Guards `_calls` and `_closing`, and wakes the thread.
    self._wake = threading.Condition()
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)

  def __enter__(self) -> 'Runner':
    self._thread.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close(drain=error is None)

  def submit(self, request: Request, deliver: Callable[[Answer, str], None]) -> Answer:
    """As `Engine.submit`; `deliver` is called on the engine's thread.

    Raises:
      UserError: as there.
      StoppedError: nothing is answered any more.
    """
    answer = self._engine.prepare(request, deliver)
    self._call(lambda: self._engine.enqueue(answer))
    return answer

  def cancel(self, answer: Answer) -> None:
    """Ends an answer before the next step, unless it has ended."""
    # Where nothing is answered any more, it has ended.
    with self._wake:
      if not self._over:
        self._calls.append(lambda: self._engine.cancel(answer))
        self._wake.notify()

  def stream(self, request: Request) -> Generator[str]:
    """The pieces of an answer; it is cancelled where they are not all taken.

    Raises:
      UserError: as `submit`, or the answer failed.
    """
    pieces: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
    deliver = lambda answer, piece: pieces.put((piece, answer.finish is not None))
    answer = self.submit(request, deliver)
    try:
      over = False
      while not over:
        piece, over = pieces.get()
        if piece:
          yield piece
    finally:
      self.cancel(answer)
    if answer.finish == 'failed':
      raise UserError(answer.error)

  def unload(self, name: str) -> None:
    """As `Engine.unload`.

    Raises:
      UserError: as there.
      StoppedError: nothing is answered any more.
    """
    self._result(lambda: self._engine.unload(name))

  def close(self, drain: bool = True) -> None:
    """Takes no more requests, and returns when all answers have ended.

    Args:
      drain: give them to their end, or cut them short.

    Raises:
      Exception: what ended the thread before.
    """
    with self._wake:
      self._closing = True
      if not drain:
        self._calls.append(lambda: self._engine.abandon('the server stops'))
      self._wake.notify()
    self._thread.join()
    if self.error is not None:
      raise self.error

  def _result(self, function: Callable[[], Result]) -> Result:
    """What a function says that is called on the engine's thread."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def call():
      try:
        future.set_result(function())
      except UserError as error:
        future.set_exception(error)

    self._call(call)
    return future.result()

  def _call(self, call: Callable[[], None]) -> None:
    with self._wake:
      if self._over:
        raise StoppedError('the server stops; ask again when it runs')
      self._calls.append(call)
      self._wake.notify()

  @property
  def _over(self) -> bool:
    return self._closing or self.error is not None

  def _run(self) -> None:
    engine = self._engine
    try:
      while True:
        with self._wake:
          self._wake.wait_for(lambda: self._calls or self._closing or engine.busy)
          calls, self._calls = self._calls, []
          if self._closing and not calls and not engine.busy:
            return
        for call in calls:
          call()
        if engine.busy:
          engine.step()
    except Exception as error:
      # Whoever waits must hear of it: there is no other thread to answer them.
      with self._wake:
        self.error = error
        calls, self._calls = self._calls, []
      for call in calls:
        call()
      engine.abandon(f'the engine stopped: {error}')

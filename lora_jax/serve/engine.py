"""Answers many requests at once over one base, each with an adapter of its own or none.

  engine = Engine(model, params, tokenizer, ServeConfig(), Path('adapters'))
  engine.warm_up()
  answer = engine.submit(Request(tokenizer.encode_chat(messages), adapter='medicine'))
  while engine.busy:
    engine.step()
  print(answer.text)

Requests come and go at any step (continuous batching). Prompts are padded to one of few
lengths, and those of one length that come together are read together (one with images by
itself); then every step gives
each row its next token, in one program for all of them, whatever their adapters and however
they are sampled. After `warm_up` nothing is compiled. An engine is used by one thread, as
`runner` has it; `prepare` by any.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.bank_kernel import NONE
from lora_jax.config import ImageConfig
from lora_jax.errors import UserError
from lora_jax.head import head_kernel
from lora_jax.hub import peft
from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.sampling import GREEDY
from lora_jax.serve.answer import Answer, Request
from lora_jax.serve.bank import AdapterBank, Updates
from lora_jax.serve.config import ServeConfig
from lora_jax.serve.library import Library, Listing
from lora_jax.serve.likelihood import MOST, Likelihoods
from lora_jax.serve.looking import Looker
from lora_jax.serve.rows import Asked, Chosen, Rows, Seat, decode, read_prompts
from lora_jax.serve.schedule import Schedule
from lora_jax.serve.slots import Slots
from lora_jax.transformer import Transformer
from lora_jax.vision import Features


@dataclasses.dataclass(frozen=True)
class Counts:
  """What an engine has done, and what it is at.

  Attributes:
    waiting: requests that wait.
    seated: rows in which one is answered.
    free_rows: rows in which none is.
    slots_in_use: slots of adapters that are being answered with.
    prompt_tokens: read so far.
    answer_tokens: chosen so far, for those who wanted them.
    loads: adapters written to a slot.
  """

  waiting: int
  seated: int
  free_rows: int
  slots_in_use: int
  prompt_tokens: int
  answer_tokens: int
  loads: int


class Engine:
  """Rows, slots and a queue over one base.

  Attributes:
    library: the adapters that there are.
    bank: those that are on the device.
    config: how much there is room for.
    looker: what looks at images, or None where the base does not see.
  """

  def __init__(
    self,
    model: Transformer,
    params: Mapping[str, Any],
    tokenizer: ChatTokenizer,
    config: ServeConfig,
    adapters: Path | None = None,
    images: ImageConfig | None = None,
  ):
    """Takes all memory that it will ever take on the device.

    Args:
      model: the Transformer.
      params: the base, on the device.
      tokenizer: the base's.
      config: how much there is room for.
      adapters: holds a directory in PEFT's format for each adapter; None: there are none.
      images: how images are made ready for the base; None: requests have none.

    Raises:
      UserError: there is no such directory, or a target matches nothing.
    """
    self.config = config
    self.bank = AdapterBank(params, config, model.dtype)
    self.library: Library[Updates] = Library(adapters, self._load, config.host_bytes)
    self.looker = None if images is None else Looker(model, params, images)
    self._model, self._params, self._tokenizer = model, params, tokenizer
    self._head = jax.jit(head_kernel, static_argnums=(0, 2))(model, params, config.rows)
    self._rows = Rows.empty(model.config, config.rows, config.length, model.dtype)
    self._chosen = Chosen.empty(model.config, config.rows)
    self._slots: Slots[Listing] = Slots(config.slots)
    self._schedule: Schedule[Answer] = Schedule(config.rows, config.length)
    self._prompt_tokens = self._answer_tokens = self._loads = 0

  def warm_up(self) -> None:
    """Compiles every program; only while nothing is answered."""
    self.bank.warm_up()
    for length in self.config.lengths:
      one = ([0], Seat.of(0, NONE, 1, GREEDY))
      for count in {1, self.config.together(length)}:
        self._read_prompts(length, [one] * count, Asked.of(False))
      if self.looker is not None:
        nothing = np.zeros((0, self._model.config.model_dim), self._model.dtype)
        self._read_prompts(length, [one], Asked.of(False), nothing)
      self._decode(length, Asked.of(False))
    if self.looker is not None:
      self.looker.warm_up()
    jax.block_until_ready(self._chosen)

  @property
  def busy(self) -> bool:
    """Whether a step would do something."""
    return bool(self._schedule.waiting or self._schedule.seated)

  @property
  def counts(self) -> Counts:
    """What it has done, and what it is at."""
    schedule, slots = self._schedule, self._slots
    at = (schedule.waiting, len(schedule.seated), schedule.free, slots.in_use)
    return Counts(*at, self._prompt_tokens, self._answer_tokens, self._loads)

  @property
  def on_device(self) -> tuple[str, ...]:
    """Names of the adapters in slots, the least recently used first."""
    return tuple(listing.name for listing in self._slots.held)

  def submit(
    self, request: Request, deliver: Callable[[Answer, str], None] = lambda answer, piece: None
  ) -> Answer:
    """Puts a request into the queue.

    Args:
      request: what is asked.
      deliver: called by `step` with the answer and its next piece of text, and a last time,
        maybe without text, once `finish` is set. It may not block, nor raise.

    Raises:
      UserError: as `prepare`.
    """
    answer = self.prepare(request, deliver)
    self.enqueue(answer)
    return answer

  def prepare(self, request: Request, deliver: Callable[[Answer, str], None]) -> Answer:
    """Checks a request, and reads its adapter from disk where it must; for any thread.

    Raises:
      UserError: the prompt is empty, too long or no tokens of this base; no token is asked
        for, or more than there is room for; likelihoods of too many tokens are; there is no
        such adapter, or it is damaged; an image is.
    """
    count, room = len(request.prompt), self.config.length
    if not count:
      raise UserError('the prompt is empty; give at least one token')
    if count >= room:
      raise UserError(f'the prompt has {count} tokens, and there is room for {room - 1}')
    vocabulary = self._model.config.vocab_size
    if not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
      raise UserError(f'the prompt has tokens that are not in 0-{vocabulary - 1}')
    limit = room - count if request.max_tokens is None else request.max_tokens
    if limit < 0 or not (limit or request.echo):
      raise UserError(f'max_tokens is {limit}; ask for at least 1')
    if not 0 <= (request.likeliest or 0) <= MOST:
      raise UserError(f'{request.likeliest} likeliest tokens are asked for; ask for 0 to {MOST}')
    if count + limit > room:
      raise UserError(
        f'the prompt has {count} tokens and the answer may have {limit}, and there is room for '
        f'{room} together'
      )
    listing = self.library.find(request.adapter) if request.adapter else None
    if listing is not None:
      # So that the step that seats it seldom waits for a disk.
      self.library.fetch(listing)
    seen = None
    if request.images:
      if self.looker is None:
        raise UserError('this base does not see; ask it without images')
      seen = self.looker.look(request.images)
    cost = self.config.padded(count)
    return Answer(request, listing, cost, limit, self._tokenizer, deliver, seen)

  def enqueue(self, answer: Answer) -> None:
    """Puts what was prepared into the queue."""
    self._schedule.add(answer)

  def cancel(self, answer: Answer) -> None:
    """Ends an answer; its row and its slot are free at once. One that has ended stays so."""
    if answer.finish is None:
      self._leave(answer)
      answer.cancel()

  def unload(self, name: str) -> None:
    """Takes an adapter off the list; who asked for it before is still answered with it.

    Raises:
      UserError: there is none of this name.
    """
    self._slots.forget(self.library.remove(name))

  def abandon(self, error: str) -> None:
    """Ends all answers, because of an error."""
    for answer in self._schedule.all:
      self._leave(answer)
      answer.fail(error)

  def step(self) -> None:
    """Seats who can be seated, and gives each who sits their next token."""
    of_length: dict[int, list[tuple[Answer, Seat]]] = {}
    for answer, row, slot in self._schedule.seat(self._acquire):
      seat = Seat.of(row, slot, len(answer.request.prompt), answer.request.sampling)
      of_length.setdefault(answer.cost, []).append((answer, seat))
      self._prompt_tokens += len(answer.request.prompt)
    asked = Asked.of(_ask(self._schedule.seated))
    read = [
      reading
      for length, those in of_length.items()
      for reading in self._read(length, those, bool(asked.chosen))
    ]
    seated, chosen = self._schedule.seated, self._chosen
    # What follows the tokens at hand is begun before they are looked at, so that the device
    # does not wait for the host.
    if any(len(answer.ids) + 1 < answer.limit for answer in seated):
      reach = max(len(answer.request.prompt) + len(answer.ids) for answer in seated)
      self._decode(reach, asked)
    if not seated:
      return
    for answers, likelihoods_PT in read:
      _tell(answers, likelihoods_PT)
    ids = np.asarray(chosen.tokens_B).tolist()
    likelihoods_B = chosen.likelihoods_B.fetch() if asked.chosen else None
    for answer, row in seated.items():
      # Whoever is told of one answer may have cancelled another.
      if answer.finish is not None:
        continue
      likeliest = answer.request.likeliest
      if not answer.limit:
        answer.skip()
      else:
        if likelihoods_B is not None and likeliest is not None:
          answer.likelihoods.append(likelihoods_B.at(row, ids[row], likeliest))
        answer.push(ids[row])
        self._answer_tokens += 1
      if answer.finish is not None:
        self._leave(answer)

  def _acquire(self, answer: Answer) -> int | None:
    """The slot that an answer's adapter is in, written now if it was not there."""
    if answer.listing is None:
      return NONE
    found = self._slots.acquire(answer.listing)
    if found is None:
      return None
    slot, new = found
    if new:
      try:
        updates = self.library.fetch(answer.listing)
      except UserError as error:
        # It was read before, and has been lost on disk and in memory.
        self._slots.forget(answer.listing)
        self._slots.release(answer.listing)
        self._schedule.leave(answer)
        answer.fail(str(error))
        return None
      self.bank.write(slot, updates)
      self._loads += 1
    return slot

  def _leave(self, answer: Answer) -> None:
    if self._schedule.leave(answer) and answer.listing is not None:
      self._slots.release(answer.listing)

  def _load(self, directory: Path) -> Updates:
    return self.bank.fit(peft.read(directory, self._params), directory.name)

  def _read(
    self, length: int, those: Sequence[tuple[Answer, Seat]], chosen: bool
  ) -> Iterator[tuple[Sequence[Answer], Likelihoods]]:
    """Reads the prompts of one length; whose likelihoods are asked for, and all of theirs."""
    most = self.config.together(length)
    texts = [one for one in those if one[0].seen is None]
    parts = [texts[at : at + most] for at in range(0, len(texts), most)]
    for some in [*parts, *([one] for one in those if one[0].seen is not None)]:
      answers = [answer for answer, _ in some]
      prompts = [(answer.request.prompt, seat) for answer, seat in some]
      # One alone has a program of its own; of more, the last fills up.
      prompts += [prompts[-1]] * (most - len(some) if len(some) > 1 else 0)
      told = _ask(answer for answer in answers if answer.request.echo)
      likelihoods_PT = self._read_prompts(length, prompts, Asked.of(chosen, told), answers[0].seen)
      answers[0].seen = None
      if told:
        yield answers, likelihoods_PT

  def _read_prompts(
    self,
    length: int,
    those: Sequence[tuple[Sequence[int], Seat]],
    asked: Asked,
    seen: np.ndarray | None = None,
  ) -> Likelihoods:
    prompts_PT = np.zeros((len(those), length), np.int32)
    for padded_T, (prompt, _) in zip(prompts_PT, those, strict=True):
      padded_T[: len(prompt)] = prompt
    seats = jax.tree.map(lambda *leaves: np.stack(leaves), *(seat for _, seat in those))
    features = None
    if seen is not None and self.looker is not None:
      # Room for as many as there can be, so that images of any size are one program.
      values_1ED: Any = np.zeros((1, length, seen.shape[-1]), seen.dtype)
      values_1ED[0, : len(seen)] = seen
      slots_1T: Any = self.looker.eyes.slots(prompts_PT)
      features = Features(values_1ED, slots_1T)
    state = (self._rows, self._chosen, prompts_PT, seats, asked, features)
    self._rows, self._chosen, likelihoods_PT = read_prompts(*self._program, *state)
    return likelihoods_PT

  def _decode(self, reach: int, asked: Asked) -> None:
    state = (self._rows, self._chosen, asked, self.config.padded(reach))
    self._rows, self._chosen = decode(*self._program, *state)

  @property
  def _program(self) -> tuple[Any, ...]:
    """What both programs begin with."""
    return self._model, self._params, self.bank.held, self._head


def _ask(answers: Iterable[Answer]) -> bool:
  """Whether likelihoods are asked for by any of them."""
  return any(answer.request.likeliest is not None for answer in answers)


def _tell(answers: Sequence[Answer], likelihoods_PT: Likelihoods) -> None:
  """Gives answers the likelihoods of their prompts, in whose order they are."""
  on_host = likelihoods_PT.fetch()
  for i, answer in enumerate(answers):
    likeliest, prompt = answer.request.likeliest, answer.request.prompt
    if answer.request.echo and likeliest is not None:
      own_T = jax.tree.map(lambda leaf, i=i: leaf[i], on_host)
      # After each token comes the next.
      answer.of_prompt += [own_T.at(j, token, likeliest) for j, token in enumerate(prompt[1:])]

"""Continuous batching: requests of any size come and go while one compiled step decodes all that run.

A request waits, is read into a free slot (prefill), gets a token a step, and leaves its slot to the next. The host
reads the tokens of a step while the devices work on the one after it. What a request leaves in its slot stays there
until the slot is needed, and with `reuse` a prompt that begins with it reads only what follows (`prefix`).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from navil_jax.batch import SampleFeatures
from navil_jax.config import ModelConfig
from navil_jax.console import Progress
from navil_jax.errors import UserError
from navil_jax.generate import prefix
from navil_jax.generate.programs import CACHE_FLOOR, TEXT_FLOOR, VISUAL_FLOOR, Programs, bucket, length_of, tokens_of
from navil_jax.generate.sampling import MOST_LOGPROBS, Chosen, Sampler
from navil_jax.generate.slots import Slots
from navil_jax.model.params import Params

MAX_TOKENS = 32768  # prompt and answer together, of one row
BATCH_SLOTS = 8  # of commands that have many questions

# Why an answer ended: its stop token, its most tokens, who asked has left, or a fault of the devices.
Reason = Literal["", "stop", "length", "cancelled", "error"]


class Token(NamedTuple):
    """A token of an answer; the others only if the request asks for log probabilities."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (id, log probability) of the likeliest, largest first


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and what becomes of it.

    Attributes:
      prompt: one sample; targets and weights play no part.
      stop_id: ends the answer and is its last token (released behaviour).
      logprobs: None: not asked for; else how many of the likeliest tokens are told beside each token.
      on_token: is called with every token as it is known; on the thread of `Engine.step`.
      on_end: is called once when `reason` is known.
      reason: empty while it waits or runs.
      cached: tokens of the prompt that were not read again, as a slot held them; known with the first token.
    """

    prompt: SampleFeatures
    sampler: Sampler
    max_new_tokens: int
    stop_id: int
    logprobs: int | None = None
    on_token: Callable[[Token], None] = lambda token: None
    on_end: Callable[[], None] = lambda: None
    reason: Reason = ""
    cancelled: bool = False
    cached: int = 0
    _asked: int = 0  # tokens that the devices were asked for
    _told: list[int] = dataclasses.field(default_factory=list)  # of them, those that were handed on

    @property
    def tokens(self) -> int:
        """The most tokens of prompt and answer together."""
        return length_of(self.prompt) + self.max_new_tokens

    def cancel(self) -> None:
        """Ends it before the next step; may be called from any thread."""
        self.cancelled = True


class Engine:
    """Runs requests with given parameters. `step` belongs to one thread; `submit` and `cancel` to any.

    Args:
      config: the model.
      params: its parameters; they are put on the mesh as in training. None: `load` comes before the first request.
      mesh: devices; None: the first device. Slots are split over its batch axes.
      max_tokens: limit of prompt and answer together, for every request.
      slots: how many requests are decoded together.
      reuse: whether a prompt is read from where a slot's content ends that it begins with. The tokens are the same but
        for rounding, so that in bfloat16 an answer may depend on what was asked before.

    Attributes:
      cached_tokens: of all prompts so far, those that were not read again.

    Example:
      engine = Engine(config, params, slots=8)
      engine.generate(prompts, Sampler(), max_new_tokens=100, stop_id=tokenizer.token_id("<|im_end|>"))
      -> [[1008, 364, 92542], ...]
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params | None,
        mesh: Mesh | None = None,
        max_tokens: int = MAX_TOKENS,
        slots: int = 1,
        reuse: bool = False,
    ):
        self.programs = Programs(config, params, mesh)
        self.max_tokens, self.reuse, self.cached_tokens = max_tokens, reuse, 0
        self._slots = Slots(self.programs, slots)
        self._held = [prefix.NOTHING] * self._slots.count  # of running requests: the prompt
        self._left = collections.deque(range(self._slots.count))  # slots, that which was left last comes last
        self._waiting: collections.deque[Request] = collections.deque()
        self._running: list[Request | None] = [None] * self._slots.count
        self._unread: collections.deque[tuple[list[Request | None], Chosen]] = collections.deque()

    def load(self, params: Params) -> None:
        """Answers with these parameters from now on; what is compiled stays. Nothing may be waiting or running."""
        self.programs.load(params)

    def unload(self) -> None:
        """Frees parameters and cache; `load` comes before the next request."""
        self.programs.params = None
        self._unread.clear()
        self._slots.forget()

    @property
    def slots(self) -> int:
        return len(self._running)

    @property
    def compilations(self) -> collections.Counter[str]:
        """Programs compiled so far by what they do: "prefill", "write", "extend", "first", "decode", "resize"."""
        return self.programs.compilations

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in a slot."""
        return sum(request is not None for request in self._running)

    @property
    def cache_use(self) -> float:
        """Share of the cache's positions that hold tokens."""
        used = sum(length_of(r.prompt) + len(r._told) for r in list(self._running) if r is not None)
        return used / max(1, self._slots.length * self.slots)

    def check(self, request: Request) -> None:
        """Raises `UserError` for a request that could never run."""
        if request.max_new_tokens < 1:
            raise UserError(f"max-new-tokens {request.max_new_tokens}: must be at least 1")
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
            raise UserError(f"logprobs {request.logprobs}: must be from 0 to {MOST_LOGPROBS}")
        if request.tokens > self.max_tokens:
            raise UserError(
                f"a prompt of {length_of(request.prompt)} tokens and {request.max_new_tokens} new ones are over the "
                f"limit of {self.max_tokens}; take fewer or smaller images, a shorter text, or fewer new tokens"
            )
        if self.programs.config.vision is None and len(request.prompt["visual_tokens"]):
            raise UserError("the model has no vision part; ask without images")

    def submit(self, request: Request) -> None:
        """Puts a request at the end of the queue. Raises `UserError` as `check`."""
        self.check(request)
        self._waiting.append(request)

    def generate(
        self, prompts: Iterable[SampleFeatures], sampler: Sampler, max_new_tokens: int, stop_id: int
    ) -> list[list[int]]:
        """The new tokens of every prompt; errors as in `check`."""
        answers: list[list[int]] = []
        requests = []
        for prompt in prompts:
            answer: list[int] = []
            answers.append(answer)
            requests.append(Request(prompt, sampler, max_new_tokens, stop_id, on_token=_append_to(answer)))
            self.check(requests[-1])
        self._waiting.extend(requests)
        while not all(request.reason for request in requests):
            self.step()
        return answers

    def step(self) -> bool:
        """Reads some waiting prompts, decodes a token of every running request, and hands on tokens.

        Returns:
          Whether anything is left to do.
        """
        try:
            self._drop_cancelled()
            self._admit()
            asked = self._decode()
            while len(self._unread) > asked:  # the newest step goes on while the host reads those before it
                self._tell(*self._unread.popleft())
        except BaseException:
            self._fail()
            raise
        return bool(asked or self._waiting or self.running)

    def warm_up(self) -> None:
        """Compiles every program that a request within `max_tokens` can need, with the longest cache."""
        shapes = _shapes(self.max_tokens, self.programs.config.vision is not None)
        lengths = sorted({bucket(tokens, CACHE_FLOOR) for tokens in range(2, self.max_tokens + 1)})
        active, nothing = np.zeros(self.slots, bool), np.zeros(0, np.int32)
        chosen: Chosen | None = None
        with Progress("compiling", len(shapes) + len(lengths), "sizes") as progress:
            for shape, least in shapes:
                logits, cache = self.programs.read_empty(*shape)
                for length in (length for length in lengths if length > least):
                    self._slots.fit(length, busy=True)
                    self._slots.fill(0, 0, cache)
                    chosen = self._slots.first(0, 0, logits, nothing, Sampler(), False)
                progress.update(1)
            for length in lengths[::-1]:
                self._slots.fit(length, busy=True)
                if self.reuse:
                    logits = self._slots.extend(0, 0, 0, np.zeros(1, np.int32))
                    self._slots.first(0, 0, logits, nothing, Sampler(), False)
                chosen = self._slots.step(active, False)
                progress.update(1)
        for length in lengths:
            self._slots.fit(length, busy=False)
        jax.block_until_ready(chosen)

    def _drop_cancelled(self) -> None:
        for request in [request for request in list(self._waiting) if request.cancelled]:
            self._waiting.remove(request)
            _end(request, "cancelled")
        for slot, running in enumerate(self._running):
            if running is not None and running.cancelled:
                self._leave(slot, running, "cancelled")

    def _admit(self) -> None:
        """Reads a waiting prompt behind what a slot holds, or as many as one prefill holds, if there are free slots."""
        new: list[tuple[int, Request]] = []
        while self._waiting and self._left and len(new) < self.programs.rows:
            request = self._waiting[0]
            content = prefix.content_of(request.prompt, self.programs.config) if self.reuse else prefix.NOTHING
            source, known = self._longest(request, content)
            if known and new:
                break
            self._waiting.popleft()
            slot = self._place(request, content, source, known)
            if known:
                self._read_on(slot, source, known, request)
                return
            new.append((slot, request))
        if new:
            self._read(new)

    def _longest(self, request: Request, content: prefix.Content) -> tuple[int, int]:
        """The slot that holds most of a prompt's beginning, and how many tokens of it can be used."""
        config = self.programs.config
        known = [prefix.readable(request.prompt, content, held, config) for held in self._held]
        source = int(np.argmax(known))
        return source, known[source]

    def _place(self, request: Request, content: prefix.Content, source: int, known: int) -> int:
        """The slot of a request: the source's, if it is free and holds little else, else that which was left first."""
        stays = source in self._left and 2 * known >= len(self._held[source])
        slot = source if known and stays else self._left[0]
        self._left.remove(slot)
        self._running[slot] = request
        if slot != source or not known:
            self._held[slot] = prefix.NOTHING
        busy = self.running > 1 or any(map(len, self._held))
        self._fit(busy)
        self._held[slot] = content
        return slot

    def _read(self, new: Sequence[tuple[int, Request]]) -> None:
        batch = self.programs.batch([request.prompt for _, request in new])
        logits, cache = self.programs.read(batch)
        for row, (slot, request) in enumerate(new):
            self._slots.fill(slot, row, cache)
            self._ask_first(slot, row, logits, request)

    def _read_on(self, slot: int, source: int, known: int, request: Request) -> None:
        request.cached = known
        self.cached_tokens += known
        logits = self._slots.extend(slot, source, known, tokens_of(request.prompt)[known:])
        self._ask_first(slot, 0, logits, request)

    def _ask_first(self, slot: int, row: int, logits: jax.Array, request: Request) -> None:
        tokens, measure = tokens_of(request.prompt), request.logprobs is not None
        self._unread.append(([request], self._slots.first(slot, row, logits, tokens, request.sampler, measure)))
        request._asked = 1

    def _fit(self, busy: bool) -> None:
        """Room for all that runs, and for what others have left."""
        running = [request.tokens for request in self._running if request is not None]
        self._slots.fit(max(running + [len(held) for held in self._held]), busy)

    def _decode(self) -> int:
        """Starts a step for those that may have more tokens; whether there were any."""
        rows = [r if r is not None and r._asked < r.max_new_tokens else None for r in self._running]
        active = np.array([request is not None for request in rows])
        if not active.any():
            return 0
        measure = any(request is not None and request.logprobs is not None for request in rows)
        self._unread.append((rows, self._slots.step(active, measure)))
        for request in rows:
            if request is not None:
                request._asked += 1
        return 1

    def _tell(self, rows: Sequence[Request | None], chosen: Chosen) -> None:
        """Hands the tokens of a step on; those of requests that have ended are left out."""
        wanted = any(request is not None and request.logprobs is not None for request in rows)
        host = jax.device_get(chosen if wanted else chosen.tokens)
        tokens = host.tokens if isinstance(host, Chosen) else host
        for row, request in enumerate(rows):
            if request is None or request.reason:
                continue
            token = Token(int(tokens[row]))
            if request.logprobs is not None and isinstance(host, Chosen):
                top = zip(host.top_tokens[row].tolist(), host.top_logprobs[row].tolist(), strict=True)
                token = Token(token.id, float(host.logprobs[row]), tuple(top)[: request.logprobs])
            request._told.append(token.id)
            request.on_token(token)
            if token.id == request.stop_id:
                self._leave(self._running.index(request), request, "stop")
            elif len(request._told) == request.max_new_tokens:
                self._leave(self._running.index(request), request, "length")

    def _leave(self, slot: int, request: Request, reason: Reason) -> None:
        self._running[slot] = None
        self._left.append(slot)
        if self.reuse:  # the last token is not in the cache
            self._held[slot] = prefix.with_produced(self._held[slot], request._told[:-1], self.programs.config)
        _end(request, reason)

    def _fail(self) -> None:
        """Ends all requests; the slots start anew."""
        ended = [request for request in (*self._running, *self._waiting) if request is not None]
        self._waiting.clear()
        self._unread.clear()
        self._left = collections.deque(range(self.slots))
        self._held, self._running = [prefix.NOTHING] * self.slots, [None] * self.slots
        self._slots.forget()
        for request in ended:
            _end(request, "error")


def _append_to(answer: list[int]) -> Callable[[Token], None]:
    return lambda token: answer.append(token.id)


def _end(request: Request, reason: Reason) -> None:
    if not request.reason:
        request.reason = reason
        request.on_end()


def _shapes(max_tokens: int, vision: bool) -> list[tuple[tuple[int, int], int]]:
    """Visual and text slots of all prefills that prompts below `max_tokens` need, and the fewest tokens in them."""
    counts = range(1, max_tokens)
    texts = {bucket(count, TEXT_FLOOR): count for count in reversed(counts)}  # slots -> the fewest tokens in them
    visuals = {bucket(count, VISUAL_FLOOR): count for count in reversed(counts)} if vision else {0: 0}
    if vision:
        visuals[bucket(0, VISUAL_FLOOR)] = 0
    pairs = [((v, t), least + words) for v, least in visuals.items() for t, words in texts.items()]
    return sorted(pair for pair in pairs if pair[1] < max_tokens)

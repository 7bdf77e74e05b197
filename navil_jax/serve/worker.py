"""The thread that owns the engine, and what it measures."""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable

from navil_jax.generate.assistant import Answer, Assistant, Question
from navil_jax.generate.engine import Token

FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds, bounds of the histogram
WINDOW = 10.0  # seconds over which tokens per second are counted
LOG = logging.getLogger("navil_jax.serve")


@dataclasses.dataclass
class Measured:
    """Counts since the start."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    faults: int = 0
    first_token: list[float] = dataclasses.field(default_factory=lambda: [0.0] * (len(FIRST_TOKEN) + 2))  # last: sum
    statuses: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    recent: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=100_000))

    def told(self) -> None:
        """Counts a new token."""
        self.new_tokens += 1
        self.recent.append(time.monotonic())

    def waited(self, seconds: float) -> None:
        """Counts the time to the first token of an answer."""
        self.first_token[next((i for i, bound in enumerate(FIRST_TOKEN) if seconds <= bound), len(FIRST_TOKEN))] += 1
        self.first_token[-1] += seconds

    def rate(self) -> float:
        """New tokens per second of late."""
        since = time.monotonic() - WINDOW
        return sum(moment > since for moment in list(self.recent)) / WINDOW


class Worker:
    """Runs `Engine.step` as long as there is work. `ready` is set once all programs are compiled.

    Args:
      warm_up: compile them all before the first request; else each when it is needed.
      on_fault: gets what makes the warm-up fail, on the engine's thread.
    """

    def __init__(
        self, assistant: Assistant, warm_up: bool = True, on_fault: Callable[[Exception], None] = lambda error: None
    ):
        self.assistant, self.measured, self._on_fault = assistant, Measured(), on_fault
        self.ready = threading.Event()
        self._work, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._run, args=(warm_up,), name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that runs."""
        self._over = True
        self._work.set()
        if self.ready.is_set():
            self._thread.join()

    def submit(self, question: Question, listen: Callable[[str, Token | None], None]) -> Answer:
        """As `Assistant.start`; `listen` is called on the engine's thread, and may not raise."""
        began, first = time.monotonic(), [True]

        def hear(piece: str, token: Token | None) -> None:
            if token is not None:
                self.measured.told()
                if first.pop() if first else False:
                    self.measured.waited(time.monotonic() - began)
            listen(piece, token)

        answer = self.assistant.start(question, hear)
        self.measured.prompt_tokens += answer.prompt_tokens
        self._work.set()
        return answer

    def _run(self, warm_up: bool) -> None:
        engine = self.assistant.engine
        try:
            if warm_up:
                engine.warm_up()
        except Exception as error:
            self._on_fault(error)
            return
        self.ready.set()
        while not self._over:
            self._work.clear()
            try:
                if not engine.step():
                    self._work.wait()
            except Exception:  # its requests have ended with an error; others go on
                self.measured.faults += 1
                LOG.exception("a step of the engine failed")

    def metrics(self) -> str:
        """Prometheus' text format."""
        engine, measured = self.assistant.engine, self.measured
        values = [
            ("navil_requests_waiting", "gauge", engine.waiting),
            ("navil_requests_running", "gauge", engine.running),
            ("navil_slots", "gauge", engine.slots),
            ("navil_cache_use_ratio", "gauge", round(engine.cache_use, 4)),
            ("navil_tokens_per_second", "gauge", measured.rate()),
            ("navil_prompt_tokens_total", "counter", measured.prompt_tokens),
            ("navil_cached_prompt_tokens_total", "counter", engine.cached_tokens),
            ("navil_new_tokens_total", "counter", measured.new_tokens),
            ("navil_programs_compiled_total", "counter", engine.compilations.total()),
            ("navil_engine_faults_total", "counter", measured.faults),
        ]
        lines = [line for name, kind, value in values for line in (f"# TYPE {name} {kind}", f"{name} {value}")]
        lines.append("# TYPE navil_responses_total counter")
        statuses = sorted(measured.statuses.items())
        lines += [f'navil_responses_total{{status="{status}"}} {count}' for status, count in statuses]
        name, total = "navil_time_to_first_token_seconds", 0
        lines.append(f"# TYPE {name} histogram")
        for bound, count in zip((*map(str, FIRST_TOKEN), "+Inf"), measured.first_token, strict=False):
            total += int(count)
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        lines += [f"{name}_sum {measured.first_token[-1]:.6f}", f"{name}_count {total}"]
        return "\n".join(lines) + "\n"

"""Counts the programs that XLA compiles."""

import contextlib
from collections.abc import Iterator

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def count_compilations(function: str) -> Iterator[list[str]]:
    """A list that grows by one whenever a jitted function of this name is compiled, or read from the cache on disk."""
    found: list[str] = []

    def listen(event: str, duration: float, **about: object) -> None:
        if event == EVENT and about.get("fun_name") == f"jit({function})":
            found.append(function)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)

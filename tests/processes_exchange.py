"""What `evaluate.processes` gives on one of several processes: prints a line that begins with DONE.

processes_exchange.py          texts of 20 MB are exchanged, and shares of 150 items put together
processes_exchange.py FAULT    the work on item FAULT raises
processes_exchange.py stop     process 1 gets SIGTERM at item 71
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import jax

from navil_jax.errors import UserError
from navil_jax.evaluate.processes import gather, on_first, preempted, together
from navil_jax.sharding import start_hosts


def work(items: Sequence[int]) -> Iterator[int]:
    for item in items:
        if str(item) == sys.argv[1]:
            raise UserError(f"item {item} is bad")
        if sys.argv[1] == "stop" and item == 71:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(4)  # JAX's thread hears of it within a second
        yield item * item


if __name__ == "__main__":
    sys.argv.append("")
    start_hosts()
    number = jax.process_index()
    large = [len(text) for text in gather(chr(97 + number) * 20_000_000)]
    results: list[int] = []
    try:
        results.extend(together(range(150), work, preempted))
        end = "all"
    except UserError as error:
        end = str(error)
    except KeyboardInterrupt:
        end = "stopped"
    whole = results == [item * item for item in range(len(results))]
    print("DONE", large, on_first(lambda: f"from {number}"), whole, len(results), end, flush=True)

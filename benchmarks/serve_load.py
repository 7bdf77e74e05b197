"""The server under load: `python -m benchmarks.serve_load --config configs/x.py`.

Starts the server on this machine with fresh parameters (their values change no time), and asks it from many clients at
once. Every client talks in conversations of two turns: a question about an image of some size, and another one after
the answer. All answers are streamed. Prints one table:

    requests in a second       of all, from the first question to the last token
    first token, p50 and p99   seconds from the question to the first text
    lost                       requests without a whole answer
    memory                     resident, of the server: before the load, half through it, and after it
    programs compiled          after the warm-up
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.step_time import table
from navil_jax.config import Config
from navil_jax.config.flags import parse
from navil_jax.config.ranges import Count, read_as
from navil_jax.data.run import open_run
from navil_jax.errors import UserError, report_user_errors
from navil_jax.model import params as model_params
from navil_jax.train.checkpoint import Checkpoints, Record

HOST = "127.0.0.1"
SIDES = (32, 64, 96, 128, 192, 256)  # of the images, in pixels
Messages = list[dict[str, Any]]


class Load:
    """What the clients do, and what becomes of it.

    Attributes:
      first: seconds to the first text of every answer.
      lost: what was said of the requests without a whole answer.
    """

    def __init__(self, port: int, pid: int, requests: int, new_tokens: int):
        self.port, self.pid, self.new_tokens = port, pid, new_tokens
        self.left, self.half, self.lock = requests, requests // 2, threading.Lock()
        self.first: list[float] = []
        self.lost: list[str] = []
        self.memory = [resident(pid)]

    def run(self, clients: int) -> float:
        """Seconds until all requests have ended."""
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
        self.memory.append(resident(self.pid))
        return took

    def _client(self, number: int) -> None:
        rng, messages = random.Random(number), Messages()
        while self._take():
            try:
                messages = [*messages, question(rng, new=not messages)]
                answer = self._ask(messages)
                messages = [*messages, {"role": "assistant", "content": answer}] if len(messages) == 1 else []
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.lost.append(str(error))
                messages = []

    def _take(self) -> bool:
        with self.lock:
            self.left -= 1
            if self.left == self.half:
                self.memory.append(resident(self.pid))
            return self.left >= 0

    def _ask(self, messages: Messages) -> str:
        body = json.dumps({"messages": messages, "stream": True, "max_tokens": self.new_tokens})
        pieces, began = list[str](), time.perf_counter()
        with contextlib.closing(http.client.HTTPConnection(HOST, self.port, timeout=600)) as connection:
            connection.request("POST", "/v1/chat/completions", body)
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"{response.status}: {response.read()[:200]!r}")
            for line in response:
                chunk = line.strip().removeprefix(b"data: ")
                if chunk == b"[DONE]":
                    return "".join(pieces) or "."
                told = json.loads(chunk or b"{}")
                if "error" in told:
                    raise ValueError(told["error"]["message"])
                if content := [choice["delta"].get("content") for choice in told.get("choices", ())]:
                    if content[0] and not pieces:
                        self.first.append(time.perf_counter() - began)
                    pieces += filter(None, content)
        raise ValueError("the stream ended early")


def question(rng: random.Random, new: bool) -> dict[str, Any]:
    """One about an image, if it is the first of a conversation."""
    content: list[dict[str, Any]] = [{"type": "text", "text": f"What is at {rng.randrange(1000)}?"}]
    if new:
        size = rng.choice(SIDES), rng.choice(SIDES), 3
        pixels = np.frombuffer(rng.randbytes(int(np.prod(size))), np.uint8).reshape(size)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": content}


def resident(pid: int) -> float:
    """MiB of memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def metric(port: int, name: str) -> float:
    """A number of /metrics."""
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=60)) as connection:
        connection.request("GET", "/metrics")
        found = re.search(rf"^{name} (\S+)$", connection.getresponse().read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


@contextlib.contextmanager
def serving(checkpoint: Path, options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """The port and process id of a server that is ready. Raises `UserError` if it ends before."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "navil_jax.serve", "--checkpoint", str(checkpoint), "--port", str(port)]
    command += ["--slots", str(options.slots), "--max-tokens", str(options.max_tokens)]
    command += ["--requests", str(options.clients)]
    with (checkpoint / "log").open("w+") as log, subprocess.Popen(command, stderr=log) as server:
        try:
            while not _ready(port):
                if server.poll() is not None:
                    raise UserError(f"the server ended: {(checkpoint / 'log').read_text()[-500:]}")
                time.sleep(0.2)
            yield port, server.pid
        finally:
            server.terminate()


def _ready(port: int) -> bool:
    with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection(HOST, port)) as connection:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def rows_of(config: Config, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Starts the server, and measures."""
    opened = open_run(config, None)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "fresh")
        with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
            params = model_params.initialise(opened.config.model, config.seed)
            checkpoints.save(1, params, Record(opened.config, opened.tokenizer.files(), {}))
        with serving(run, options) as (port, pid):
            compiled = metric(port, "navil_programs_compiled_total")
            load = Load(port, pid, options.requests, options.new_tokens)
            took = load.run(options.clients)
            compiled = metric(port, "navil_programs_compiled_total") - compiled
            read, reused = (metric(port, f"navil_{kind}prompt_tokens_total") for kind in ("", "cached_"))
            written = metric(port, "navil_new_tokens_total")
    for said in sorted(set(load.lost)):
        print(f"lost: {said}", file=sys.stderr)
    p50, p99 = np.quantile(load.first or [0.0], [0.5, 0.99])
    return [
        ("clients, requests, slots", f"{options.clients}, {options.requests:,}, {options.slots}"),
        ("tokens of prompts, of answers", f"{read:,.0f}, {written:,.0f}"),
        ("tokens of prompts that were cached", f"{reused:,.0f}"),
        ("requests in a second", f"{options.requests / took:.2f}"),
        ("first token, p50 and p99", f"{p50:.2f} s, {p99:.2f} s"),
        ("lost", f"{len(load.lost)}"),
        ("memory: start, half, end", ", ".join(f"{size:,.0f} MiB" for size in load.memory)),
        ("programs compiled after the warm-up", f"{compiled:.0f}"),
    ]


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for name, default, text in (
        ("clients", 64, "that ask at the same time"),
        ("requests", 2000, "of all clients"),
        ("slots", 16, "of the server"),
        ("new-tokens", 16, "of every answer at most"),
        ("max-tokens", 1024, "of prompt and answer together"),
    ):
        add(f"--{name}", type=read_as(Count), default=default, help=f"{text} (default: {default})")


@report_user_errors
def main(argv: list[str] | None = None) -> int:
    config, options = parse(sys.argv[1:] if argv is None else argv, __doc__, _add_options)
    print(table([("recipe", options.config), *rows_of(config, options)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Serves a model over HTTP: `python -m navil_jax.serve --checkpoint DIR`."""

import argparse
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from navil_jax.config import MeshConfig
from navil_jax.config.ranges import Count, Range, read_as
from navil_jax.errors import Parser, UserError, report_user_errors
from navil_jax.paths import given_path, local_path

Port = Annotated[int, Range(1, 65_535)]
KEYS = "NAVIL_API_KEYS"
DRAIN = 60  # seconds that open answers have after SIGTERM
ABOUT = """Serves a model: OpenAI's chat completions at /v1, a chat page at /, /health and /metrics.

  python -m navil_jax.serve --checkpoint runs/x
  NAVIL_API_KEYS=key1,key2 python -m navil_jax.serve --checkpoint runs/x --host 0.0.0.0

/health says "ready" once all programs are compiled. SIGTERM ends the server when its open answers have ended.

Exit status: 0 good, 2 bad input (one line says what), 130 after Ctrl-C."""


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.images is not None and not options.images.is_dir():
        raise UserError(f"--images {options.images}: no such folder")
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"Python package {package!r} is missing: pip install 'navil-jax[serve]'")
    from navil_jax.convert.loading import load_assistant  # --help needs none of these
    from navil_jax.serve.app import make_app
    from navil_jax.serve.connection import make_server
    from navil_jax.serve.limits import Limits
    from navil_jax.sharding import make_mesh

    keys = [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    with _listen(options.host, options.port) as listener:
        if not keys and options.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"anybody who reaches {options.host} may ask: {KEYS} is not set", file=sys.stderr)
        limits = Limits(requests=options.requests, images_folder=options.images, fetch=options.fetch_images)
        mesh = make_mesh(MeshConfig())
        sizes = options.slots, options.max_tokens
        assistant = load_assistant(options.checkpoint, mesh, *sizes, reuse=True, int8=options.int8)
        name, faults = options.name or Path(options.checkpoint).name or "navil", list[Exception]()

        def fail(error: Exception) -> None:
            faults.append(error)
            server.should_exit = True

        app = make_app(assistant, name, limits, keys, on_fault=fail)
        server = make_server(app, timeout_graceful_shutdown=DRAIN)
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"{name} at http://{host}:{options.port}; /health says when it is ready", file=sys.stderr, flush=True)
        server.run(sockets=[listener])
    if faults:
        raise faults[0]
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Before a model is read. Raises `UserError` where that cannot be."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(f"--host {host} --port {port}: cannot listen there: {why}; give others") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m navil_jax.serve", description=ABOUT)
    add = parser.add_argument
    text = "workdir of a training run, its checkpoint folder, or an imported model"
    add("--checkpoint", required=True, type=given_path, metavar="DIR", help=text)
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    add("--port", type=read_as(Port), default=8000, help="(default: 8000)")
    add("--name", default="", help="of the model for clients (default: that of the folder)")
    add("--slots", type=read_as(Count), default=8, metavar="N", help="requests decoded together (default: 8)")
    text = "of prompt and answer together (default: 4096); the cache is slots times as long"
    add("--max-tokens", type=read_as(Count), default=4096, metavar="N", help=text)
    text = "open answers at a time; more get 429 (default: 64)"
    add("--requests", type=read_as(Count), default=64, metavar="N", help=text)
    folder = lambda text: local_path(given_path(text))  # noqa: E731
    add("--images", type=folder, metavar="FOLDER", help="clients may name images in it, as file:NAME")
    add("--fetch-images", action="store_true", help="clients may name images of public hosts, by http(s)")
    text = "round the decoder's matrices to 8 bits: less memory, answers may differ a little"
    add("--int8", action="store_true", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""A server of the tiny model on a port of this machine, and what it is asked, for tests."""

import base64
import contextlib
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from navil_jax.generate.assistant import Assistant
from navil_jax.serve.limits import Limits

MODEL_NAME = "tiny"
SMALL = Limits(body_bytes=4 << 20, pixels=100_000, images=8, new_tokens=8, choices=3, requests=4)


def png(width: int = 48, height: int = 64) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def asked(content: Any = "What is it?", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL_NAME, "messages": [{"role": "user", "content": content}], **fields}


@contextlib.contextmanager
def listening(serving: Assistant, limits: Limits = SMALL) -> Iterator[tuple[str, Any]]:
    """The server on a port of this machine."""
    pytest.importorskip("uvicorn")
    from navil_jax.serve.app import make_app
    from navil_jax.serve.connection import make_server

    app = make_app(serving, MODEL_NAME, limits, warm_up=False)
    server = make_server(app, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    server.should_exit = True
    thread.join()

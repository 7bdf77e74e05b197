"""Hostile clients at a running server: each is refused in the form of OpenAI's errors, and the next one is answered."""

import contextlib
import http.client
import json
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_assistant import CONFIG, MODEL, TOKENIZER, random_params
from made_server import asked, data_url, listening, part, png

from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import Engine
from navil_jax.serve.limits import Limits

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder.parent / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    return folder


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant(CONFIG, TOKENIZER, Engine(MODEL, random_params(), max_tokens=2000, slots=2, reuse=True))


@pytest.fixture(scope="module")
def address(assistant: Assistant, folder: Path) -> Iterator[tuple[str, int]]:
    limits = Limits(body_bytes=4 << 20, pixels=100_000, new_tokens=4, requests=4, images_folder=folder, fetch=True)
    with listening(assistant, limits) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


def client_of(address: tuple[str, int]) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(address[0], address[1], timeout=60)


def ask(address: tuple[str, int], body: Any) -> tuple[int, Any]:
    with contextlib.closing(client_of(address)) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(body))
        response = client.getresponse()
        return response.status, json.loads(response.read())


def answers(address: tuple[str, int]) -> bool:
    return ask(address, asked(max_tokens=1))[0] == 200


def sent(address: tuple[str, int], content: bytes) -> tuple[int, Any]:
    """What raw bytes are answered with; the server ends the connection."""
    with socket.create_connection(address, timeout=60) as raw:
        with contextlib.suppress(OSError):  # it is refused before it is all there
            raw.sendall(content)
        response = http.client.HTTPResponse(raw)
        response.begin()
        return response.status, json.loads(response.read())


NO_HTTP = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "a flood of headers": POST + b"".join(b"X-%d: y\r\n" % number for number in range(20_000)) + b"\r\n",
    "a long header": POST + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n",
    "a long path": b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a header without a name": POST + b": y\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "a long length": POST + b"Content-Length: " + b"9" * 100 + b"\r\n\r\n",
    "a broken chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "another encoding": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_http_is_refused(name: str, address):
    status, told = sent(address, NO_HTTP[name])
    assert status in (400, 413, 501), told
    assert told["error"]["type"] in ("invalid_request_error", "server_error")
    assert answers(address)


def test_any_bytes_are_survived(address):
    rng = random.Random(0)
    for _ in range(200):
        with socket.create_connection(address, timeout=60) as raw, contextlib.suppress(OSError):
            raw.sendall(rng.choice([b"", POST, b"GET / HTTP/1.1\r\n"]) + rng.randbytes(rng.randrange(200)))
            if rng.random() < 0.2:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert answers(address)


@pytest.mark.parametrize("start", [b"", POST, POST + b"X-A: b\r\n"])
def test_headers_that_do_not_come_are_waited_for_in_vain(start: bytes, address, monkeypatch):
    connection = pytest.importorskip("navil_jax.serve.connection")
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(200)]
        for raw in slow:
            raw.sendall(start)
        assert answers(address)
        for number in range(4):  # a byte now and then wins no time
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                slow[0].sendall(b"X" if number else b"Y")
        for raw in slow:
            response = http.client.HTTPResponse(raw)
            response.begin()
            assert response.status == 408
            assert "the headers took over" in json.loads(response.read())["error"]["message"]
    assert time.monotonic() - began < 30


def test_headers_may_be_slow_where_a_connection_is_used_again(address, monkeypatch):
    """The time of the first request does not count for the second, and an idle connection is no slow header."""
    connection = pytest.importorskip("navil_jax.serve.connection")
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.6)
    body = json.dumps(asked(max_tokens=1))
    with contextlib.closing(client_of(address)) as client:
        for _ in range(3):
            client.request("POST", "/v1/chat/completions", body)
            assert client.getresponse().read().startswith(b'{"id"')
            time.sleep(0.4)


PATHS = ["../secret.png", "%2e%2e/secret.png", "..%2fsecret.png", "link.png", "/etc/passwd", "a.png/../../secret.png"]
PATHS += ["a.png\0.png", "....//secret.png", "..\\secret.png", "~/secret.png", "/proc/self/environ", "/dev/zero", "."]
HOSTS = ["127.0.0.1", "localhost", "[::1]", "0x7f.1", "2130706433", "0177.0.0.1", "127.1", "[::ffff:127.0.0.1]", "0"]
HOSTS += [
    "169.254.169.254",
    "10.0.0.1",
    "[fe80::1]",
    "[64:ff9b::7f00:1]",
    "user@127.0.0.1",
    "127.0.0.1:8000",
]


@pytest.mark.parametrize("url", [f"file:{path}" for path in PATHS] + PATHS + [f"http://{host}/a.png" for host in HOSTS])
def test_no_other_file_and_no_private_host_is_read(url: str, address):
    status, told = ask(address, asked([part(url)]))
    assert status == 400, told
    assert told["error"]["message"].startswith("image 1: ")
    assert "Traceback" not in told["error"]["message"]
    assert answers(address)


def test_a_file_of_the_folder_is_read(address):
    assert ask(address, asked([part("file:a.png")]))[0] == 200


def broken_images() -> Iterator[bytes]:
    """Files of every kind, cut, and with bytes changed."""
    rng, whole = random.Random(0), png(64, 64)
    starts = [
        b"GIF89a",
        b"BM",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"\xff\xd8\xff",
        b"II*\0",
        b"\0\0\1\0",
        b"<svg/>",
        b"%!PS-Adobe-3.0",
    ]
    for start in starts:
        yield start + rng.randbytes(100)
    for _ in range(40):
        changed = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        yield bytes(changed[: rng.randrange(8, len(changed))])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_images_are_refused_or_read(address):
    for content in broken_images():
        status, told = ask(address, asked([part(data_url(content))], max_tokens=1))
        assert status == 200 or (status == 400 and told["error"]["message"].startswith("image 1: ")), told
    assert answers(address)


def test_clients_that_leave_in_mid_stream_leave_nothing(assistant: Assistant, address):
    files = len(os.listdir("/proc/self/fd"))
    body = json.dumps(asked(max_tokens=1500, stream=True)).encode()
    for _ in range(12):
        with socket.create_connection(address, timeout=60) as raw:
            raw.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert raw.recv(20).startswith(b"HTTP/1.1 ")
    end = time.monotonic() + 30
    while assistant.engine.running or assistant.engine.waiting or len(os.listdir("/proc/self/fd")) > files + 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert answers(address)

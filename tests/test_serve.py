"""The server: OpenAI's interface, its limits, and hostile input; the server answers after each."""

import base64
import contextlib
import http.client
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_assistant import CONFIG, MODEL, TOKENIZER, assistant, random_params
from made_server import MODEL_NAME, SMALL, asked, data_url, listening, part, png
from PIL import Image

from navil_jax.errors import UserError
from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import Engine
from navil_jax.generate.sampling import Sampler
from navil_jax.serve import images
from navil_jax.serve.images import public_address, read_address
from navil_jax.serve.limits import Limits
from navil_jax.train.checkpoint import Checkpoints, Record


@pytest.fixture(scope="module")
def serving() -> Assistant:
    return Assistant(CONFIG, TOKENIZER, Engine(MODEL, random_params(), max_tokens=2000, slots=3))


@contextlib.contextmanager
def client_of(serving: Assistant, limits: Limits = SMALL, keys: tuple[str, ...] = (), warm_up: bool = False):
    pytest.importorskip("httpx")
    testclient = pytest.importorskip("starlette.testclient")
    from navil_jax.serve.app import make_app

    app = make_app(serving, MODEL_NAME, limits, keys, warm_up)
    with testclient.TestClient(app, raise_server_exceptions=False) as client:
        while client.get("/health").status_code != 200:
            time.sleep(0.01)
        yield client


@pytest.fixture(scope="module")
def client(serving: Assistant) -> Iterator[Any]:
    with client_of(serving) as client:
        yield client


def expected(count: int = 8, sampler: Sampler = Sampler(), image: bytes = b"") -> str:  # noqa: B008
    patches = [assistant().read_image(image)] if image else []
    question = "<image>\nWhat is it?" if image else "What is it?"
    return "".join(assistant().answer((), question, patches, sampler, count))


def post(client: Any, body: dict[str, Any] | bytes) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post("/v1/chat/completions", content=content)


def events(text: str) -> list[Any]:
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert found[-1] == "[DONE]"
    return [json.loads(line) for line in found[:-1]]


class TestAnswers:
    def test_text_and_images(self, client):
        told = post(client, asked()).json()
        assert told["object"] == "chat.completion"
        assert told["choices"][0]["message"]["content"] == expected()
        assert told["choices"][0]["finish_reason"] == "length"
        assert told["usage"]["completion_tokens"] == 8
        usage = told["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + 8
        content = [part(data_url(png())), {"type": "text", "text": "What is it?"}]
        told = post(client, asked(content)).json()
        assert told["choices"][0]["message"]["content"] == expected(image=png())
        assert told["usage"]["prompt_tokens"] > usage["prompt_tokens"]

    def test_a_later_turn_reads_what_follows_alone(self):
        own = Assistant(CONFIG, TOKENIZER, Engine(MODEL, random_params(), max_tokens=2000, slots=2, reuse=True))
        with client_of(own) as client:
            body = asked([part(data_url(png())), {"type": "text", "text": "What is it?"}], max_tokens=8)
            first = post(client, body).json()
            answer = first["choices"][0]["message"]
            assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
            more = [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "And?"}]
            body["messages"] += more
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            usage = events(post(client, body).text)[-1]["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert first["usage"]["prompt_tokens"] <= cached < usage["prompt_tokens"]
            metrics = client.get("/metrics").text
        assert f"navil_cached_prompt_tokens_total {cached}\n" in metrics

    def test_a_stream_joins_to_the_answer(self, client):
        body = asked(stream=True, stream_options={"include_usage": True}, n=2, temperature=2.0, seed=7)
        response = post(client, body)
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, usage = events(response.text)
        for number in range(2):
            choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == number]
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            assert text == expected(sampler=Sampler(temperature=2.0, seed=7 + number))
            assert [choice["finish_reason"] for choice in choices][-1] in ("length", "stop")
        assert (usage["choices"], usage["usage"]["completion_tokens"] > 8) == ([], True)

    def test_log_probabilities_join_to_the_answer(self, client):
        told = post(client, asked(logprobs=True, top_logprobs=3)).json()["choices"][0]
        content = told["logprobs"]["content"]
        assert [len(token["top_logprobs"]) for token in content] == [3] * len(content)
        assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0 for token in content)
        streamed = events(post(client, asked(logprobs=True, top_logprobs=3, stream=True)).text)
        scored = [c["choices"][0]["logprobs"]["content"] for c in streamed if c["choices"][0]["logprobs"]]
        assert [token for tokens in scored for token in tokens] == content

    def test_a_stop_string_ends_an_answer(self, client):
        whole = expected()
        told = post(client, asked(stop=[whole[3:6]])).json()["choices"][0]
        assert told["message"]["content"] == whole[: whole.find(whole[3:6])]
        assert told["finish_reason"] == "stop"

    def test_many_at_once_get_the_answers_that_each_alone_gets(self, serving):
        with client_of(serving, Limits(new_tokens=8)) as client:
            found: dict[int, str] = {}

            def ask(number: int) -> None:
                body = asked(temperature=number % 2 * 2.0, seed=number)
                found[number] = post(client, body).json()["choices"][0]["message"]["content"]

            threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        alone = {n: expected(sampler=Sampler(temperature=n % 2 * 2.0, seed=n)) for n in range(12)}
        assert found == alone

    def test_models_health_metrics_and_what_an_image_costs(self, client):
        post(client, asked())
        assert client.get("/v1/models").json()["data"] == [client.get(f"/v1/models/{MODEL_NAME}").json()]
        assert client.get("/v1/models/x/y").json()["error"]["code"] == "model_not_found"
        assert client.get("/health").json() == {"status": "ready"}
        text = client.get("/metrics").text
        names = ("requests_waiting", "tokens_per_second", "cache_use_ratio", "time_to_first_token_seconds_count")
        assert all(f"\nnavil_{name} " in f"\n{text}" for name in names)
        assert 'navil_responses_total{status="200"}' in text
        cost = client.get("/tokens?width=48&height=64").json()
        content = [part(data_url(png())), {"type": "text", "text": "What is it?"}]
        counts = [post(client, asked(c)).json()["usage"]["prompt_tokens"] for c in (content, "What is it?")]
        assert cost["limit"] == 2000
        assert 0 <= counts[0] - counts[1] - cost["tokens"] <= 3  # and a line break

    def test_the_page_runs_its_own_script_alone(self, client):
        response = client.get("/")
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "innerHTML" not in response.text
        assert "http://" not in response.text.replace("http://www.w3.org", "")
        assert "https://" not in response.text

    def test_the_log_holds_no_content(self, client, capsys):
        post(client, asked("a secret question"))
        line = json.loads(capsys.readouterr().err.strip().splitlines()[-1])
        assert (line["status"], line["new_tokens"], line["reasons"]) == (200, 8, ["length"])
        assert "secret" not in json.dumps(line)


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 10_000)) + chunk(b"IEND", b"")


HOSTILE = {
    "no JSON": (b"{", "not JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "not JSON"),
    "a list": (b"[]", "must be a JSON object"),
    "deep": (b"[" * 100_000, "not JSON"),
    "long number": (b'{"n": 1' + b"0" * 5000 + b"}", "not JSON"),
    "unknown field": (asked(tempreature=1), "tempreature: no such field"),
    "no messages": ({"model": MODEL_NAME}, "messages: must be a list"),
    "10,000 parts": (asked([{"type": "text", "text": "x"}] * 10_000), "10,000 parts are over the limit"),
    "surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "is no UTF-8"),
    "typed placeholder": (asked("<image>"), "stands for an image"),
    "broken image": (asked([part(data_url(b"\x89PNG\r\n\x1a\nx"))]), "image 1: broken"),
    "cut image": (asked([part(data_url(png()[:-500]))]), "broken or cut off"),
    "text as image": (asked([part(data_url(b"hello"))]), "image 1: broken"),
    "no base64": (asked([part("data:image/png;base64,???")]), "image 1: is no base64"),
    "huge image": (asked([part(data_url(png(400, 300)))]), "400 x 300 pixels are over the limit of 100,000"),
    "bomb": (asked([part(data_url(bomb()))]), "image 1: "),
    "thin image": (asked([part(data_url(png(1, 300)))]), "image 1: 1 x 300, one side is over 200 times the other"),
    "many images": (asked([part(data_url(png()))] * 9), "9 images are over the limit of 8"),
    "images for too many tokens": (asked([part(data_url(png(300, 300)))] * 8), "tokens of images are over the limit"),
    "http": (asked([part("http://169.254.169.254/latest")]), "fetches no images"),
    "file": (asked([part("file:///etc/passwd")]), "image 1: must be data:"),
    "long prompt": (asked("x y " * 3000), "over the limit of 2000"),
    "many tokens": (asked(max_tokens=10**12), "over the limit of 2000"),
    "no tokens": (asked(max_tokens=0), "max_tokens: must be at least 1, not 0"),
    "text as number": (asked(temperature="hot"), "temperature: must be a number"),
    "nan": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "NaN is no number"),
    "top_p": (asked(top_p=2), "top-p 2.0"),
    "n": (asked(n=10**9), "n: must be from 1 to 3"),
    "stop": (asked(stop=[""]), "stop: must be"),
    "tools": (asked(tools=[{}]), "tools: is not supported here"),
    "stream": (asked(stream="yes"), "stream: must be true or false"),
    "stream_options": (asked(stream=True, stream_options=7), "stream_options: must be an object"),
    "twice": (b'{"messages": [], "messages": []}', "'messages' stands twice in one object"),
    "top_logprobs": (asked(top_logprobs=3), "needs logprobs"),
    "many logprobs": (asked(logprobs=True, top_logprobs=50), "logprobs 50"),
}


class TestRefusals:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_what_cannot_be_used_is_a_400_and_the_server_lives(self, name: str, client):
        body, said = HOSTILE[name]
        response = post(client, body)
        error = response.json()["error"]
        assert response.status_code == 400, error
        assert said in error["message"]
        assert error["type"] == "invalid_request_error"
        assert post(client, asked(max_tokens=1)).status_code == 200

    def test_bodies_models_paths_and_methods(self, client):
        large = post(client, b" " * (SMALL.body_bytes + 1))
        chunked = client.post("/v1/chat/completions", content=iter([b" " * (1 << 21)] * 3))
        assert (large.status_code, chunked.status_code) == (413, 413)
        other = post(client, asked() | {"model": "gpt"})
        assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
        for response, status in ((client.get("/none"), 404), (client.get("/v1/chat/completions"), 405)):
            assert response.status_code == status
            assert response.json()["error"]["type"] == "invalid_request_error"
        for query in ("", "?width=0&height=1", "?width=x&height=1", "?width=9&height=999999"):
            assert client.get(f"/tokens{query}").status_code == 400

    def test_keys(self, serving):
        with client_of(serving, keys=("right", "other")) as client:
            for headers, status in (
                ({}, 401),
                ({"Authorization": "Bearer wrong"}, 401),
                ("right", 200),
                ("other", 200),
            ):
                headers = {"Authorization": f"Bearer {headers}"} if isinstance(headers, str) else headers
                response = client.post("/v1/chat/completions", json=asked(max_tokens=1), headers=headers)
                assert response.status_code == status
                assert client.get("/metrics", headers=headers).status_code == status
            assert client.get("/health").status_code == 200

    def test_too_many_at_once_are_told_when_to_come_again(self, serving):
        with client_of(serving, Limits(requests=1, new_tokens=8)) as client:
            response = post(client, asked(n=2))
            assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
            assert int(response.headers["retry-after"]) >= 1
            assert post(client, asked()).status_code == 200

    def test_a_fault_of_the_engine_is_a_500_and_the_next_request_is_answered(self, client, serving, monkeypatch):
        with monkeypatch.context() as patched:
            patched.setattr(serving.engine.programs, "read", lambda *_: 1 / 0)
            response = post(client, asked())
            assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert post(client, asked()).json()["choices"][0]["message"]["content"] == expected()


PRIVATE = ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
PRIVATE += ["224.0.0.1", "::1", "fe80::1", "fc00::1", "::", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1"]
PRIVATE += ["2002:7f00:1::"]


class TestAddresses:
    def test_files_of_the_folder_and_no_others(self, tmp_path: Path):
        folder = tmp_path / "images"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "a b.png").write_bytes(png())
        (tmp_path / "secret.png").write_bytes(png())
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
        (folder / "circle").symlink_to(folder / "circle")
        os.mkfifo(folder / "pipe")
        limits = Limits(images_folder=folder)
        for url in ("file:deep/a b.png", "deep/a%20b.png", "file:///deep/a b.png"):
            assert read_address(url, "image 1", limits) == png()
        wrong = ["../secret.png", "%2e%2e/secret.png", "link.png", "circle", "pipe", "deep", "", "a\0b", "x" * 5000]
        for url in [*wrong, f"file://{tmp_path}/secret.png", "file:/etc/passwd", "ftp://x/y"]:
            with pytest.raises(UserError, match="image 1: no such file in the server's folder"):
                read_address(url, "image 1", limits)
        with pytest.raises(UserError, match="over the limit of 10 bytes"):
            read_address("deep/a b.png", "image 1", Limits(images_folder=folder, body_bytes=10))

    @pytest.mark.parametrize("address", PRIVATE)
    def test_no_private_address_is_reached_not_by_dns_either(self, address: str, monkeypatch):
        found = [(0, 0, 0, "", ("93.184.215.14", 80)), (0, 0, 0, "", (address, 80))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with pytest.raises(UserError, match="image 1: its host is not public"):
            public_address("innocent.example", 80, "image 1")

    def test_public_hosts_are_fetched_with_limits(self, monkeypatch):
        listener = socket.create_server(("127.0.0.1", 0))
        replies = {
            "/image": b"HTTP/1.0 200 OK\r\n\r\n" + png(),
            "/moved": b"HTTP/1.0 302 Found\r\nLocation: /image\r\n\r\n",
            "/circle": b"HTTP/1.0 302 Found\r\nLocation: /circle\r\n\r\n",
            "/inside": b"HTTP/1.0 302 Found\r\nLocation: http://inside/\r\n\r\n",
            "/file": b"HTTP/1.0 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
            "/none": b"HTTP/1.0 404 None\r\n\r\n",
            "/large": b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 100_000,
            "/junk": b"junk\r\n",
        }

        def serve() -> None:
            while True:
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    path = connection.recv(4096).split()[1].decode()
                    connection.sendall(replies.get(path, b""))
                    if path != "/slow":
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        connect = socket.create_connection
        monkeypatch.setattr(images, "SECONDS", 1.0)
        address = lambda host, port, name: "127.0.0.1" if host == "public" else public_address(host, port, name)  # noqa: E731
        monkeypatch.setattr(images, "public_address", address)
        port = listener.getsockname()[1]
        monkeypatch.setattr(socket, "create_connection", lambda to, **more: connect(("127.0.0.1", port), **more))
        limits = Limits(fetch=True, body_bytes=50_000)
        for path in ("/image", "/moved"):
            assert read_address(f"http://public{path}", "image 1", limits) == png()
        for url, said in [
            ("http://public/circle", "more than 3 redirects"),
            ("http://public/inside", "its host is not"),
            ("http://public/file", "must be http or https"),
            ("http://public/none", "its server says 404"),
            ("http://public/large", "over the limit of 50,000 bytes"),
            ("http://public/junk", "cannot be fetched"),
            ("http://public/slow", "cannot be fetched|took over"),
            ("http://localhost/", "its host is not public"),
            ("http://user@public/", "without a user"),
            ("http://public:22/", "on its usual port"),
            ("http://public:x/", "cannot be fetched"),
            ("http://[/", "cannot be fetched"),
        ]:
            with pytest.raises(UserError, match=said):
                read_address(url, "image 1", limits)


def test_the_official_client_works_unchanged(serving: Assistant):
    openai = pytest.importorskip("openai")
    with listening(serving) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        assert [model.id for model in client.models.list()] == [MODEL_NAME]
        messages: Any = asked([part(data_url(png())), {"type": "text", "text": "What is it?"}])["messages"]
        told = client.chat.completions.create(model=MODEL_NAME, messages=messages, logprobs=True, top_logprobs=2)
        assert told.choices[0].message.content == expected(image=png())
        stream = client.chat.completions.create(model=MODEL_NAME, messages=messages, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == expected(image=png())
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model=MODEL_NAME, messages=messages, temperature=-1)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=messages)


@pytest.mark.parametrize("extra", [{"detail": "high"}, {"max_dynamic_patch": 6}, {}])
def test_vlmevalkits_wrappers_get_their_answers(serving: Assistant, extra: dict[str, Any]):
    """Bodies as GPT4V (detail) and LMDeployAPI (dataset) of VLMEvalKit make them: an image as JPEG, then the text."""
    openai = pytest.importorskip("openai")
    file = io.BytesIO()
    Image.open(io.BytesIO(png())).convert("RGB").save(file, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    content: Any = [{"type": "image_url", "image_url": {"url": url, **extra}}, {"type": "text", "text": "What is it?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "n": 1, "temperature": 0}
    told_dataset = {} if "detail" in extra else {"dataset": "MMBench_DEV_EN"}
    with listening(serving) as (address, _):
        with urllib.request.urlopen(f"{address}/v1/models") as answer:  # without a key
            model = json.load(answer)["data"][0]["id"]
        request = urllib.request.Request(
            f"{address}/v1/chat/completions",
            json.dumps({"model": model, **body, **told_dataset}).encode(),
            {"Content-Type": "application/json", "Authorization": "Bearer sk-123456"},
        )
        with urllib.request.urlopen(request) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
        assert text.strip() == expected(image=file.getvalue()).strip()
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="sk-123456", max_retries=0)
        told = client.chat.completions.create(model=model, extra_body=told_dataset, **body)  # type: ignore[call-overload]
        assert told.choices[0].message.content == text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(serving: Assistant, stream: bool):
    with listening(serving, Limits(new_tokens=1900)) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(asked(max_tokens=1900, stream=stream, temperature=1.0, seed=3)).encode()
        connection = socket.create_connection((host, int(port)))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        while not serving.engine.running:
            time.sleep(0.001)
        connection.close()
        began = time.monotonic()
        while serving.engine.running:
            assert time.monotonic() - began < 20
            time.sleep(0.001)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_body_that_does_not_come_holds_no_place(serving: Assistant, leaves: bool, monkeypatch, capfd):
    app = pytest.importorskip("navil_jax.serve.app")
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2 if not leaves else 60.0)
    with listening(serving, Limits(requests=1, new_tokens=8)) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            if not leaves:
                assert slow.recv(100).startswith(b"HTTP/1.1 408")
        body = json.dumps(asked(max_tokens=1)).encode()
        began, status = time.monotonic(), 429
        while status == 429 and time.monotonic() - began < 10:
            with contextlib.closing(http.client.HTTPConnection(host, int(port))) as connection:
                connection.request("POST", "/v1/chat/completions", body)
                status = connection.getresponse().status
        assert status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_open_answers_are_ended_before_the_server_is(serving: Assistant):
    httpx = pytest.importorskip("httpx")
    with listening(serving, Limits(new_tokens=200)) as (address, server):
        found = []
        ask = lambda: found.append(httpx.post(f"{address}/v1/chat/completions", json=asked(), timeout=60))  # noqa: E731
        thread = threading.Thread(target=ask)
        thread.start()
        while not serving.engine.running:
            time.sleep(0.001)
        server.should_exit = True  # as SIGTERM does
        thread.join()
    assert found[0].json()["choices"][0]["message"]["content"] == expected(200)


@pytest.mark.slow
def test_the_real_command_warms_up_and_ends_its_answers_after_sigterm(tmp_path: Path):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    with Checkpoints(tmp_path / "tiny" / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, random_params(), Record(CONFIG, TOKENIZER.files(), {}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "navil_jax.serve", "--checkpoint", str(tmp_path / "tiny"), "--port", str(port)]
    command += ["--slots", "1", "--max-tokens", "400"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stderr=log, cwd=Path(__file__).parents[1])
    address, found = f"http://127.0.0.1:{port}", []
    try:
        seen: set[Any] = set()
        while 200 not in seen and server.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                seen.add(httpx.get(f"{address}/health").status_code)
            time.sleep(0.02)
        assert seen == {200, 503}
        body = asked(max_tokens=300)
        ask = lambda: found.append(httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60))  # noqa: E731
        thread = threading.Thread(target=ask)
        thread.start()
        while "navil_requests_running 1" not in httpx.get(f"{address}/metrics").text and thread.is_alive():
            time.sleep(0.001)
        server.terminate()
        thread.join()
        server.wait(timeout=60)
    finally:
        server.kill()
    assert found[0].json()["usage"]["completion_tokens"] == 300
    assert f"tiny at {address}; /health says when it is ready" in (tmp_path / "log").read_text()

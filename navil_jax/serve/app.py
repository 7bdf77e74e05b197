"""The server: routes, who may ask, how much at a time, and what is logged."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import importlib.resources
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from navil_jax.data.prompt import image_tokens
from navil_jax.errors import UserError
from navil_jax.generate.assistant import Answer, Assistant
from navil_jax.generate.engine import Token
from navil_jax.serve.limits import Limits, Refusal
from navil_jax.serve.protocol import Asked, Reply, check_model, choices_of, read_body, read_request
from navil_jax.serve.worker import Worker

BODY_SECONDS = 60.0  # in which a body must have come
PREPARED = 4  # requests whose images are read at a time
Event = tuple[int, str, Token | None]  # number of the answer, text, and its token; None at its end


@dataclasses.dataclass
class Server:
    """What the routes share.

    Attributes:
      model: name under which the model is asked for.
      keys: of clients; empty: anybody may ask.
      open: answers that are prepared, wait or run.
    """

    worker: Worker
    model: str
    limits: Limits
    keys: tuple[str, ...]
    open: int = 0

    @functools.cached_property
    def prepared(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(PREPARED)

    def check_key(self, request: Request) -> None:
        """Raises `Refusal` for a request without one of the keys."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.keys and not any(hmac.compare_digest(given, key.encode()) for key in self.keys):
            raise Refusal(401, "the API key is missing or not known", "invalid_api_key")

    async def health(self, request: Request) -> Response:
        """200 once every program is compiled."""
        ready = self.worker.ready.is_set()
        return JSONResponse({"status": "ready" if ready else "warming up"}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        self.check_key(request)
        return PlainTextResponse(self.worker.metrics())

    async def models(self, request: Request) -> Response:
        """The one model, in a list where none is named."""
        self.check_key(request)
        model = {"id": self.model, "object": "model", "created": 0, "owned_by": "navil_jax"}
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [model]})
        check_model(name, self.model)
        return JSONResponse(model)

    async def tokens(self, request: Request) -> Response:
        """What an image of a size costs, for the page."""
        self.check_key(request)
        assistant = self.worker.assistant
        try:
            width, height = (int(request.query_params.get(name, "")[:9]) for name in ("width", "height"))
        except ValueError:
            raise Refusal(400, "width and height must be whole numbers") from None
        if min(width, height) < 1:
            raise Refusal(400, "width and height must be at least 1")
        cost = image_tokens(width, height, assistant.config)
        scales = [{"width": scale.width, "height": scale.height} for scale in cost.scales]
        tokens, limit = cost.visual_tokens + cost.text_tokens, assistant.engine.max_tokens
        return JSONResponse({"tokens": tokens, "limit": limit, "scales": scales})

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions."""
        self.check_key(request)
        if not self.worker.ready.is_set():
            raise Refusal(503, "the server is warming up", "warming_up", retry_after=5)
        with contextlib.ExitStack() as stack:
            self._open(1, stack)
            fields = await run_in_threadpool(read_body, await read_limited(request, self.limits.body_bytes))
            count = choices_of(fields, self.limits)
            self._open(count - 1, stack)
            assistant = self.worker.assistant
            async with self.prepared:
                asked = await run_in_threadpool(read_request, fields, assistant, self.model, self.limits)
            request.scope["told"] = {"images": asked.images, "choices": count}
            talk = Talk(self.worker, asked, request)
            stack.callback(talk.cancel)
            if asked.stream:
                return Streamed(talk.stream(Reply(assistant, self.model, talk.answers)), stack.pop_all())
            async for _ in talk.events():
                pass
            talk.check()
            return JSONResponse(Reply(assistant, self.model, talk.answers).body())

    def _open(self, count: int, stack: contextlib.ExitStack) -> None:
        """Counts answers as open until the stack is left. Raises `Refusal` if there are too many."""
        if self.open + count > self.limits.requests:
            wait = max(1, self.open // self.worker.assistant.engine.slots)
            raise Refusal(429, f"{self.open} answers are open; try again later", "overloaded", retry_after=wait)
        self.open += count
        stack.callback(self._close, count)

    def _close(self, count: int) -> None:
        self.open -= count


class Talk:
    """One request's answers, brought from the engine's thread to this one; a client that leaves ends them."""

    def __init__(self, worker: Worker, asked: Asked, request: Request):
        self._usage, self._request = asked.usage, request
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()
        self.answers: list[Answer] = []
        for number, question in enumerate(asked.questions):
            self.answers.append(worker.submit(question, functools.partial(self._hear, number)))
        self._watch = asyncio.create_task(self._until_gone())

    def cancel(self) -> None:
        self._watch.cancel()
        for answer in self.answers:
            answer.cancel()
        told = self._request.scope["told"]
        told["prompt_tokens"] = self.answers[0].prompt_tokens if self.answers else 0
        told["new_tokens"] = sum(len(answer.tokens) for answer in self.answers)
        told["reasons"] = [answer.reason or "cancelled" for answer in self.answers]

    def _hear(self, number: int, piece: str, token: Token | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, piece, token))

    async def _until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        for answer in self.answers:
            answer.cancel()
        self._events.put_nowait(None)

    async def events(self) -> AsyncIterator[Event]:
        """What the answers become, until all have ended or the client has left."""
        left = len(self.answers)
        while left and (event := await self._events.get()) is not None:
            left -= event[2] is None
            yield event

    def check(self) -> None:
        """Raises `Refusal` where an answer did not end well."""
        if any(answer.reason in ("error", "cancelled", "") for answer in self.answers):
            raise Refusal(500, "the answer could not be made", "engine_error")

    async def stream(self, reply: Reply) -> AsyncIterator[str]:
        """Server-sent events."""
        for number in range(len(self.answers)):
            yield _sent(reply.chunk(number, {"role": "assistant", "content": ""}))
        async for number, piece, token in self.events():
            scored = [token] if token is not None and self.answers[number].request.logprobs is not None else []
            if piece or scored:
                yield _sent(reply.chunk(number, {"content": piece}, scored))
            if token is None and self.answers[number].reason == "error":
                yield _sent(Refusal(500, "the answer could not be made", "engine_error").body)
            elif token is None:
                yield _sent(reply.chunk(number, {}, reason=self.answers[number].reason))
        if self._usage:
            yield _sent(reply.usage_chunk())
        yield "data: [DONE]\n\n"


class Streamed(StreamingResponse):
    """Server-sent events; what the request holds is let go at their end, and when the client leaves."""

    def __init__(self, events: AsyncIterator[str], stack: contextlib.ExitStack):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stack:
            await super().__call__(scope, receive, send)


def _sent(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


async def read_limited(request: Request, most: int) -> bytes:
    """The body. Raises `Refusal` for one of more bytes, before it is read to its end, or that does not come."""
    length = request.headers.get("content-length", "")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if not (length.isdecimal() and int(length[:20]) > most):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        break
                else:
                    return bytes(body)
    except TimeoutError:
        raise Refusal(408, f"the body took over {BODY_SECONDS:.0f} seconds") from None
    except ClientDisconnect:
        raise Refusal(400, "the body is cut off") from None
    raise Refusal(413, f"the body is over the limit of {most:,} bytes", "body_too_large")


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, UserError):
        code = "context_length_exceeded" if "over the limit of" in str(error) and "new ones" in str(error) else None
        error = Refusal(400, str(error), code)
    elif isinstance(error, HTTPException):
        error = Refusal(error.status_code, error.detail)
    elif not isinstance(error, Refusal):
        error = Refusal(500, "a fault of the server")
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
    return JSONResponse(error.body, error.status, headers=headers)


class Logged:
    """One JSON line on stderr for each request, without its content; counts statuses."""

    def __init__(self, app: ASGIApp, server: Server):
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # the client left before an answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._server.worker.measured.statuses[status] += 1
            about = {"time": round(time.time(), 3), "method": scope["method"], "path": scope["path"][:100]}
            took = {"status": status, "seconds": round(time.monotonic() - began, 4)}
            print(json.dumps(about | took | scope.get("told", {})), file=sys.stderr, flush=True)


def _page() -> Response:
    """The chat page; nothing but its own script and style may run in it."""
    text = (importlib.resources.files("navil_jax.serve") / "page.html").read_text("utf-8")

    def source(tag: str) -> str:
        found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert found is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"

    policy = f"default-src 'none'; connect-src 'self'; img-src blob: data:; script-src {source('script')}; "
    policy += f"style-src {source('style')}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(text, headers=headers)


def make_app(
    assistant: Assistant,
    model: str,
    limits: Limits,
    keys: Sequence[str] = (),
    warm_up: bool = True,
    on_fault: Callable[[Exception], None] = lambda error: None,
) -> ASGIApp:
    """The server as an ASGI application; its engine starts and ends with it.

    Args:
      model: name under which clients ask for it.
      keys: of clients; none: anybody may ask.
      warm_up, on_fault: as in `Worker`.
    """
    server = Server(Worker(assistant, warm_up, on_fault), model, limits, tuple(keys))
    page = _page()

    @contextlib.asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        server.worker.start()
        yield
        server.worker.stop()

    async def index(request: Request) -> Response:
        return page

    routes = [
        Route("/", index),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
        Route("/tokens", server.tokens),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.models),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
    ]
    handled: dict[Any, Any] = dict.fromkeys((UserError, Refusal, HTTPException, Exception), _refused)
    return Logged(Starlette(routes=routes, exception_handlers=handled, lifespan=running), server)

"""Connections of clients: headers have their time, and what is no HTTP is refused in the form of OpenAI's errors."""

import asyncio
import contextlib
import json
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from navil_jax.serve.limits import Refusal

HEADER_SECONDS = 20.0  # in which the headers of a request must have come


class Connection(H11Protocol):
    """Ends a connection whose headers do not come; they have 64 KiB at most (uvicorn's limit)."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says of a request that is no HTTP."""
        self._refuse(Refusal(400, msg))

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._calm()
        elif self._late is None:
            said = Refusal(408, f"the headers took over {HEADER_SECONDS:.0f} seconds")
            self._late = self.loop.call_later(HEADER_SECONDS, self._refuse, said)

    def _calm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, refusal: Refusal) -> None:
        body = json.dumps(refusal.body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=refusal.status, headers=headers)
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has begun
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def make_server(app: ASGIApp, **settings: Any) -> uvicorn.Server:
    """A server of the app.

    Args:
      settings: of `uvicorn.Config`.
    """
    quiet: dict[str, Any] = {"access_log": False, "log_level": "error", "server_header": False}
    return uvicorn.Server(uvicorn.Config(app, http=Connection, **quiet, **settings))

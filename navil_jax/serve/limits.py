"""Limits of a server, and errors in the form of OpenAI's interface."""

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
      body_bytes: of a request, and of an image that is fetched or read from a file.
      pixels: of one image.
      images: of one request.
      new_tokens: of one answer where the request does not say how many.
      choices: answers of one request (`n`).
      requests: that are open at a time, answers of `n` counted each; one more is refused with 429.
      images_folder: whose files may be named; None: none.
      fetch: whether images may be named by http(s).
    """

    body_bytes: int = 32 << 20
    pixels: int = 40_000_000
    images: int = 64
    new_tokens: int = 1024
    choices: int = 8
    requests: int = 64
    images_folder: Path | None = None
    fetch: bool = False


class Refusal(Exception):
    """An answer with a status of 400 or more."""

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: int = 0):
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """Example: {"error": {"message": "...", "type": "invalid_request_error", "param": None, "code": None}}"""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}

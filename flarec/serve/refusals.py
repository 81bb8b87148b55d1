"""What a client is told when it does not get what it asked for: OpenAI's error object, and the HTTP status."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from flarec.errors import GenerationError

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error",
         503: "server_error"}
"""Of a status; of every other one "invalid_request_error"."""


class HttpRefusal(Exception):
    """A request that is not served.

    status   of the HTTP answer
    param    the field of the body that is wrong, None if it is none of them
    headers  of the answer
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@contextlib.contextmanager
def about(param: str) -> Iterator[None]:
    """What is wrong within the context is wrong with this field of the body."""
    try:
        yield
    except GenerationError as error:
        raise HttpRefusal(400, str(error), param=param) from None

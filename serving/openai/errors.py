"""Any exception as OpenAI's error body: {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import msgspec

from scheduler.errors import BadRequest, Unavailable

logger = logging.getLogger(__name__)

_INTERNAL = 500


class Detail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    error: Detail


class Failure(NamedTuple):
    """How a request that could not be served is answered."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def event(self) -> bytes:
        """The same as a server-sent event, for when the headers have gone out."""
        return b"data: " + self.body + b"\n\n"


def status_of(error: Exception) -> int:
    """The HTTP status that `error` deserves."""
    return error.status if isinstance(error, BadRequest | Unavailable) else _INTERNAL


def failure_of(error: Exception, request_id: str) -> Failure:
    """The answer to `error`. One that nobody foresaw goes to the log and says nothing of itself."""
    headers = {}
    match error:
        case BadRequest():
            detail = Detail(error.message, "invalid_request_error", error.param, error.code)
        case Unavailable():
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
            kind, code = ("server_error", "unavailable")
            if error.status == 429:
                kind, code = ("rate_limit_error", "rate_limit_exceeded")
            detail = Detail(error.message, kind, None, code)
        case _:
            logger.error("request %s failed", request_id, exc_info=error)
            message = "The server failed on this request; its log says more under x-request-id."
            detail = Detail(message, "server_error", None, "internal_error")
    return Failure(status_of(error), msgspec.json.encode(ErrorBody(detail)), headers)

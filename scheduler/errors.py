"""Errors, named by what whoever catches them does next.

MotleyError
├── SetupError      the operator changes something: printed without a traceback, exit code 2
├── BadRequest      the client changes the request: 4xx in OpenAI's shape, naming the field
├── Unavailable     the client tries again later: 503 with Retry-After
├── WorkerLost      the gateway replays the request elsewhere
├── HandoffFailed   the gateway replays the request elsewhere, the sender stays healthy
└── ProtocolError   the connection is closed: the peer is too old, unknown, or broken
"""

from __future__ import annotations


class MotleyError(Exception):
    """Root of the tree above."""


class SetupError(MotleyError):
    """Something on this machine is not as it must be; the text says what to do about it."""


class BadRequest(MotleyError):
    """The request can never be served as it is.

    `param` is the path of the offending field in the body, or None for the body as a whole.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


class Unavailable(MotleyError):
    """Nobody can serve the request now; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0, status: int = 503) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.status = status


class WorkerLost(MotleyError):
    """The connection to a worker ended while it held a request."""


class HandoffFailed(MotleyError):
    """A KV cache did not reach the decode worker; recomputing it there is always right."""


class ProtocolError(MotleyError):
    """A peer broke the framing, the version or the handshake."""

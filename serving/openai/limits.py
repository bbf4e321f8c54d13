"""How much one HTTP request may ask of the router."""

from __future__ import annotations

import msgspec


class HttpLimits(msgspec.Struct, frozen=True):
    body_bytes: int = 16 * 2**20
    body_s: float = 60.0  # for the whole body to arrive
    stall_s: float = 60.0  # a client that takes nothing of its stream for so long is let go
    n: int = 128
    choices: int = 2048  # prompts × n

"""Errors, named by what whoever catches them does next.

LoadtestError
├── OptionError   the user changes an option or a field of a file: exit code 2
└── WireError     the exchange has failed: the peer does not speak HTTP/1.1 or SSE as agreed
"""

from __future__ import annotations


class LoadtestError(Exception):
    """Root of the tree above; printed without a traceback."""


class OptionError(LoadtestError):
    """`option` (or a file's field) cannot be used; the text says what can."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option}: {message}")
        self.option = option


class WireError(LoadtestError):
    """The bytes that came are not a response; the connection is of no more use."""

"""What a command is, and what all of them need."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from loadtest import options
from loadtest.api import Endpoint, model_names
from loadtest.client import fetch
from loadtest.errors import LoadtestError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Coroutine

EXIT_OK = 0
EXIT_MISSED = 1
EXIT_INVALID = 3
EXIT_TOKENS = 4

_ASK_LIMIT = 10.0


class Command(NamedTuple):
    """`example` is a command line without its `motley bench`."""

    help: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Coroutine[object, object, int]]


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


async def model_of(args: argparse.Namespace) -> str:
    """`--model`, or the first that the endpoint names. Raises LoadtestError when it does not."""
    if args.model:
        return str(args.model)
    endpoint: Endpoint = options.endpoint(args, "")
    answer = await fetch(endpoint, endpoint.get("/models"), _ASK_LIMIT)
    if answer.status != 200:
        said = answer.detail or f"status {answer.status}"
        raise LoadtestError(f"--url {args.url}: GET /v1/models: {said}; is it up? or give --model")
    try:
        return model_names(answer.body)[0]
    except (msgspec.DecodeError, IndexError):
        raise LoadtestError(f"--url {args.url}: /v1/models names no model; give --model") from None

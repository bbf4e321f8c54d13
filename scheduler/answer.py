"""What a command says: a table for a person, or JSON, and the same JSON in a file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import msgspec

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rich.console import RenderableType


def write_answer(
    answer: object, shown: Iterable[RenderableType], *, as_json: bool, output: Path | None = None
) -> None:
    """Print `shown`, or the answer as JSON; with `output` that is written there too.

    Raises SetupError where it cannot be.
    """
    encoded = msgspec.json.format(msgspec.json.encode(answer), indent=2)
    if output:
        try:
            output.write_bytes(encoded + b"\n")
        except OSError as error:
            raise SetupError(f"--output {output}: {error}") from None
    if as_json:
        sys.stdout.write(encoded.decode() + "\n")
        return
    from rich.console import Console

    console = Console()
    for each in shown:
        console.print(each)

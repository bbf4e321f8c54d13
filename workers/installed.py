"""What an operator is told who starts a part of the engine that was not installed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def engine_installed() -> Iterator[None]:
    """Around the import of the engine's parts: they are extras, and heavy. Raises SetupError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise SetupError(
                "torch is not installed, which exact mode needs, and so does a machine or a model "
                "that the C++ kernels cannot run: pip install '.[engine,exact]'"
            ) from error
        raise SetupError(
            f"{error.name} is not installed, which computing needs: pip install '.[engine]'"
        ) from error

"""Which kernels this machine runs: the library's, or plain torch where it could not be built."""

from __future__ import annotations

import logging
from functools import cache

from kernels import library

logger = logging.getLogger(__name__)


@cache
def instruction_sets() -> tuple[str, ...]:
    """Instruction sets that the library has kernels for and this machine has, best first.

    Empty, which is logged once, if there is no library: then only `exact` mode, in torch, can run.
    """
    try:
        names: bytes = library.load().motley_instruction_sets()
    except OSError as error:
        logger.warning(
            "the CPU kernels are not here (%s), so torch computes, several times slower; "
            "install a C++ compiler (Debian: apt install g++) and run: pip install -e .",
            error,
        )
        return ()
    return tuple(names.decode().split())

"""The measured process's side of bench/engine.py: runs come on stdin, what happened goes back.

Every engine is a process of its own in its own environment, so this file needs nothing but the
standard library. One line of JSON each way: first the facts of the loaded engine, then for each run
the times at which tokens came.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Tokens = list[int]
Emitted = list[tuple[int, int]]  # what one step gave: (request, token)
UNTOLD = -1  # a token that came as text
_SCHEDULED = 2  # of a process's CPU clocks, the exact one (clock_getcpuclockid(3))


@dataclass(frozen=True)
class Setup:
    """What an engine is loaded with."""

    model: str  # the GGUF file
    folder: str  # the same weights in fp32, as a folder of safetensors
    threads: int
    variant: str  # what the engine's own file makes of it; empty: its default
    kv_tokens: int  # of KV cache, over all sequences
    sequences: int  # at most at once
    context: int  # tokens of the longest sequence


@dataclass(frozen=True)
class Facts:
    """What a loaded engine says of itself."""

    version: str
    weight_bytes: int  # read for each step of decode
    kv_bytes: int | None  # of `kv_tokens` tokens; None: not seen from outside


class Engine(Protocol):
    """One engine, loaded."""

    facts: Facts

    def run(self, prompts: list[Tokens], new_tokens: int) -> Iterator[Emitted]:
        """Begin all prompts at once, greedily, `new_tokens` each; time starts when this returns.

        Yields as soon as a step's tokens are known on the host.
        """
        ...

    def processes(self) -> list[int]:
        """Ids of the processes that compute."""
        ...


def serve(load: Callable[[Setup], Engine]) -> None:
    """Load an engine as the first argument says, and run what stdin asks for until it closes."""
    replies = _take_stdout()
    engine = load(Setup(**json.loads(sys.argv[1])))
    _write(replies, vars(engine.facts))
    for line in sys.stdin:
        _write(replies, _run(engine, **json.loads(line)))


def _run(engine: Engine, prompts: list[Tokens], new_tokens: int) -> dict[str, object]:
    firsts: dict[int, int] = {}
    times: list[float] = []
    cpu: list[float] = []
    counts: list[int] = []
    processes = engine.processes()
    steps = engine.run(prompts, new_tokens)
    begin, cpu_begin = time.perf_counter(), cpu_seconds(processes)
    for emitted in steps:
        times.append(time.perf_counter() - begin)
        cpu.append(cpu_seconds(processes) - cpu_begin)
        counts.append(len(emitted))
        for request, token in emitted:
            firsts.setdefault(request, token)
    return {
        "times": times,
        "cpu": cpu,
        "counts": counts,
        "firsts": [firsts[request] for request in range(len(prompts))],
        "peak_rss": max(map(peak_rss, engine.processes())),
    }


def _take_stdout() -> TextIO:
    """Keep stdout for the replies: whatever a library prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _write(replies: TextIO, value: dict[str, object]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


def cpu_seconds(processes: Iterable[int]) -> float:
    """CPU time of processes by Linux' clock of each: all threads, those that have ended too."""
    return sum(time.clock_gettime((~process << 3) | _SCHEDULED) for process in processes)


def peak_rss(process: int) -> int:
    """Most bytes that a process ever had resident, mapped files included."""
    with open(f"/proc/{process}/status") as file:
        return 1024 * int(_field(file, "VmHWM:"))


def _field(lines: Iterable[str], name: str) -> str:
    return next(line.split()[1] for line in lines if line.startswith(name))

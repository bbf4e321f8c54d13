"""What one stream feels while others are served, and what is left of the engine's time for Python.

    python bench/latency.py [--json] [--threads N] [--only itl,http,prefix,overhead]

- itl: the 99th percentile of the gaps between the tokens of 8 streams while a prompt of 2,000
  tokens arrives, with `--itl-bound-ms 120`; in process, and (http) through `motley serve`.
- prefix: time to the first token of a prompt whose first 1,024 tokens are cached, beside the same
  prompt cold; the median of some.
- overhead: the share of a lone decode step that is not spent in the kernels, greedy and sampled.

Exits with 1 if a figure is beyond its limit.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from statistics import median, quantiles
from typing import TYPE_CHECKING

import latency_http
import msgspec

from scheduler.request import Job, Limits, Prompt, Sampling
from workers.build import EngineOptions, build, find

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.request import TokenIds
    from workers.engine import Engine
    from workers.runner import Runner

MODEL = "smollm2-135m-instruct"
BOUND_MS = 120
STREAMS, STREAM_PROMPT, STREAM_TOKENS = 8, 64, 400
LONG_PROMPT = 2000
CACHED, FRESH, PREFIX_RUNS = 1024, 16, 5
DECODE_STEPS = 200
# figure → most; times in milliseconds, shares of 1
LIMITS = {
    "itl": float(BOUND_MS),
    "http": float(BOUND_MS),
    "prefix": 0.15,
    "overhead": 0.10,
    "overhead, sampled": 0.10,
}


class Figure(msgspec.Struct, frozen=True):
    """A measured number and its limit."""

    name: str
    value: float
    limit: float
    detail: str

    @property
    def holds(self) -> bool:
        return self.value <= self.limit


def engine_of(threads: int, itl_bound_s: float | None = None) -> Engine:
    options = EngineOptions(
        kv_tokens=8192, threads=threads, itl_bound_s=itl_bound_s, speculate=False
    )
    return build(find(MODEL), options)[0]


def prompt_of(length: int, seed: int) -> TokenIds:
    """Tokens that no other prompt begins with."""
    return random.Random(seed).choices(range(100, 40_000), k=length)


def job_of(name: str, tokens: int, temperature: float = 0.0) -> Job:
    return Job(
        id=name,
        epoch=0,
        model="",
        prompt=Prompt(ids=[]),
        sampling=Sampling(seed=0, temperature=temperature),
        limits=Limits(max_tokens=tokens, ignore_eos=True),
        created=0.0,
    )


def itl(threads: int) -> list[Figure]:
    """In process: gaps of the streams from the long prompt's arrival to its first token."""
    engine = engine_of(threads, BOUND_MS / 1000)
    for index in range(STREAMS):
        engine.add(job_of(str(index), STREAM_TOKENS), prompt_of(STREAM_PROMPT, index))
    for _ in range(30):
        engine.step()
    engine.add(job_of("long", 1), prompt_of(LONG_PROMPT, 99))
    gaps, busy, arrived = [], [], False
    while not arrived:
        begin, cpu = time.perf_counter(), time.process_time()
        outputs = engine.step().outputs
        gaps += [1000 * (time.perf_counter() - begin)] * STREAMS
        busy += [1000 * (time.process_time() - cpu) / threads] * STREAMS
        arrived = any(output.id == "long" for output in outputs)
    figure = gap_figure("itl", gaps)
    own = f"; of the process's own CPU time per thread: {quantiles(busy, n=100)[98]:.1f} ms"
    return [msgspec.structs.replace(figure, detail=figure.detail + own)]


def gap_figure(name: str, gaps: list[float]) -> Figure:
    """Gaps in milliseconds."""
    percentile = quantiles(gaps, n=100)[98]
    detail = f"median {median(gaps):.1f} ms, largest {max(gaps):.1f} ms of {len(gaps)} gaps"
    return Figure(name, percentile, LIMITS[name], detail)


def http(threads: int) -> list[Figure]:
    """The same through `motley serve` with one mixed worker."""
    streams = [prompt_of(STREAM_PROMPT, index) for index in range(STREAMS)]
    words = ("--threads", str(threads), "--itl-bound-ms", str(BOUND_MS), "--no-speculation")
    gaps = latency_http.gaps(
        MODEL, words, streams, prompt_of(LONG_PROMPT, 99), tokens=STREAM_TOKENS
    )
    return [gap_figure("http", gaps)]


def prefix(threads: int) -> list[Figure]:
    """A system prompt of CACHED tokens, each time with another question after it."""
    engine = engine_of(threads)
    cold, warm = [], []
    for run in range(PREFIX_RUNS):
        shared = prompt_of(CACHED, 1000 + run)
        cold.append(first_token_s(engine, shared + prompt_of(FRESH, 2 * run)))
        warm.append(first_token_s(engine, shared + prompt_of(FRESH, 2 * run + 1)))
    detail = f"{1000 * median(cold):.0f} ms cold, {1000 * median(warm):.1f} ms cached"
    return [Figure("prefix", median(warm) / median(cold), LIMITS["prefix"], detail)]


def first_token_s(engine: Engine, prompt: TokenIds) -> float:
    begin = time.perf_counter()
    engine.add(job_of("a", 1), prompt)
    while engine.has_work:
        engine.step()
    return time.perf_counter() - begin


class Timed:
    """A model's program whose time is taken. It stands where the runner's own program did."""

    def __init__(self, runner: Runner) -> None:
        self._run: Callable[..., None] = runner.model.program.run  # type: ignore[attr-defined]
        self.seconds = 0.0
        runner.model.program.run = self  # type: ignore[attr-defined]

    def __call__(self, *arguments: object) -> None:
        begin = time.perf_counter()
        self._run(*arguments)
        self.seconds += time.perf_counter() - begin


def overhead(threads: int) -> list[Figure]:
    engine = engine_of(threads)
    timed = Timed(engine.runner)
    figures = []
    for name, temperature in (("overhead", 0.0), ("overhead, sampled", 1.0)):
        engine.add(job_of(name, DECODE_STEPS, temperature), prompt_of(STREAM_PROMPT, 7))
        engine.step()
        steps, outside = [], []
        while engine.has_work:
            timed.seconds, begin = 0.0, time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - begin)
            outside.append(steps[-1] - timed.seconds)
        detail = f"{1000 * median(outside):.2f} of {1000 * median(steps):.2f} ms"
        figures.append(Figure(name, median(outside) / median(steps), LIMITS[name], detail))
    return figures


MEASURES: dict[str, Callable[[int], list[Figure]]] = {
    "itl": itl,
    "http": http,
    "prefix": prefix,
    "overhead": overhead,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default=",".join(MEASURES), help="some of these, by name")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(MEASURES):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(MEASURES)}")
    figures = []
    for name in args.only.split(","):
        for figure in MEASURES[name](args.threads):
            figures.append(figure)
            print_figure(figure, as_json=args.json)
    return 0 if all(figure.holds for figure in figures) else 1


def print_figure(figure: Figure, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(figure).decode(), flush=True)
        return
    unit = "{:.1f} ms" if figure.limit > 1 else "{:.1%}"
    value, limit = unit.format(figure.value), unit.format(figure.limit)
    verdict = "" if figure.holds else "  BEYOND"
    print(f"{figure.name:18}{value:>10} (at most {limit}): {figure.detail}{verdict}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

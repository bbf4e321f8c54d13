"""The body of `motley profile`: the steps of a worker on this machine, timed, as a file."""

from __future__ import annotations

import datetime
import os
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from scheduler.answer import write_answer
from scheduler.argument_types import above_zero
from scheduler.cost import of_rates
from scheduler.measured import PHASES, Point, Worker, WorkerProfile, summarise
from workers.arguments import add_compute_arguments

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import RenderableType

    from scheduler.hardware import Model
    from workers.build import EngineOptions
    from workers.build import Model as Found
    from workers.recording import Recorded
    from workers.stepping import Cell

EXAMPLES = """\
examples:
  motley profile smollm2                                  # a table
  motley profile smollm2 --threads 1 --output profile.json
  motley profile ./model.gguf --kv-tokens 8192 --seconds 120 --json

Then, in the service file of `motley plan`:      and in the workers file of `motley simulate`:
  [[profile]]                                      [[worker]]
  file = "profile.json"                            role = "mixed"
  gpu = "CPU-2"                                    profile = "profile.json"
"""
SECONDS = 40.0


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="as `motley worker` takes it")
    command.add_argument("--output", type=Path, metavar="PROFILE.json", help="for planning")
    command.add_argument("--json", action="store_true", help="print the profile as JSON")
    command.add_argument(
        "--seconds",
        type=above_zero,
        default=SECONDS,
        metavar="S",
        help=f"to measure in; steps that would take too long are left out (default {SECONDS:g})",
    )
    add_compute_arguments(command)


def run(options: argparse.Namespace) -> None:
    """Raises SetupError that names what the operator must change."""
    from workers.build import EngineOptions, find

    threads = options.threads or os.cpu_count() or 1
    profile = measure(
        find(options.model),
        EngineOptions(
            kv_tokens=options.kv_tokens,
            threads=threads,
            mode=options.mode,
            kv_dtype=options.kv_dtype,
            quantize=options.quantize,
            speculate=False,
        ),
        options.seconds,
    )
    write_answer(profile, tables(profile), as_json=options.json, output=options.output)


def measure(found: Found, options: EngineOptions, seconds: float) -> WorkerProfile:
    """Load a model, time its steps, and fit a line to them. Shows how far it is."""
    from workers.build import build
    from workers.recording import RecordingEngine
    from workers.stepping import ROUNDS, grid, time_steps

    made, rates = build(found, options)
    engine, worker = RecordingEngine(made), _worker(options, made.runner.numbers)
    cells = grid(engine, of_rates(rates), seconds)
    with _progress(len(cells) * ROUNDS) as on_cell:
        steps = time_steps(engine, cells, seconds, on_cell)
    cache = engine.runner.cache
    return summarise(
        _shape(found, options),
        worker,
        datetime.datetime.now(datetime.UTC).date(),
        list(points(cells, steps)),
        kv_token_bytes=cache.layers * cache.token_bytes,
    )


def points(cells: list[Cell], steps: list[list[Recorded]]) -> Iterable[Point]:
    """Each cell's steps as one point; of a prompt, one for each piece."""
    for cell, recorded in zip(cells, steps, strict=True):
        pieces: dict[int, list[Recorded]] = {}
        for step in recorded:
            pieces.setdefault(step.shape.prompt_context if cell.prompt else 0, []).append(step)
        for alike in pieces.values():
            middle = alike[len(alike) // 2].shape
            ms = 1e3 * median(step.seconds for step in alike)
            yield Point(*middle, ms=ms, runs=len(alike))


def _shape(found: Found, options: EngineOptions) -> Model:
    from scheduler.hardware import Model
    from workers.build import shape_of

    shape = shape_of(found, options)
    return Model(
        name=found.name,
        parameters=shape.parameters,
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        context=shape.context_length,
    )


def _worker(options: EngineOptions, numbers: str) -> Worker:
    from workers.machine import cpu_name, memory_bytes

    return Worker(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        memory=round(memory_bytes() / 1e9, 1),
        threads=options.threads,
        numbers=numbers,
        kv_tokens=options.kv_tokens,
        step_tokens=options.max_step_tokens,
        sequences=options.max_sequences,
        load=round(os.getloadavg()[0], 1),
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("timing steps", total=total)
        yield lambda: bar.advance(task)


def tables(profile: WorkerProfile) -> Iterator[RenderableType]:
    """What was measured, and how far the fitted line is from it."""
    from rich.table import Table

    worker, line = profile.worker, profile.cost
    table = Table("step", "prompt", "sequences", "context", "measured ms", "runs", "fitted ms", "")
    for phase in PHASES:
        for point in sorted(
            (point for point in profile.steps if point.phase == phase),
            key=lambda point: (point.prompt_tokens, point.decodes, point.context),
        ):
            fitted = 1e3 * line.predict(point.shape)
            table.add_row(
                phase,
                str(point.prompt_tokens or ""),
                str(point.decodes or ""),
                str(point.context),
                f"{point.ms:.1f}",
                str(point.runs),
                f"{fitted:.1f}",
                f"{fitted / point.ms - 1:+.0%}",
            )
    yield table
    yield (
        f"{profile.model.name} on {worker.cpu}: {worker.threads} of {worker.cores} cores, "
        f"{worker.numbers}, {worker.kv_tokens} tokens of KV cache, {profile.date}"
    )
    if worker.load > worker.cores:
        yield f"others compute here too (load {worker.load:g}): measure again when they do not"
    for phase, error in profile.errors.items():
        yield (
            f"{phase}: fitted within {error.mean:.0%} on the mean, {error.worst:.0%} at worst, "
            f"over {error.steps} kinds of step"
        )
    yield (
        f"fitted: a step takes {1e3 * line.step:.2f} ms, and {1e3 * line.token:.3f} ms for each "
        f"prompt token, {1e3 * line.sequence:.2f} ms for each sequence, and for each token of "
        f"context {1e6 * line.attend:.2f} µs of a prompt, {1e6 * line.context:.2f} µs of a sequence"
    )

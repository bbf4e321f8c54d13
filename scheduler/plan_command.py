"""The body of `motley plan`: reads files, keeps the time, writes the answer."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from scheduler.errors import SetupError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from scheduler.plan import Plan

EXAMPLES = """\
examples:
  motley plan --problem problem.json --json     # straight to the solver
  motley plan --problem problem.json --slices 8 # Mélange's form, to compare with
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--problem", type=Path, metavar="FILE.json", help="buckets and columns")
    command.add_argument("--json", action="store_true", help="print the plan as JSON")
    command.add_argument("--output", type=Path, metavar="PLAN.json", help="the plan as a file")
    command.add_argument(
        "--slices", type=int, metavar="S", help="multiples of 1/S only, as Mélange routes"
    )
    command.add_argument(
        "--time-limit", type=float, default=60.0, metavar="S", help="seconds (default 60)"
    )
    command.add_argument(
        "--gap", type=float, default=0.0, help="stop within this share of the least cost"
    )


def run(options: argparse.Namespace) -> None:
    """Raises SetupError that names what the operator must change."""
    if options.problem is None:
        raise SetupError("say what to plan for: --problem FILE.json")
    if options.slices is not None and options.slices < 1:
        raise SetupError(f"--slices {options.slices}: at least 1")
    if not options.time_limit > 0:
        raise SetupError(f"--time-limit {options.time_limit:g}: above 0 seconds")
    if not 0 <= options.gap < 1:
        raise SetupError(f"--gap {options.gap:g}: a share, 0 or above and below 1")
    plan = _solve_problem(options)
    encoded = msgspec.json.format(msgspec.json.encode(plan), indent=2)
    if options.output:
        try:
            options.output.write_bytes(encoded + b"\n")
        except OSError as error:
            raise SetupError(f"--output {options.output}: {error}") from None
    if options.json:
        sys.stdout.write(encoded.decode() + "\n")


def _solve_problem(options: argparse.Namespace) -> Plan:
    from scheduler.planner import make_plan
    from scheduler.planner_model import Options
    from scheduler.problem import read_problem

    problem = read_problem(options.problem)
    asked = Options(slices=options.slices, time_limit=options.time_limit, gap=options.gap)
    with _quiet():
        return make_plan(problem, asked, time.perf_counter)


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS prints some of its own debugging to file 1, where the answer must stand alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)

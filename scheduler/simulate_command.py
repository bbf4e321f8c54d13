"""The body of `motley simulate`: reads files, draws requests, writes what came of them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scheduler.answer import write_answer
from scheduler.errors import SetupError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from scheduler.capacity import Slo
    from scheduler.simulate_report import Interval, Summary
    from scheduler.simulate_spec import WorkerSpec
    from scheduler.workload import Arrival

EXAMPLES = """\
examples:
  motley simulate --workers workers.toml --trace trace.csv --rate 12
  motley simulate --workers workers.toml --trace trace.csv --arrivals gamma:3 --runs 5 --json
  motley simulate --workers workers.toml --trace trace.csv --goodput 40 --coarse
  motley simulate service.toml --plan plan.json    # every model of the plan at its own rate

workers.toml:
  slo = {ttft_ms = 1000, tpot_ms = 80, share = 0.9}
  [[worker]]
  role = "mixed"
  count = 10
  prefill_tokens_per_s = 3000.0
  decode_s_per_token = 0.02
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("service", nargs="?", type=Path, metavar="SERVICE.toml")
    command.add_argument("--plan", type=Path, metavar="PLAN.json", help="of this service")
    command.add_argument("--workers", type=Path, metavar="FILE.toml", help="workers, and the SLO")
    command.add_argument("--trace", type=Path, metavar="FILE", help="sizes and times of requests")
    command.add_argument("--rate", type=float, help="requests/s (default: the trace's)")
    command.add_argument(
        "--arrivals",
        default="poisson",
        metavar="PROCESS",
        help="poisson (default), trace, gamma:CV (bursty), on-off:ON_S,OFF_S",
    )
    command.add_argument("--requests", type=int, default=6000, help="of a run (default 6000)")
    command.add_argument("--runs", type=int, default=1, help="with other draws (default 1)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--goodput", type=float, metavar="MOST", help="the highest rate that keeps the SLO"
    )
    command.add_argument(
        "--coarse", action="store_true", help="in closed form: six times as fast, about as right"
    )
    command.add_argument("--json", action="store_true", help="print the answer as JSON")


@dataclass(frozen=True, slots=True)
class Case:
    """One model's workers and what is asked of them."""

    name: str
    workers: list[WorkerSpec]
    slo: Slo
    sizes: Sequence[Arrival]
    rate: float


@dataclass(frozen=True, slots=True)
class Answer:
    """`runs[0]` is of the first seed; `goodput` in requests/s where it was asked for."""

    rate: float
    slo: Slo
    attainment: Interval
    runs: list[Summary]
    seconds: float
    goodput: float | None = None


def run(options: argparse.Namespace) -> None:
    """Raises SetupError that names what the operator must change."""
    if bool(options.service) == bool(options.workers):
        raise SetupError("say what to simulate: SERVICE.toml with --plan, or --workers FILE.toml")
    for name in ("requests", "runs", "rate", "goodput"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SetupError(f"--{name} {value:g}: above 0")
    cases = _of_service(options) if options.service else [_of_workers(options)]
    answers = {case.name: _answer(case, options) for case in cases}
    from scheduler.simulate_table import tables

    shown = (each for name, answer in answers.items() for each in tables(name, answer))
    write_answer(answers, shown, as_json=options.json)


def _of_workers(options: argparse.Namespace) -> Case:
    from scheduler.simulate_plan import read_workers
    from scheduler.workload import from_arrivals, read_trace

    if not options.trace:
        raise SetupError("--trace FILE: say how large requests are")
    workers, slo = read_workers(options.workers)
    sizes = read_trace(options.trace)
    rate = options.rate or from_arrivals(sizes).rate
    return Case(options.workers.stem, workers, slo, sizes, rate)


def _of_service(options: argparse.Namespace) -> list[Case]:
    from scheduler.plan_file import read_plan
    from scheduler.planner_columns import build
    from scheduler.service_file import read_service
    from scheduler.simulate_plan import plan_workers
    from scheduler.workload import read_trace

    if not options.plan:
        raise SetupError("--plan PLAN.json: what `motley plan --output` wrote")
    service = read_service(options.service)
    workers = plan_workers(service, build(service), read_plan("--plan", options.plan))
    cases = []
    for demand in service.demands:
        sizes = read_trace(options.trace) if options.trace else demand.workload.sizes
        rate = options.rate or demand.workload.rate
        cases.append(Case(demand.name, workers[demand.name], demand.slo, sizes, rate))
    return cases


def _answer(case: Case, options: argparse.Namespace) -> Answer:
    import numpy as np

    from scheduler.simulate import simulate
    from scheduler.simulate_coarse import simulate_coarse
    from scheduler.simulate_load import draw, parse_process
    from scheduler.simulate_report import goodput, interval, summarise

    process = parse_process(options.arrivals)

    def once(number: int, rate: float) -> Summary:
        rng = np.random.default_rng(options.seed + number)
        requests = draw(case.sizes, process, rng, count=options.requests, rate=rate)
        run = simulate_coarse if options.coarse else simulate
        return summarise(run(case.workers, requests, slo=case.slo), case.workers, case.slo)

    def attained(rate: float) -> float:
        shares = [once(number, rate).attainment for number in range(options.runs)]
        return sum(shares) / len(shares)

    start = time.perf_counter()
    runs = [once(number, case.rate) for number in range(options.runs)]
    most = options.goodput
    best = goodput(attained, case.slo.share, most, most / 128) if most else None
    shares = [each.attainment for each in runs]
    return Answer(
        rate=case.rate,
        slo=case.slo,
        attainment=interval(shares, options.requests),
        runs=runs,
        seconds=time.perf_counter() - start,
        goodput=best,
    )

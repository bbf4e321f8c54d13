"""The body of `motley plan`: reads files, keeps the time, writes the answer."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from scheduler import goodput_command, pareto_command
from scheduler.answer import write_answer
from scheduler.errors import SetupError
from scheduler.plan_file import PlanBucket, read_plan

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from scheduler.certify import Certificate
    from scheduler.pareto import Curve
    from scheduler.plan import Plan
    from scheduler.planner_columns import Built
    from scheduler.service_file import Service

EXAMPLES = """\
examples:
  motley plan service.toml                      # a table, certified by simulation
  motley plan service.toml --no-certify         # seconds sooner, and cheaper than what holds
  motley plan service.toml --explain            # and why, what more would save, what is missing
  motley plan service.toml --pareto cost.html   # what tighter, looser, more would cost, drawn
  motley plan service.toml --json --output plan.json
  motley plan --problem problem.json --json     # straight to the solver
  motley plan --problem problem.json --slices 8 # Mélange's form, to compare with
  motley plan --goodput --model opt-13b --gpu A100-80GB --gpus 4 --ttft-ms 200 --tpot-ms 100
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("service", nargs="?", type=Path, metavar="SERVICE.toml")
    command.add_argument("--problem", type=Path, metavar="FILE.json", help="buckets and columns")
    command.add_argument("--goodput", action="store_true", help="the best rate of one GPU type")
    command.add_argument("--json", action="store_true", help="print the answer as JSON")
    command.add_argument("--output", type=Path, metavar="PLAN.json", help="the answer as a file")
    command.add_argument("--explain", action="store_true", help="say why; solves some 20 times")
    command.add_argument(
        "--no-certify",
        dest="certify",
        action="store_false",
        help="do not simulate and tighten the plan of a service",
    )
    command.add_argument(
        "--previous", type=Path, metavar="PLAN.json", help="what runs now: switching has its cost"
    )
    command.add_argument(
        "--slices", type=int, metavar="S", help="shares in multiples of 1/S, as Mélange routes"
    )
    command.add_argument(
        "--time-limit", type=float, metavar="S", help="seconds (default 50, or the service's)"
    )
    command.add_argument("--gap", type=float, help="stop within this share of the least cost")
    pareto_command.add_arguments(command)
    goodput_command.add_arguments(command)


def run(options: argparse.Namespace) -> None:
    """Raises SetupError that names what the operator must change."""
    chosen = [bool(options.service), bool(options.problem), options.goodput]
    if sum(chosen) != 1:
        raise SetupError("say what to plan for: SERVICE.toml, --problem FILE.json, or --goodput")
    require_scipy()
    _check(options)
    if options.goodput:
        _goodput(options)
    elif options.problem:
        _problem(options)
    else:
        _service(options)


def require_scipy() -> None:
    """Raises SetupError where the extra is missing."""
    if find_spec("scipy") is None:
        raise SetupError("planning needs scipy: pip install -e '.[plan]' in the checkout")


def _check(options: argparse.Namespace) -> None:
    if options.pareto and not options.service:
        raise SetupError("--pareto draws a service: give SERVICE.toml")
    pareto_command.check(options.pareto)
    if options.slices is not None and options.slices < 1:
        raise SetupError(f"--slices {options.slices}: at least 1")
    if options.time_limit is not None and not options.time_limit > 0:
        raise SetupError(f"--time-limit {options.time_limit:g}: above 0 seconds")
    if options.gap is not None and not 0 <= options.gap < 1:
        raise SetupError(f"--gap {options.gap:g}: a share, 0 or above and below 1")


def _problem(options: argparse.Namespace) -> None:
    from scheduler.plan_report import plan_tables
    from scheduler.planner import make_plan
    from scheduler.planner_model import Options
    from scheduler.problem import read_problem

    problem = read_problem(options.problem)
    with quiet():
        plan = make_plan(problem, _asked(options, Options()), time.perf_counter)
    _write(options, msgspec.to_builtins(plan), list(plan_tables(problem, plan)))


def _service(options: argparse.Namespace) -> None:
    from scheduler.explain import explain
    from scheduler.plan_report import certificate_lines, explanation_lines, plan_tables
    from scheduler.planner import make_plan
    from scheduler.planner_columns import build
    from scheduler.service_file import read_service

    service = read_service(options.service)
    previous = read_plan("--previous", options.previous).replicas if options.previous else {}
    built = build(service, previous)
    built = built._replace(options=_asked(options, built.options))
    with quiet():
        first = make_plan(built.problem, built.options, time.perf_counter)
        plan, certificate = _certified(service, built, first) if options.certify else (first, None)
    answer = msgspec.to_builtins(plan) | _details(service, built, plan, certificate)
    shown = list(plan_tables(built.problem, plan, built.facts))
    if certificate:
        shown += certificate_lines(certificate)
    if options.explain:  # with what was planned before certification, like with like
        with quiet():
            why = explain(service, built, first, time.perf_counter)
        answer["explanation"] = msgspec.to_builtins(why)
        shown += explanation_lines(why, first)
    if options.pareto:
        curves = _pareto(options, service, built, first, (plan, certificate))
        answer["pareto"] = msgspec.to_builtins(curves)
        shown += pareto_command.tables(curves)
    _write(options, answer, shown)


def _pareto(
    options: argparse.Namespace,
    service: Service,
    built: Built,
    first: Plan,
    found: tuple[Plan, Certificate | None],
) -> tuple[Curve, ...]:
    plan, certificate = found
    begun = time.perf_counter()
    sure = (plan, certificate) if certificate else None
    with quiet():
        curves = pareto_command.run(service, built, first, sure, _certified)
    pareto_command.write(options.pareto, service, curves, time.perf_counter() - begun)
    return curves


def _certified(service: Service, built: Built, plan: Plan) -> tuple[Plan, Certificate]:
    import numpy as np

    from scheduler.certify import Certifier

    return Certifier(service, built, time.perf_counter, np.random.default_rng).certify(plan)


def _asked(options: argparse.Namespace, base: Any) -> Any:
    given = {
        name: value
        for name in ("slices", "time_limit", "gap")
        if (value := getattr(options, name)) is not None
    }
    return msgspec.structs.replace(base, **given)


def _details(
    service: Service, built: Built, plan: Plan, certificate: Certificate | None
) -> dict[str, Any]:
    """What `plan_file.PlanFile` knows beside the plan, and where its numbers come from."""
    used = [column for column in built.problem.columns if column.name in plan.replicas]
    fields = ("model", "gpu", "gpus", "role", "market", "region", "price")
    columns = {
        column.name: {field: getattr(column, field) for field in fields}
        | msgspec.to_builtins(built.facts[column.name])
        | {"price": column.price, "price_provenance": built.facts[column.name].price}
        for column in used
    }
    buckets = [
        PlanBucket(bucket.name, demand.name, *bucket.size, bucket.rate)
        for demand in service.demands
        for bucket in demand.workload.buckets
    ]
    details = {
        "certified": bool(certificate and certificate.certified),
        "columns": columns,
        "buckets": msgspec.to_builtins(buckets),
        "slo": {demand.name: msgspec.to_builtins(demand.slo) for demand in service.demands},
    }
    return details | ({"certificate": msgspec.to_builtins(certificate)} if certificate else {})


def _goodput(options: argparse.Namespace) -> None:
    from scheduler.plan_report import goodput_table

    answer = goodput_command.run(options, time.perf_counter)
    said = f"{answer.attainment} attainment, {answer.simulations} runs in {answer.seconds:.1f} s"
    if answer.replicas is not None:
        said += f"; {options.rate:g} requests/s need {answer.replicas} such pairs"
    _write(options, msgspec.to_builtins(answer), [goodput_table(answer.placements), said])


def _write(options: argparse.Namespace, answer: dict[str, Any], shown: list[Any]) -> None:
    write_answer(answer, shown, as_json=options.json, output=options.output)


@contextmanager
def quiet() -> Iterator[None]:
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

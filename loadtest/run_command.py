"""`motley bench run`: one load, with or without faults."""

from __future__ import annotations

import asyncio
import math
import signal
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from loadtest import files, options
from loadtest.command import EXIT_INVALID, EXIT_MISSED, EXIT_OK, EXIT_TOKENS, Command, model_of
from loadtest.faults import FaultReport, Plan, Saboteur, phases, read_plan
from loadtest.integrity import inspect
from loadtest.live import Live
from loadtest.measure import Measurement, Run
from loadtest.report import Report, build

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from loadtest.spec import Spec


def _run_options(parser: argparse.ArgumentParser) -> None:
    options.add_load(parser)
    files.add_options(parser)
    parser.add_argument("--faults", type=Path, help="TOML plan: kill, stop, slow, partition")


async def _run(args: argparse.Namespace) -> int:
    spec = options.spec(args, await model_of(args))
    cost = options.cost_per_hour(args)
    if args.faults is None:
        run = await _measured(spec, args)
        faults = None
    else:
        run, faults = await _broken(spec, args, read_plan(args.faults))
    report = build(run, cost, faults)
    files.write(report, run.outcomes, args)
    return verdict(report)


def verdict(report: Report) -> int:
    if not report.valid:
        return EXIT_INVALID
    if report.faults is not None and not report.faults.integrity.ok:
        return EXIT_TOKENS
    return EXIT_OK if report.attained else EXIT_MISSED


async def _measured(spec: Spec, args: argparse.Namespace) -> Run:
    measurement = Measurement(spec)
    async with Live(measurement, quiet=args.json):
        with _stopped_by_ctrl_c(measurement):
            return await measurement.run()


async def _broken(spec: Spec, args: argparse.Namespace, plan: Plan) -> tuple[Run, FaultReport]:
    """The same requests twice: unbroken, as the reference, and with the faults."""
    spec = msgspec.structs.replace(spec, keep_text=plan.check_tokens)
    measurement = Measurement(spec)
    plan.check_within(max(measurement.workload.times, default=math.inf))
    reference = await _measured(spec, args) if plan.check_tokens else None
    saboteur = Saboteur(plan, lambda: measurement.start)
    async with Live(measurement, quiet=args.json):
        with _stopped_by_ctrl_c(measurement):
            running = asyncio.ensure_future(measurement.run())
            await measurement.started.wait()
            work = asyncio.ensure_future(saboteur.work())
            work.add_done_callback(partial(_stop_if_failed, measurement))
            try:
                run = await running
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
    if not work.cancelled() and (error := work.exception()) is not None:
        raise error
    met = [spec.classes[o.group].slo.met(o) for o in run.outcomes]
    before = reference.outcomes if reference else []
    unbroken = [spec.classes[o.group].slo.met(o) for o in before]
    return run, FaultReport(
        plan,
        saboteur.events,
        phases(plan, run.outcomes, met),
        inspect(run.outcomes, before, ignore_eos=spec.endpoint.ignore_eos),
        sum(unbroken) / len(unbroken) if unbroken else None,
    )


def _stop_if_failed(measurement: Measurement, work: asyncio.Future[None]) -> None:
    if not work.cancelled() and work.exception() is not None:
        measurement.stop()


@contextmanager
def _stopped_by_ctrl_c(measurement: Measurement) -> Iterator[None]:
    """Ctrl-C ends the run early; what was measured is still reported, as INVALID."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, measurement.stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


RUN = Command(
    "send a load and report how much of it met its SLO",
    "run --url http://127.0.0.1:8000 --rate 10 --duration 60s "
    "--slo ttft=250ms,tpot=100ms --html report.html",
    _run_options,
    _run,
)

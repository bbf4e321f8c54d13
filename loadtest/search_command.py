"""`motley bench search`: the highest rate at which the SLO holds, and attainment against rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loadtest import files, options
from loadtest.command import EXIT_INVALID, EXIT_MISSED, EXIT_OK, Command, model_of
from loadtest.probing import Bounds, Measured, SearchReport, search, sweep
from loadtest.units import number, seconds

if TYPE_CHECKING:
    import argparse


def _options(parser: argparse.ArgumentParser) -> None:
    options.add_load(parser)
    group = parser.add_argument_group("search")
    group.add_argument("--from", dest="start", default="1", help="first rate, requests/s")
    group.add_argument("--rates", help="measure exactly these rates instead, e.g. 1,2,4,8")
    group.add_argument("--tolerance", default="0.05", help="width of the bracket at the end")
    group.add_argument("--probes", type=int, default=12, help="at most so many rates")
    group.add_argument("--least", type=int, default=300, help="requests before a decision")
    group.add_argument("--most", type=int, default=3000, help="requests of one probe at most")
    group.add_argument("--probe-time", default="120s", help="of one probe at most")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="the report as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="one self-contained page")


async def _run(args: argparse.Namespace) -> int:
    spec = options.spec(args, await model_of(args))
    bounds = Bounds(
        args.least,
        args.most,
        seconds(args.probe_time, "--probe-time"),
        number(args.tolerance, "--tolerance"),
        args.probes,
    )
    tell = _silent if args.json else _tell
    if args.rates:
        rates = sorted(number(rate, "--rates") for rate in args.rates.split(","))
        report = await sweep(spec, rates, bounds, tell)
    else:
        report = await search(spec, number(args.start, "--from"), bounds, tell)
    files.write_search(report, args)
    if not args.json:
        print(summary(report))
    if not report.valid:
        return EXIT_INVALID
    return EXIT_MISSED if report.capacity is None else EXIT_OK


def _silent(measured: Measured) -> None:
    """JSON goes to stdout alone."""


def _tell(measured: Measured) -> None:
    probe = measured.probe
    word = "holds" if probe.held else "fails"
    doubt = "" if probe.decided else ", by its share only: more --most or --probe-time would tell"
    late = "" if measured.valid else " INVALID: the client was late"
    print(
        f"{probe.rate:8.4g}/s {word}: {probe.share:7.2%} of {probe.scheduled} "
        f"[{probe.low:.2%}, {probe.high:.2%}]{doubt}{late}",
        flush=True,
    )


def summary(report: SearchReport) -> str:
    target = f"{report.share * 100:g} % of requests within their SLO"
    if report.capacity is None:
        return f"no rate that was tried kept {target}; lower --from"
    if report.failed is None:
        return f"at least {report.capacity:.4g} requests/s keep {target}: no rate tried has failed"
    return (
        f"{report.capacity:.4g} requests/s keep {target} "
        f"(holds at {report.held:.4g}, fails at {report.failed:.4g})"
    )


SEARCH = Command(
    "find the highest rate at which the SLO holds",
    "search --url http://127.0.0.1:8000 --from 1 --slo distserve-chat-13b --html search.html",
    _options,
    _run,
)

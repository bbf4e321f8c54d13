"""The body of `motley autoscale`: a day of traffic under the autoscaler, and under others."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from scheduler.errors import SetupError

if TYPE_CHECKING:
    import argparse

    from scheduler.compare_day import Comparison

EXAMPLES = """\
examples:
  motley autoscale service.toml                       # a made-up day at the service's rate
  motley autoscale service.toml --rate 20 --picture day.svg
  motley autoscale service.toml --rates monitoring.csv --from-hour 24 --json

monitoring.csv: seconds, requests/s; several files are summed. What lies before --from-hour is
history: the forecast learns from it, and it is not replayed.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("service", type=Path, metavar="SERVICE.toml")
    command.add_argument(
        "--rates", type=Path, nargs="+", metavar="FILE.csv", help="seconds, requests/s"
    )
    command.add_argument(
        "--rate", type=float, help="mean requests/s of the day (default: the service's)"
    )
    command.add_argument("--from-hour", type=float, default=24.0, help="where the day begins (24)")
    command.add_argument("--hours", type=float, default=24.0, help="its length (24)")
    command.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="CV",
        help="standard deviation of gaps over their mean (1: Poisson)",
    )
    command.add_argument(
        "--target", type=float, default=0.7, help="utilisation that the threshold aims at (0.7)"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--decisions", action="store_true", help="every change, and why")
    command.add_argument("--picture", type=Path, metavar="FILE.svg", help="the day, drawn")
    command.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(options: argparse.Namespace) -> None:
    """Raises SetupError that names what the operator must change."""
    for name in ("rate", "hours", "burstiness", "target"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SetupError(f"--{name} {value:g}: above 0")
    if not options.from_hour >= 0:
        raise SetupError(f"--from-hour {options.from_hour:g}: 0 or above")
    from scheduler.plan_command import quiet, require_scipy

    require_scipy()
    with quiet():
        answer = _compared(options)
    if options.picture:
        from scheduler.autoscale_svg import picture

        try:
            options.picture.write_text(picture(answer), encoding="utf-8")
        except OSError as error:
            raise SetupError(f"--picture {options.picture}: {error}") from None
    if options.json:
        import msgspec

        encoded = msgspec.json.format(msgspec.json.encode(answer), indent=2)
        sys.stdout.write(encoded.decode() + "\n")
        return
    from rich.console import Console

    from scheduler.autoscale_table import shown

    console = Console()
    for each in shown(answer, decisions=options.decisions):
        console.print(each)


def _compared(options: argparse.Namespace) -> Comparison:
    import numpy as np

    from scheduler.compare_day import compare
    from scheduler.rate_curve import built_in, read_curves
    from scheduler.service_file import read_service

    service = read_service(options.service)
    generator = np.random.default_rng(options.seed)
    start, end = options.from_hour * 3600, (options.from_hour + options.hours) * 3600
    if options.rates:
        curve = read_curves(options.rates)
        if not curve.times[0] <= start < end <= curve.times[-1]:
            raise SetupError(
                f"--from-hour {options.from_hour:g} --hours {options.hours:g}: the rates are of "
                f"hours {curve.times[0] / 3600:g} to {curve.times[-1] / 3600:g}"
            )
    else:
        curve = built_in(math.ceil(end / 86_400), generator)
    return compare(
        service,
        curve.cut(0.0, start) if start else None,
        curve.cut(start, end),
        rate=options.rate or sum(demand.workload.rate for demand in service.demands),
        burstiness=options.burstiness,
        target=options.target,
        generator=generator,
        clock=time.perf_counter,
    )

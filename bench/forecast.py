"""How far forecasts of rates are off on a trace, and whether their margins cover what they say.

In every window each forecast is for the highest rate of the next ones; its error is
|forecast - came| / came. Windows with less than a fiftieth of the mean rate, outages, are left out.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from scheduler.rate_curve import DAY_S, Curve, read_curves
from scheduler.rate_forecast import RateForecast

EXAMPLE = """\
example:
  python bench/forecast.py data/language/m-large/*-trace.csv --window 600
"""
OUTAGE = 0.02  # of the mean rate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rates", type=Path, nargs="+", help="CSV of seconds, requests/s; summed")
    parser.add_argument("--window", type=float, default=300.0, help="seconds (300)")
    parser.add_argument("--ahead", type=int, default=2, help="windows (2)")
    parser.add_argument("--cover", type=float, default=0.8, help="share to be covered (0.8)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(read_curves(options.rates), options.window, options.ahead, options.cover)
    if options.json:
        print(json.dumps(found))
        return
    table = Table("", "off by (mean)", "(median)")
    for name, (mean, median) in found["errors"].items():
        table.add_row(name, f"{mean:.1%}", f"{median:.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"{found['windows']} windows; {found['covered']:.1%} covered of {options.cover:.0%} asked "
        f"for; forecasts from: {found['sources']}"
    )


def measure(curve: Curve, window: float, ahead: int, cover: float) -> dict:
    times = np.arange(curve.times[0], curve.times[-1] + 1, window)
    rates = np.interp(times, curve.times, curve.rates).tolist()
    day = round(DAY_S / window)
    forecast = RateForecast(window, ahead, cover)
    errors: dict[str, list[float]] = {"forecast": [], "last window": [], "day before": []}
    covered, sources = 0, Counter()
    for at in range(len(rates) - ahead):
        said, came = forecast.learn(rates[at]), max(rates[at + 1 : at + 1 + ahead])
        if at < day or came < OUTAGE * curve.mean:
            continue
        before = max(rates[at + 1 - day : at + 1 - day + ahead])
        for name, guess in zip(errors, (said.rate, rates[at], before), strict=True):
            errors[name].append(abs(guess / came - 1))
        covered += said.upper >= came
        sources[said.source] += 1
    windows = sources.total()
    if not windows:
        raise SystemExit("a trace of more than a day is needed: its first day is only learned from")
    return {
        "windows": windows,
        "errors": {n: (float(np.mean(e)), float(np.median(e))) for n, e in errors.items()},
        "covered": covered / windows,
        "sources": dict(sources),
    }


if __name__ == "__main__":
    main()

"""What is going on, on the terminal, four times a second; silent where there is none."""

from __future__ import annotations

import asyncio
import sys
from time import monotonic
from typing import TYPE_CHECKING

from loadtest.histogram import Histogram
from loadtest.units import seconds_text

if TYPE_CHECKING:
    from rich.table import Table

    from loadtest.measure import Measurement

_EVERY = 0.25


class Live:
    """`async with Live(measurement)`: shows it until the end of the block."""

    def __init__(self, measurement: Measurement, *, quiet: bool = False) -> None:
        self._measurement = measurement
        self._quiet = quiet or not sys.stderr.isatty()
        self._seen = self._met = self._failed = self._tokens = 0
        self._ttft, self._tpot, self._lag = Histogram(), Histogram(), Histogram()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Live:
        if not self._quiet:
            self._task = asyncio.create_task(self._show())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _show(self) -> None:
        from rich.console import Console
        from rich.live import Live as Screen

        console = Console(stderr=True)
        with Screen(console=console, auto_refresh=False, transient=True) as screen:
            while True:
                self._look()
                screen.update(self._table(), refresh=True)
                await asyncio.sleep(_EVERY)

    def _look(self) -> None:
        """Takes in what has ended since the last look."""
        measurement = self._measurement
        classes = measurement.spec.classes
        for outcome in measurement.outcomes[self._seen :]:
            self._met += classes[outcome.group].slo.met(outcome)
            self._failed += not outcome.ok
            self._tokens += outcome.tokens
            self._lag.add(max(0.0, outcome.lag))
            if outcome.ok:
                self._ttft.add(outcome.ttft)
                self._tpot.add(outcome.tpot)
        self._seen = len(measurement.outcomes)

    def _table(self) -> Table:
        from rich.table import Table

        elapsed = max(1e-9, monotonic() - self._measurement.start)
        due = len(self._measurement.workload.times)
        table = Table(title=self._measurement.spec.load(), title_justify="left")
        for name in (
            "s",
            "ended",
            "SLO met",
            "TTFT p50 / p99",
            "TPOT p50 / p99",
            "tok/s",
            "lag p99",
        ):
            table.add_column(name, justify="right")
        share = self._met / self._seen if self._seen else 0.0
        failed = f" ({self._failed} failed)" if self._failed else ""
        table.add_row(
            f"{elapsed:.0f}",
            f"{self._seen}{f' / {due}' if due else ''}{failed}",
            f"{share:.1%}" if self._seen else "–",
            _pair(self._ttft),
            _pair(self._tpot),
            f"{self._tokens / elapsed:.0f}",
            seconds_text(self._lag.quantile(0.99)),
        )
        return table


def _pair(histogram: Histogram) -> str:
    points = (histogram.quantile(share) for share in (0.5, 0.99))
    return " / ".join(seconds_text(point) for point in points)

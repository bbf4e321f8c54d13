"""What bench/engine.py prints: medians in a table for each number of threads, or all as JSON."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

import msgspec
from engine_machine import Conditions
from engine_process import UNTOLD, Facts
from engine_workloads import Figure, Measured, Workload
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SPARE_BYTES = 60e6  # what a worker may hold beside torch, its weights and its KV cache


class Run(msgspec.Struct, frozen=True):
    """One workload, once, through one engine."""

    arm: str
    threads: int
    round: int
    workload: Workload
    measured: Measured
    facts: Facts
    load: float  # of the machine over the last minute, as the run ended


class Cell(msgspec.Struct, frozen=True):
    """One figure of one arm: its median over the rounds, and all of them."""

    threads: int
    figure: str
    title: str
    arm: str
    median: float
    values: list[float]
    per_cpu_s: float | None = None  # the median, had time been counted on the CPU's clock


class Report(msgspec.Struct):
    """Everything measured, and what it was measured on."""

    conditions: Conditions
    model: str
    bare_torch_rss: int  # bytes
    read_rates: dict[int, float] = {}  # threads → bytes a second
    skipped: dict[str, str] = {}  # arm → why, and what to do
    cells: list[Cell] = []
    runs: list[Run] = []

    def summarise(self, figures: Sequence[Figure]) -> None:
        """Fill `cells` from `runs`."""
        for threads, arm in dict.fromkeys((run.threads, run.arm) for run in self.runs):
            mine = [run for run in self.runs if (run.threads, run.arm) == (threads, arm)]
            for figure in figures:
                self._add_rate(figure, [r for r in mine if r.workload.name == figure.workload])
            self._add(mine[0], "cores", "cores used", [run.measured.cores for run in mine])
            peaks: dict[int, float] = {}
            for run in mine:
                peaks[run.round] = max(peaks.get(run.round, 0), run.measured.peak_rss / 1e6)
            self._add(mine[0], "rss", "peak RSS, MB", list(peaks.values()))

    def _add_rate(self, figure: Figure, runs: list[Run]) -> None:
        if not runs:  # the engine broke before it came to this
            return
        values = [figure.of(r.workload, r.measured.counts, r.measured.times) for r in runs]
        cpu = [figure.of(r.workload, r.measured.counts, r.measured.cpu) for r in runs]
        self._add(runs[0], figure.key, figure.title, values, median(cpu))
        if figure.key == "decode":
            bound = self.read_rates[runs[0].threads] / runs[0].facts.weight_bytes
            shares = [value / bound for value in values]
            self._add(runs[0], "bound", "decode ÷ its bound", shares)

    def _add(
        self, of: Run, key: str, title: str, values: list[float], per_cpu_s: float | None = None
    ) -> None:
        self.cells.append(Cell(of.threads, key, title, of.arm, median(values), values, per_cpu_s))

    def agreeing(self, arm: str) -> tuple[int, int]:
        """How many requests begin with the token that the first arm gave them, and of how many."""
        first = next(iter(self.runs)).arm
        of = {
            (r.threads, r.round, r.workload): r.measured.firsts for r in self.runs if r.arm == first
        }
        pairs = [
            pair
            for r in self.runs
            if r.arm == arm and (r.threads, r.round, r.workload) in of
            for pair in zip(r.measured.firsts, of[r.threads, r.round, r.workload], strict=True)
        ]
        told = [pair for pair in pairs if UNTOLD not in pair]
        return sum(mine == theirs for mine, theirs in told), len(told)


def show(report: Report) -> None:
    console = Console()
    for threads in dict.fromkeys(cell.threads for cell in report.cells):
        cells = {(c.figure, c.arm): c for c in report.cells if c.threads == threads}
        read = f"{threads} thread(s), memory read at {report.read_rates[threads] / 1e9:.1f} GB/s"
        console.print(_table(read, cells, _wall))
        rates = {key: cell for key, cell in cells.items() if cell.per_cpu_s}
        console.print(_table(f"{threads} thread(s), on the clock of CPU time", rates, _cpu))
    for line in _notes(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(
    title: str, cells: dict[tuple[str, str], Cell], text: Callable[[Cell, Cell | None], str]
) -> Table:
    arms = list(dict.fromkeys(arm for _, arm in cells))
    table = Table(title=title, title_justify="left")
    table.add_column("tokens/s")
    for arm in arms:
        table.add_column(arm, justify="right")
    for figure in dict.fromkeys(figure for figure, _ in cells):
        row = [cells.get((figure, arm)) for arm in arms]
        name = next(cell.title for cell in row if cell)
        table.add_row(name, *(text(cell, row[0]) if cell else "–" for cell in row))
    return table


def _wall(cell: Cell, first: Cell | None) -> str:
    if cell.figure == "bound":
        return f"{cell.median:.0%}"
    if cell.figure == "cores":
        return f"{cell.median:.2f}"
    if cell.figure == "rss":
        return f"{cell.median:.0f}"
    return _rate(cell.median, first.median if first else None)


def _cpu(cell: Cell, first: Cell | None) -> str:
    return _rate(cell.per_cpu_s or 0, first.per_cpu_s if first else None)


def _rate(rate: float, first: float | None) -> str:
    """With how many times it the first arm's is."""
    ratio = f" ×{first / rate:.2f}" if first and first != rate else ""
    return (f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}") + ratio


def _notes(report: Report) -> Iterator[str]:
    """Under the table: what its figures depend on."""
    facts = {run.arm: run.facts for run in report.runs}
    rounds = len({run.round for run in report.runs})
    yield f"{report.model}; medians of {rounds} round(s); ×: the first column's ÷ this one's"
    yield "decode's bound: bytes of weights a token needs, at the rate memory was read above"
    yield (
        "cores used below the number of threads: others computed too and rates are too low; with "
        "1 thread the clock of CPU time says what a quiet machine gives"
    )
    for arm, fact in facts.items():
        equal, of = report.agreeing(arm)
        agree = f", first tokens as the first column's {equal} of {of}" if of else ""
        cache = f", KV cache {fact.kv_bytes / 1e6:.0f} MB" if fact.kv_bytes else ""
        yield f"{arm} {fact.version}: weights {fact.weight_bytes / 1e6:.0f} MB{cache}{agree}"
    own = facts.get("motley")
    if own and own.kv_bytes:
        allowed = report.bare_torch_rss + own.weight_bytes + own.kv_bytes + SPARE_BYTES
        yield (
            f"motley's peak RSS should be at most {allowed / 1e6:.0f} MB: import torch "
            f"{report.bare_torch_rss / 1e6:.0f}, weights, KV cache, and {SPARE_BYTES / 1e6:.0f}"
        )
    for arm, reason in report.skipped.items():
        yield f"skipped {arm}: {reason}"
    at = report.conditions
    yield (
        f"{at.cpu}, {at.cores} cores ({' '.join(at.flags)}), {at.memory_gb} GB; "
        f"Python {at.python}, torch {at.torch}; {at.began}; "
        f"load before {_loads(at.load_before)}, after {_loads(at.load_after)}"
    )


def _loads(loads: tuple[float, float, float]) -> str:
    return " ".join(f"{load:.1f}" for load in loads)

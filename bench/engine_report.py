"""What bench/engine.py prints: medians in a table for each number of threads, or all as JSON."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

import msgspec
from engine_machine import Conditions
from engine_process import Facts
from engine_workloads import Figure, Measured, Workload
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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


class Report(msgspec.Struct):
    conditions: Conditions
    model: str
    bare_torch_rss: int  # bytes
    read_rates: dict[int, float] = {}  # threads → bytes a second
    skipped: dict[str, str] = {}  # arm → why, and what to do
    cells: list[Cell] = []
    runs: list[Run] = []

    def summarise(self, figures: Iterable[Figure]) -> None:
        """Fill `cells` from `runs`."""
        for threads, arm in dict.fromkeys((run.threads, run.arm) for run in self.runs):
            mine = [run for run in self.runs if (run.threads, run.arm) == (threads, arm)]
            for figure in figures:
                values = [
                    figure.of(run.workload, run.measured)
                    for run in mine
                    if run.workload.name == figure.workload
                ]
                self._add(threads, arm, figure.key, figure.title, values)
                if figure.key == "decode":
                    rate = self.read_rates[threads] / mine[0].facts.weight_bytes
                    shares = [value / rate for value in values]
                    self._add(threads, arm, "bound", "decode ÷ its bound", shares)
            used = [run.measured.cpu_s / run.measured.seconds for run in mine]
            self._add(threads, arm, "cores", "cores used", used)
            peaks = [
                max(run.measured.peak_rss for run in mine if run.round == number)
                for number in sorted({run.round for run in mine})
            ]
            self._add(threads, arm, "rss", "peak RSS, MB", [peak / 1e6 for peak in peaks])

    def _add(self, threads: int, arm: str, key: str, title: str, values: list[float]) -> None:
        if values:
            self.cells.append(Cell(threads, key, title, arm, median(values), values))

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
        return sum(mine == theirs for mine, theirs in pairs), len(pairs)


def show(report: Report) -> None:
    console = Console()
    for threads in dict.fromkeys(cell.threads for cell in report.cells):
        console.print(_table(report, threads))
    for line in _notes(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(report: Report, threads: int) -> Table:
    cells = {(c.figure, c.arm): c for c in report.cells if c.threads == threads}
    arms = list(dict.fromkeys(arm for _, arm in cells))
    titles = {c.figure: c.title for c in cells.values()}
    rate = report.read_rates[threads] / 1e9
    table = Table(
        title=f"{threads} thread(s), memory read at {rate:.1f} GB/s", title_justify="left"
    )
    table.add_column("tokens/s")
    for arm in arms:
        table.add_column(arm, justify="right")
    for figure, title in titles.items():
        ours = cells.get((figure, arms[0]))
        table.add_row(title, *(_text(cells.get((figure, arm)), ours) for arm in arms))
    return table


def _text(cell: Cell | None, ours: Cell | None) -> str:
    """A median; a peer's rate with how many times it the first arm's is."""
    if cell is None:
        return "–"
    if cell.figure == "bound":
        return f"{cell.median:.0%}"
    if cell.figure == "cores":
        return f"{cell.median:.2f}"
    if ours is None or cell is ours or cell.figure == "rss":
        return f"{cell.median:.0f}" if cell.median >= 100 else f"{cell.median:.1f}"
    return f"{cell.median:.1f} ×{ours.median / cell.median:.2f}"


def _notes(report: Report) -> Iterator[str]:
    """Under the table: what its figures depend on."""
    facts = {run.arm: run.facts for run in report.runs}
    rounds = len({run.round for run in report.runs})
    yield f"{report.model}; medians of {rounds} round(s); ×: the first column's ÷ this one's"
    yield "decode's bound: bytes of weights a token needs, at the rate memory was read above"
    yield "cores used below the number of threads: others computed too, and the rates are too low"
    for arm, fact in facts.items():
        equal, of = report.agreeing(arm)
        yield (
            f"{arm} {fact.version}: weights {fact.weight_bytes / 1e6:.0f} MB, KV cache "
            f"{fact.kv_bytes / 1e6:.0f} MB, first tokens as the first column's {equal} of {of}"
        )
    if own := facts.get("motley"):
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

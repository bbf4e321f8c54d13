"""Reports as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loadtest.units import seconds_text

if TYPE_CHECKING:
    from loadtest.calibrate import Calibration
    from loadtest.compare import Comparison
    from loadtest.report import Report
    from loadtest.validity import Check

NAMES = {
    "ttft": "TTFT from schedule",
    "ttft_from_send": "TTFT from send",
    "tpot": "TPOT",
    "itl_chunk": "ITL per chunk",
    "itl_token": "ITL per token",
    "largest_gap": "largest gap",
    "e2e": "E2E from schedule",
    "lag": "schedule lag",
}


def check_text(check: Check) -> str:
    value, limit = (
        (seconds_text(check.value), seconds_text(check.limit))
        if check.unit == "s"
        else (f"{check.value:.1%}", f"{check.limit:.0%}")
        if check.unit == "share"
        else (f"{check.value:g}", f"{check.limit:g}")
    )
    return f"{check.name}: {value} (at most {limit})"


def show(report: Report) -> None:
    console = Console(highlight=False)
    _verdict(console, report)
    totals, realised = report.totals, report.realised
    shape = f"; CV {realised.cv:.3g}, dispersion {realised.dispersion:.3g}"
    console.print(
        f"{report.load}; {totals.scheduled} requests in {totals.seconds:.1f} s "
        f"({totals.asked_rate:.4g}/s asked, {totals.achieved_rate:.4g}/s sent"
        f"{shape if realised.count else ''})"
    )
    console.print(_latencies(report))
    console.print(
        f"goodput {totals.goodput:.4g} req/s, {totals.output_rate:.4g} tok/s out; "
        f"late tokens {totals.late_token_share:.2%}, prefix hits {totals.prefix_hit_share:.1%}, "
        f"chunks read together {totals.coalesced_share:.1%}"
    )
    if totals.cost_per_million_output is not None:
        met = totals.cost_per_million_met
        console.print(
            f"cost per million output tokens: {totals.cost_per_million_output:.4g}; "
            f"of requests that met their SLO: {'–' if met is None else f'{met:.4g}'}"
        )
    if report.warmup_detected > 0:
        console.print(
            f"the first {report.warmup_detected:.1f} s look like warm-up (MSER-5): --warmup leaves "
            "them out"
        )
    for kind, found in report.errors.items():
        console.print(f"[red]{found.count} × {kind}[/]: {found.example}", soft_wrap=True)
    _faults(console, report)


def _verdict(console: Console, report: Report) -> None:
    if not report.valid:
        console.print("[bold red]INVALID[/] run: do not use its figures")
    for check in report.checks:
        if not check.ok:
            console.print(f"  {check_text(check)}: {check.advice}", soft_wrap=True)
    for group in report.classes:
        word = "[bold green]met[/]" if group.attained else "[bold red]missed[/]"
        console.print(
            f"SLO {word}{'' if len(report.classes) == 1 else f' by {group.name}'}: "
            f"{group.share:.2%} of {group.scheduled} requests "
            f"[{group.low:.2%}, {group.high:.2%}] within the limits; asked: {group.slo}; "
            f"p{group.slo.share * 100:g} TTFT {seconds_text(group.ttft)}, "
            f"TPOT {seconds_text(group.tpot)}",
            soft_wrap=True,
        )


def _latencies(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in ("", "mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for key, title in NAMES.items():
        found = report.latencies[key]
        values = (found.mean, found.p50, found.p90, found.p95, found.p99, found.max)
        table.add_row(title, *(seconds_text(value) for value in values))
    return table


def _faults(console: Console, report: Report) -> None:
    if report.faults is None:
        return
    for event in report.faults.events:
        console.print(f"at {event.at:.2f} s: {event.what}")
    for phase in report.faults.phases:
        console.print(
            f"{phase.name:>6} the faults: {phase.share:.2%} of {phase.scheduled} met their SLO "
            f"[{phase.low:.2%}, {phase.high:.2%}], {phase.failed} failed"
        )
    found = report.faults.integrity
    word = "[green]each token once[/]" if found.ok else "[bold red]tokens lost or repeated[/]"
    console.print(
        f"{word}: {found.compared} answers compared with the unbroken run; lost {found.lost}, "
        f"repeated {found.repeated}, changed {found.changed}, short {found.short}, "
        f"over {found.over}"
    )
    for example in found.examples:
        console.print(f"  {example}", soft_wrap=True)


def show_calibration(result: Calibration) -> None:
    console = Console(highlight=False)
    for check in result.checks:
        if not check.ok:
            console.print(f"[red]INVALID[/] {check_text(check)}: {check.advice}", soft_wrap=True)
    known, load = result.behaviour, result.load
    console.print(
        f"{load.rate:g} requests/s for {load.duration:g} s against a server of TTFT "
        f"{seconds_text(known.ttft)} and ITL {seconds_text(known.itl)}; |measured - known|:"
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("", "p50", "p99", "max"):
        table.add_column(name, justify="right" if name else "left")
    rows = {
        "TTFT from schedule": result.ttft_error,
        "TTFT from send": result.ttft_error_from_send,
        "TPOT": result.tpot_error,
        "ITL": result.itl_error,
        "schedule lag": result.lag,
    }
    for name, found in rows.items():
        table.add_row(name, *(seconds_text(v) for v in (found.p50, found.p99, found.max)))
    console.print(table)
    console.print(
        f"a stall of {load.stall:g} s: {result.stall_measured:.2%} of requests missed "
        f"{load.slo}; arithmetic says {result.stall_expected:.2%}"
    )
    console.print("[green]accurate[/]" if result.accurate else "[bold red]not accurate[/]")


def show_comparison(result: Comparison) -> None:
    console = Console(highlight=False)
    for warning in result.warnings:
        console.print(f"[yellow]note[/]: {warning}", soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("", "A", "B", "B - A, 95 %", "B is"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for line in result.lines:
        text = seconds_text if line.unit == "s" else "{:.2%}".format
        ends = (f"{'-' if end < 0 else '+'}{text(abs(end))}" for end in (line.low, line.high))
        table.add_row(line.name, text(line.a), text(line.b), " … ".join(ends), line.verdict)
    console.print(table)

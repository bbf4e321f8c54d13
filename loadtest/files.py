"""Where a report goes: the terminal, JSON, CSV, HTML."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from loadtest.errors import OptionError
from loadtest.outcome import Outcome

if TYPE_CHECKING:
    import argparse

    from loadtest.probing import SearchReport
    from loadtest.report import Report

_CSV_DERIVED = ("lag", "ttft", "ttft_from_send", "tpot", "e2e")
_CSV_LEFT_OUT = ("text",)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the report as JSON")
    group.add_argument("--save", type=Path, metavar="FILE.json", help="the report as JSON")
    group.add_argument("--csv", type=Path, metavar="FILE.csv", help="a line per request")
    group.add_argument("--html", type=Path, metavar="FILE.html", help="one self-contained page")


def write(report: Report, outcomes: list[Outcome], args: argparse.Namespace) -> None:
    """Raises OptionError when a file cannot be written."""
    if args.save:
        _to_file("--save", args.save, encode(report))
    if args.csv:
        _csv(report, outcomes, args.csv)
    if args.html:
        from loadtest.report_html import page

        _to_file("--html", args.html, page(report).encode())
    if args.json:
        print(encode(report).decode())
    else:
        from loadtest.console import show

        show(report)


def write_search(report: SearchReport, args: argparse.Namespace) -> None:
    if args.save:
        _to_file("--save", args.save, encode(report))
    if args.html:
        from loadtest.search_html import page

        _to_file("--html", args.html, page(report).encode())
    if args.json:
        print(encode(report).decode())


def encode(report: msgspec.Struct) -> bytes:
    return msgspec.json.encode(report)


def _to_file(option: str, path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OptionError(f"{option} {path}", str(error)) from None


def _csv(report: Report, outcomes: list[Outcome], path: Path) -> None:
    fields = [name for name in Outcome.__struct_fields__ if name not in _CSV_LEFT_OUT]
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*fields, *_CSV_DERIVED, "class", "met"])
            for outcome in outcomes:
                group = report.spec.classes[outcome.group]
                writer.writerow(
                    [getattr(outcome, name) for name in fields]
                    + [getattr(outcome, name) if outcome.ok else "" for name in _CSV_DERIVED]
                    + [group.name, int(group.slo.met(outcome))]
                )
    except OSError as error:
        raise OptionError(f"--csv {path}", str(error)) from None

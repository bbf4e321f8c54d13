"""What `motley bench` knows."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from loadtest.command import EXIT_INVALID, EXIT_MISSED, EXIT_OK, Command, add_json
from loadtest.report import Report
from loadtest.run_command import RUN
from loadtest.search_command import SEARCH
from loadtest.server import Behaviour, Server
from loadtest.slo import PRESETS
from loadtest.units import number, seconds

if TYPE_CHECKING:
    import argparse


def _server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=8001, help="0: any")
    parser.add_argument("--ttft", default="50ms")
    parser.add_argument("--itl", default="10ms")
    parser.add_argument("--slots", type=int, help="how many prefills run at once; default: all")


async def _server(args: argparse.Namespace) -> int:
    behaviour = Behaviour(
        seconds(args.ttft, "--ttft"), seconds(args.itl, "--itl", positive=False), args.slots
    )
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    async with Server(behaviour, port=args.port) as server:
        print(f"listening on http://127.0.0.1:{server.port}", flush=True)
        await stop.wait()
    return EXIT_OK


def _calibrate_options(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("--rate", default="100", help="requests/s")
    parser.add_argument("--duration", default="20s", help="of each of the two phases")
    parser.add_argument("--ttft", default="50ms", help="of the server")
    parser.add_argument("--itl", default="10ms", help="of the server")
    parser.add_argument("--stall", default="5s", help="how long the server stops")


async def _calibrate(args: argparse.Namespace) -> int:
    from loadtest.calibrate import Load, calibrate
    from loadtest.console import show_calibration

    behaviour = Behaviour(seconds(args.ttft, "--ttft"), seconds(args.itl, "--itl"))
    load = Load(
        number(args.rate, "--rate"),
        seconds(args.duration, "--duration"),
        stall=seconds(args.stall, "--stall"),
    )
    result = await calibrate(behaviour, load)
    if args.json:
        print(msgspec.json.encode(result).decode())
    else:
        show_calibration(result)
    return EXIT_OK if result.accurate and result.valid else EXIT_INVALID


def _compare_options(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("a", type=Path, metavar="A.json", help="the run to compare with")
    parser.add_argument("b", type=Path, metavar="B.json", help="the run in question")


async def _compare(args: argparse.Namespace) -> int:
    from loadtest.compare import compare, read_report
    from loadtest.console import show_comparison

    a, b = read_report(args.a), read_report(args.b)
    result = compare(a, b)
    if args.json:
        print(msgspec.json.encode(result).decode())
    else:
        show_comparison(result)
    if not (a.valid and b.valid):
        return EXIT_INVALID
    return EXIT_MISSED if result.worse else EXIT_OK


async def _presets(args: argparse.Namespace) -> int:
    if args.json:
        print(msgspec.json.encode(PRESETS).decode())
    else:
        print("\n".join(f"{name:32} {slo}" for name, slo in PRESETS.items()))
    return EXIT_OK


async def _schema(args: argparse.Namespace) -> int:
    print(msgspec.json.encode(msgspec.json.schema(Report)).decode())
    return EXIT_OK


COMMANDS = {
    "run": RUN,
    "search": SEARCH,
    "calibrate": Command(
        "prove the harness on this machine, against a server of known times",
        "calibrate --rate 100 --duration 20s",
        _calibrate_options,
        _calibrate,
    ),
    "compare": Command(
        "say whether run B differs from run A by more than chance",
        "compare before.json after.json",
        _compare_options,
        _compare,
    ),
    "server": Command(
        "serve a known TTFT and ITL, to measure measuring with",
        "server --port 8001 --ttft 50ms --itl 10ms",
        _server_options,
        _server,
    ),
    "presets": Command("list the SLO presets", "presets --json", add_json, _presets),
    "schema": Command("print the JSON schema of a run's report", "schema", add_json, _schema),
}

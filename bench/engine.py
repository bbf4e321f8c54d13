"""Motley's engine and its peers, turn by turn: same model file, same prompts, same threads.

    bench/peers.sh llama_cpp vllm    install the peers (minutes)
    python bench/engine.py           all engines that are installed, with 1 and with 2 threads
    python bench/engine.py --only prefill,decode --threads 1 --runs 5
    python bench/engine.py --tiny    seconds: does everything still run?

Each round starts every engine in a fresh process, lets them take turns at each workload, and stops
them; figures are medians over the rounds. docs/performance.md says how to read them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from engine_arms import KINDS, Absent, Arm, ArmProcess, Broken, find_arm, start
from engine_machine import bare_torch_rss, conditions, read_rate
from engine_process import Setup
from engine_report import Report, Run, show
from engine_workloads import FIGURES, FULL, TINY, WARM_UP, Workload
from rich.console import Console

from workers.weights.catalogue import resolve
from workers.weights.wheel import models_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_process import Facts

HERE = Path(__file__).parent
MODEL = "smollm2-135m-instruct"
DEFAULT_ARMS = "motley,llama_cpp,transformers,vllm"
CONVERT_LIMIT_S = 600
progress = Console(stderr=True)


class Bench:
    """The measuring: rounds of fresh processes, which fill a report."""

    def __init__(
        self, report: Report, workloads: Sequence[Workload], paths: tuple[str, str]
    ) -> None:
        self.report = report
        self.workloads = workloads
        self.model, self.folder = paths
        self.arms: list[Arm] = []

    async def round(self, number: int, threads: int) -> None:
        """Every arm in a fresh process, all alive together, one computing at a time."""
        every = (*self.workloads, WARM_UP)
        most = max(every, key=lambda w: w.requests * w.context)
        setup = Setup(
            model=self.model,
            folder=self.folder,
            threads=threads,
            variant="",
            kv_tokens=most.requests * most.context,
            sequences=max(w.requests for w in every),
            context=max(w.context for w in every),
        )
        async with AsyncExitStack() as stack:
            alive: list[tuple[ArmProcess, Facts]] = []
            for arm in list(self.arms):
                try:
                    process = await stack.enter_async_context(start(arm, setup))
                    facts = await process.facts()
                    await process.run(WARM_UP, number)
                    alive.append((process, facts))
                except Broken as error:
                    self._drop(arm, error)
            for workload in self.workloads:
                for process, facts in _rotated(alive, number):
                    if process.arm in self.arms:
                        await self._turn(process, facts, workload, number, threads)

    async def _turn(
        self, process: ArmProcess, facts: Facts, workload: Workload, number: int, threads: int
    ) -> None:
        try:
            measured = await process.run(workload, number)
        except Broken as error:
            self._drop(process.arm, error)
            return
        progress.print(
            f"{threads} threads, round {number}: {process.arm.name}, {workload.name}: "
            f"{measured.seconds:.2f} s, {measured.cores:.2f} cores",
            highlight=False,
            soft_wrap=True,
        )
        self.report.runs.append(
            Run(process.arm.name, threads, number, workload, measured, facts, os.getloadavg()[0])
        )

    def _drop(self, arm: Arm, error: Broken) -> None:
        self.arms.remove(arm)
        self.report.skipped[arm.name] = str(error)
        progress.print(str(error), markup=False, highlight=False)


def _rotated(alive: list[tuple[ArmProcess, Facts]], by: int) -> list[tuple[ArmProcess, Facts]]:
    """Another one begins in each round: a machine that slows down favours nobody."""
    at = by % len(alive) if alive else 0
    return alive[at:] + alive[:at]


def fp32_folder(model: Path) -> Path:
    """The model as fp32 safetensors, in the cache of models; written if it is not there yet."""
    folder = models_folder().with_name("bench") / f"{model.stem}.fp32"
    if not folder.exists():
        command = [sys.executable, str(HERE / "engine_checkpoint.py"), str(model), str(folder)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=CONVERT_LIMIT_S
        )
        if done.returncode:
            raise Absent(f"needs the model in safetensors: {done.stderr.strip().splitlines()[-1]}")
    return folder


def gather(bench: Bench, names: list[str], peers: Path) -> None:
    """Find the arms; what is absent goes into the report, with what to do about it."""
    for name in names:
        try:
            arm = find_arm(name, peers)
            if arm.kind.needs_folder:
                bench.folder = str(fp32_folder(Path(bench.model)))
            bench.arms.append(arm)
        except Absent as error:
            bench.report.skipped[name] = str(error)
            progress.print(str(error), markup=False, highlight=False)


async def measure(bench: Bench, threads: list[int], rounds: int) -> None:
    report = bench.report
    for count in threads:
        report.read_rates[count] = read_rate(count)
        for number in range(rounds):
            await bench.round(number, count)
        report.read_rates[count] = max(report.read_rates[count], read_rate(count))
    report.conditions.load_after = os.getloadavg()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    keys = ",".join(figure.key for figure in FIGURES)
    parser.add_argument("--arms", default=DEFAULT_ARMS, help=f"of {', '.join(KINDS)}; NAME:VARIANT")
    parser.add_argument("--http", action="store_true", help="Motley through `motley serve` too")
    parser.add_argument("--only", default=keys, metavar="FIGURES", help=f"of {keys}")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rounds (default 3)")
    parser.add_argument("--threads", default="1,2", metavar="N,…", help="default 1,2")
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"), metavar="DIR")
    parser.add_argument("--model", default=MODEL, help="a known name, or a GGUF file")
    parser.add_argument("--json", action="store_true", help="everything measured, on stdout")
    parser.add_argument("--tiny", action="store_true", help="Motley alone, a few tokens, one round")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.arms, options.runs, options.threads = "motley", 1, "1"
    for word, known in ((options.only, keys.split(",")), (options.arms, list(KINDS))):
        for part in word.split(","):
            if part.partition(":")[0] not in known:
                parser.error(f"{part!r} is none of {', '.join(known)}")
    return options


def main() -> int:
    options = parse()
    figures = [figure for figure in FIGURES if figure.key in options.only.split(",")]
    wanted = {figure.workload for figure in figures}
    workloads = [w for w in (TINY if options.tiny else FULL) if w.name in wanted]
    names = [*options.arms.split(","), *(["motley_http"] if options.http else [])]
    model = resolve(options.model).path
    report = Report(conditions(), model.name, bare_torch_rss=bare_torch_rss())
    bench = Bench(report, workloads, (str(model), ""))
    gather(bench, names, options.peers)
    asyncio.run(measure(bench, list(map(int, options.threads.split(","))), options.runs))
    report.summarise(figures)
    if options.json:
        print(msgspec.json.encode(report).decode())
    else:
        show(report)
    return int("motley" in report.skipped)


if __name__ == "__main__":
    sys.exit(main())

"""Real runs of SmolLM2 workers beside the simulator: TTFT, TPOT, attainment of the same requests.

Each arm (2 mixed workers; 1 prefill + 1 decode) serves a Poisson load at two rates through the
real router over HTTP. Every worker writes down its steps. The cost model of an arm is fitted to the
steps of its *other* run, and, to tell the model's error from the machine's drift, to those of the
same run. Then the simulator gets the requests as they were sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import numpy as np
from latency_http import pieces
from rich.console import Console
from rich.table import Table

from scheduler.cost import CostModel, StepShape
from scheduler.cost_fit import fit
from scheduler.measured import read_worker_profile
from scheduler.messages import Role
from scheduler.simulate import simulate
from scheduler.simulate_spec import WorkerSpec
from scheduler.workload import Arrival

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from scheduler.measured import WorkerProfile

EXAMPLES = """\
examples:
  python bench/fidelity.py                       # 2 arms x 2 rates, about 6 minutes
  python bench/fidelity.py --cap 0.35 --json     # each worker at most 0.35 of a core
"""
MODEL = "smollm2-135m-instruct"
ARMS = {"mixed": (Role.MIXED, Role.MIXED), "split": (Role.PREFILL, Role.DECODE)}
PROMPTS, ANSWERS = (64, 512), (8, 64)  # tokens, uniform
VOCAB = (100, 40_000)  # ids that any prompt may hold
READY_S, STOP_S, SILENCE_S = 90, 20, 120
AT_ONCE_S = 0.02  # a step that begins so soon after the last one was due
KV_TOKENS = 16384
GROUPS = Path("/sys/fs/cgroup/cpu")  # v1
FIRST = "20480"  # CPU shares with a cap: the cap, not who else computes, says how fast we are
KV_TOKEN_BYTES = 2 * 30 * 3 * 64 * 2  # SmolLM2-135M: layers, kv heads, head dim, fp16
LINK_BYTES_S = 5e8  # loopback, beside everything else


@dataclass(slots=True)
class Run:
    """One arm at one rate: what was sent when, and when its first and last tokens came."""

    arm: str
    rate: float
    requests: list[Arrival] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    steps: list[list[tuple[StepShape, float]]] = field(default_factory=list)  # by worker

    @property
    def ttft(self) -> np.ndarray[Any, Any]:
        return np.subtract(self.first, [request.at for request in self.requests])

    @property
    def tpot(self) -> np.ndarray[Any, Any]:
        gaps = [request.output - 1 for request in self.requests]
        return np.subtract(self.last, self.first) / gaps


def main() -> None:
    options = _options()
    with _first() if options.cap else contextlib.nullcontext():
        runs = [
            asyncio.run(_run(arm, rate, options, number))
            for arm in options.arms
            for number, rate in enumerate(options.rates)
        ]
    limits = options.ttft_ms / 1e3, options.tpot_ms / 1e3
    profile = read_worker_profile(options.profile) if options.profile else None
    rows = [row for run in runs for row in _compare(run, _other(run, runs), profile, limits)]
    if options.json:
        print(json.dumps({"conditions": _conditions(options), "rows": rows}, indent=2))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=140).print(table)
    print(json.dumps(_conditions(options)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.4, 0.8], help="requests/s")
    parser.add_argument("--requests", type=int, default=60, help="of a run")
    parser.add_argument("--cap", type=float, help="share of a core that a worker may use (root)")
    parser.add_argument("--ttft-ms", type=float, default=2000.0, help="limit (default 2000)")
    parser.add_argument("--tpot-ms", type=float, default=30.0, help="limit (default 30)")
    parser.add_argument(
        "--profile", type=Path, help="of `motley profile`, taken in the same conditions: a row each"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _conditions(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "cap": options.cap,
        "requests": options.requests,
        "ttft_ms": options.ttft_ms,
        "tpot_ms": options.tpot_ms,
        "model": options.model,
        "seed": options.seed,
    }


@contextlib.contextmanager
def _first() -> Iterator[None]:
    """We and the router come before others, as the capped workers do."""
    group = GROUPS / f"fidelity-{secrets.token_hex(3)}"
    group.mkdir()
    try:
        (group / "cpu.shares").write_text(FIRST)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (GROUPS / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


# ── the real run ────────────────────────────────────────────────────────────────────────────────


async def _run(arm: str, rate: float, options: argparse.Namespace, number: int) -> Run:
    run = Run(arm, rate)
    rng = np.random.default_rng(options.seed + number)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{at}.jsonl" for at in range(len(ARMS[arm]))]
        async with _cluster(ARMS[arm], files, options) as url:
            await _send(run, url, options, rng)
        run.steps = [_read(file) for file in files]
    return run


async def _send(run: Run, url: str, options: argparse.Namespace, rng: np.random.Generator) -> None:
    timeout = aiohttp.ClientTimeout(sock_read=SILENCE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await _one(session, url, options.model, [7] * 64, 4)  # warm
        begin = time.perf_counter()
        due = np.cumsum(rng.exponential(1 / run.rate, options.requests))
        tasks = []
        for moment in due.tolist():
            prompt = rng.integers(*VOCAB, int(rng.integers(*PROMPTS))).tolist()
            tokens = int(rng.integers(*ANSWERS))
            await asyncio.sleep(max(0.0, begin + moment - time.perf_counter()))
            run.requests.append(Arrival(time.perf_counter() - begin, len(prompt), tokens))
            tasks.append(asyncio.create_task(_one(session, url, options.model, prompt, tokens)))
        for first, last in await asyncio.gather(*tasks):
            run.first.append(first - begin)
            run.last.append(last - begin)


async def _one(
    session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], tokens: int
) -> tuple[float, float]:
    """When its first and its last piece came."""
    times = [time async for time in pieces(session, url, model, prompt, tokens)]
    return times[0], times[-1]


@contextlib.asynccontextmanager
async def _cluster(
    roles: tuple[Role, ...], files: list[Path], options: argparse.Namespace
) -> AsyncIterator[str]:
    """A router and its workers, while the block lasts."""
    port, tag = _free_port(), secrets.token_hex(3)
    os.environ["MOTLEY_SECRET"] = secrets.token_hex(32)
    none = ("--prefill", "0", "--decode", "0", "--port", "0", "--cluster", f"127.0.0.1:{port}")
    names = [f"fidelity-{tag}-{at}" for at in range(len(roles))]
    processes: list[asyncio.subprocess.Process] = []
    try:
        router = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "motley", "serve", *none), stdout=asyncio.subprocess.PIPE
        )
        processes.append(router)
        url = await asyncio.wait_for(_ready(router), READY_S)
        for role, name, file in zip(roles, names, files, strict=True):
            words = [options.model, role, name, f"127.0.0.1:{port}", str(file)]
            words += [str(options.cap)] if options.cap else []
            script = str(Path(__file__).with_name("fidelity_worker.py"))
            processes.append(await asyncio.create_subprocess_exec(sys.executable, script, *words))
        async with asyncio.timeout(READY_S), aiohttp.ClientSession() as session:
            while not await _joined(session, url, len(roles)):  # noqa: ASYNC110  # another process
                await asyncio.sleep(0.5)
        yield url
    finally:
        for process in reversed(processes):
            await _stop(process)
        for name in names:
            with contextlib.suppress(OSError):
                (GROUPS / name).rmdir()


async def _ready(router: asyncio.subprocess.Process) -> str:
    assert router.stdout, "started with a pipe"
    async for line in router.stdout:
        if found := re.search(rb"(http://\S+)", line):
            return found.group(1).decode()
    raise RuntimeError("motley serve ended before it was ready")


async def _joined(session: aiohttp.ClientSession, url: str, count: int) -> bool:
    async with session.get(f"{url}/metrics") as reply:
        text = await reply.text()
    return len(set(re.findall(r'worker="([^"]+)"', text))) == count


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


# ── the simulated one ───────────────────────────────────────────────────────────────────────────


def _read(file: Path) -> list[tuple[StepShape, float]]:
    """Steps with their seconds: until the next one where that followed at once."""
    steps = []
    for line in file.read_text(encoding="utf-8").splitlines():
        *shape, begun, ended, following = json.loads(line)
        followed = following is not None and following - ended < AT_ONCE_S
        steps.append((StepShape(*shape), (following if followed else ended) - begun))
    return steps[5:]  # the first ones are the measuring and the warm-up


def _other(run: Run, runs: list[Run]) -> Run:
    return next((each for each in runs if each.arm == run.arm and each is not run), run)


def _compare(
    run: Run, other: Run, profile: WorkerProfile | None, limits: tuple[float, float]
) -> list[dict[str, Any]]:
    sources = {
        source: [_cost(steps, every) for steps in fitted.steps]
        for source, fitted in (("other run", other), ("this run", run))
        for every in [[step for steps in fitted.steps for step in steps]]
    }
    if profile:
        line = msgspec.structs.replace(profile.cost, link_bytes_s=LINK_BYTES_S)
        sources["profile"] = [line] * len(run.steps)
    return [_row(run, source, costs, limits) for source, costs in sources.items()]


def _cost(steps: list[tuple[StepShape, float]], every: list[tuple[StepShape, float]]) -> CostModel:
    return fit(steps or every, kv_token_bytes=KV_TOKEN_BYTES, link_bytes_s=LINK_BYTES_S)


def _row(
    run: Run, source: str, costs: list[CostModel], limits: tuple[float, float]
) -> dict[str, Any]:
    workers = [
        WorkerSpec(f"w{at}", role, cost, KV_TOKENS)
        for at, (role, cost) in enumerate(zip(ARMS[run.arm], costs, strict=True))
    ]
    outcome = simulate(workers, run.requests)  # no limits, as they were sent
    real = float(np.mean((run.ttft <= limits[0]) & (run.tpot <= limits[1])))
    simulated = float(outcome.met(*limits).mean())
    row: dict[str, Any] = {"arm": run.arm, "rate": run.rate, "fitted to": source}
    for name, ours, theirs in (("TTFT", outcome.ttft, run.ttft), ("TPOT", outcome.tpot, run.tpot)):
        medians = 1e3 * float(np.median(theirs)), 1e3 * float(np.median(ours))
        row[f"{name} p50 real ms"], row[f"{name} simulated"] = medians
        row[f"{name} error %"] = 100 * (medians[1] / medians[0] - 1)
    row["attained real %"], row["attained simulated"] = 100 * real, 100 * simulated
    return row


if __name__ == "__main__":
    main()

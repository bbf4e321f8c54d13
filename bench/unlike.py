"""Workers that are not alike, for real: SmolLM2 under CPU caps of 50 %, 50 % and 16.5 % of a core.

Caps are those of control groups (v1's cpu controller, as root); where these cannot be set nothing
is measured and the exit code is 3. What is shown:

- learned: after 10 s of traffic, each worker's rates as the router believes them, against the
  caps: a worker with a third of the CPU should be a third as fast.
- goodput: requests per second within both limits, at the same offered requests, alternately
  under `priced` and `least-load`. Limits: TTFT five times a lone request's on a worker with
  half a core, TPOT three times. Nothing is guessed ahead, so that a token is a step.
- follows: one worker's cap is halved mid-run; its share of all tokens before and after.

    python -m bench.unlike
    python -m bench.unlike --seconds 20 --rounds 1 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ROOT = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 20_000
SHARES = 16_384  # 1,024 is usual
CAPS = {"half-0": 0.5, "half-1": 0.5, "sixth": 0.165}  # cores
MODEL = "smollm2"
NAME = "smollm2-135m-instruct"
OUTPUT = 24
WORDS = "the river runs past mills and bridges to the sea while people watch from the old wall "
READY_S, LOOK_S, LEARN_S = 120.0, 0.5, 10.0
SKIPPED = 3


@contextmanager
def group(name: str, cores: float | None) -> Iterator[Path]:
    """A control group with this CPU cap; removed at the end. Raises OSError where there is none.

    Its share is large, so that the cap decides and not what else the machine does.
    """
    path = ROOT / f"motley-unlike-{os.getpid()}-{name}"
    path.mkdir()
    try:
        (path / "cpu.shares").write_text(str(SHARES))
        (path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        if cores:
            cap(path, cores)
        yield path
    finally:
        path.rmdir()


def cap(path: Path, cores: float) -> None:
    (path / "cpu.cfs_quota_us").write_text(str(int(cores * PERIOD_US)))


@dataclass
class Cluster:
    url: str
    groups: dict[str, Path]

    async def metric(self, session: aiohttp.ClientSession, name: str) -> dict[str, float]:
        """By worker."""
        async with session.get(f"{self.url}/metrics") as reply:
            text = await reply.text()
        found = re.findall(rf'^{name}{{.*worker="([^"]+)".*}} (\S+)$', text, re.MULTILINE)
        return {worker: float(value) for worker, value in found}

    async def complete(self, session: aiohttp.ClientSession) -> None:
        """Wait for the router, and then for every worker to join it."""
        for _ in range(int(READY_S / LOOK_S)):
            with suppress(aiohttp.ClientError):
                if len(await self.metric(session, "motley_worker_kv_blocks")) == len(CAPS):
                    return
            await asyncio.sleep(LOOK_S)


@asynccontextmanager
async def cluster(policy: str) -> AsyncIterator[Cluster]:
    """A router, and the three capped workers; everything ends with the context."""
    with ExitStack() as stack:
        groups = {name: stack.enter_context(group(name, cores)) for name, cores in CAPS.items()}
        http, join = _free_port(), f"127.0.0.1:{_free_port()}"
        shape = ("--prefill", "0", "--decode", "0", "--port", str(http), "--cluster", join)
        router = stack.enter_context(group("router", None))
        stack.enter_context(_process(("serve", MODEL, *shape, "--policy", policy), inside=router))
        for name, path in groups.items():
            role = ("--role", "mixed", "--name", name, "--join", join)
            engine = ("--threads", "1", "--kv-tokens", "8192", "--no-speculation")
            worker = ("worker", MODEL, *role, *engine)
            stack.enter_context(_process(worker, inside=path))
        it = Cluster(f"http://127.0.0.1:{http}", groups)
        async with aiohttp.ClientSession() as session, asyncio.timeout(READY_S):
            await it.complete(session)
        yield it


@contextmanager
def _process(words: tuple[str, ...], inside: Path) -> Iterator[None]:
    """`motley WORDS`, from its first instruction in the control group."""
    enter = f'echo $$ > {inside}/cgroup.procs && exec "$@"'
    command = ["sh", "-c", enter, "sh", sys.executable, "-m", "motley", *words]
    environment = os.environ | {"MOTLEY_SECRET": "of this bench"}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# ── load ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Answer:
    """Seconds; nan where it was refused."""

    ttft: float = float("nan")
    tpot: float = float("nan")


@dataclass
class Drive:
    """Requests at a rate, with prompts of 10 to 300 words that begin unlike each other."""

    it: Cluster
    session: aiohttp.ClientSession
    headers: dict[str, str]

    async def one(self, words: int, number: int) -> Answer:
        """From its scheduled time to its last token."""
        prompt = " ".join([f"{number:06d}", *(WORDS * (words // 17 + 1)).split()[:words]])
        body = {"model": NAME, "prompt": prompt, "max_tokens": OUTPUT, "stream": True}
        body |= {"ignore_eos": True, "temperature": 0}
        begun = time.perf_counter()
        url = f"{self.it.url}/v1/completions"
        async with self.session.post(url, json=body, headers=self.headers) as reply:
            if reply.status != 200:
                return Answer()
            lines = reply.content
            times = [time.perf_counter() async for line in lines if line.startswith(b"data: {")]
        return Answer(times[0] - begun, (times[-1] - times[0]) / (OUTPUT - 1))

    async def load(self, rate: float, seconds: float, seed: int) -> list[Answer]:
        """The same requests at the same times for the same seed."""
        rng = np.random.default_rng(seed)
        at = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
        words = np.minimum(rng.geometric(1 / 80, len(at)) + 10, 300)
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            running = []
            for number, (when, size) in enumerate(zip(at.tolist(), words.tolist(), strict=True)):
                await asyncio.sleep(max(0.0, start + when - time.perf_counter()))
                running.append(tasks.create_task(self.one(size, seed * 10_000 + number)))
        return [task.result() for task in running]


@asynccontextmanager
async def driving(policy: str, headers: dict[str, str]) -> AsyncIterator[Drive]:
    limit = aiohttp.TCPConnector(limit=0)
    async with cluster(policy) as it, aiohttp.ClientSession(connector=limit) as session:
        yield Drive(it, session, headers)


# ── what is shown ───────────────────────────────────────────────────────────────────────────────


async def learned(drive: Drive) -> dict[str, Any]:
    """Each worker's rates against the first one's, and what the caps say they should be."""
    found = {}
    for name in ("motley_worker_prefill_tokens_per_second", "motley_worker_decode_step_seconds"):
        rates = await drive.it.metric(drive.session, name)
        best = rates["half-0"]
        found[name] = {
            worker: {
                "believed": value,
                "share": value / best if "tokens" in name else best / value,
                "cap": CAPS[worker] / CAPS["half-0"],
            }
            for worker, value in rates.items()
        }
    return found


async def shares(drive: Drive, seconds: float) -> dict[str, float]:
    """Of all tokens in the next so many seconds."""
    name = "motley_worker_tokens_total"
    before = await drive.it.metric(drive.session, name)
    await asyncio.sleep(seconds)
    after = await drive.it.metric(drive.session, name)
    given = {worker: after[worker] - before[worker] for worker in after}
    return {worker: count / max(1.0, sum(given.values())) for worker, count in given.items()}


async def measure(seconds: float, rounds: int, busy: float) -> dict[str, Any]:
    answer: dict[str, Any] = {"goodput": {"priced": [], "least-load": []}}
    async with driving("priced", {}) as drive:
        alone = [await drive.one(80, number) for number in range(5)]
        ttft = 5 * float(np.median([each.ttft for each in alone]))
        tpot = 3 * float(np.median([each.tpot for each in alone]))
        took = float(np.median([each.ttft + each.tpot * OUTPUT for each in alone]))
        rate = busy * sum(CAPS.values()) / CAPS["half-0"] / took
        answer |= {"ttft_ms": 1e3 * ttft, "tpot_ms": 1e3 * tpot, "rate": rate}
        headers = {"x-slo-ttft-ms": f"{1e3 * ttft:.1f}", "x-slo-tpot-ms": f"{1e3 * tpot:.1f}"}
        drive.headers = headers
        await drive.load(rate, LEARN_S, seed=99)
        answer["learned"] = await learned(drive)
        answer["follows"] = await follows(drive, rate)
    for number in range(rounds):
        for policy in ("priced", "least-load"):
            async with driving(policy, headers) as drive:
                await drive.load(rate, LEARN_S, seed=98)
                answers = await drive.load(rate, seconds, seed=number)
            good = [each for each in answers if each.ttft <= ttft and each.tpot <= tpot]
            answer["goodput"][policy].append(len(good) / seconds)
    return answer


async def follows(drive: Drive, rate: float) -> dict[str, Any]:
    """Shares before one worker's cap is halved, and from 5 s to 15 s after."""
    traffic = asyncio.create_task(drive.load(rate, 3.5 * LEARN_S, seed=97))
    await asyncio.sleep(0.5 * LEARN_S)
    before = await shares(drive, LEARN_S)
    cap(drive.it.groups["half-1"], CAPS["half-1"] / 2)
    await asyncio.sleep(0.5 * LEARN_S)
    after = await shares(drive, LEARN_S)
    await traffic
    return {"halved": "half-1", "before": before, "after": after, "learned": await learned(drive)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="of a run (default 40)")
    parser.add_argument("--rounds", type=int, default=2, help="of each policy (default 2)")
    parser.add_argument(
        "--busy", type=float, default=1.0, help="of what the workers do one by one (default 1)"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        with group("probe", 0.5):
            pass
    except OSError as error:
        print(f"skipped: CPU caps cannot be set here ({error})", file=sys.stderr)
        sys.exit(SKIPPED)
    answer = asyncio.run(measure(options.seconds, options.rounds, options.busy))
    if options.json:
        print(json.dumps(answer, indent=1))
    else:
        _print(answer)


def _print(answer: dict[str, Any]) -> None:
    print(f"{answer['rate']:.2f} requests/s", end="; ")
    print(f"TTFT ≤ {answer['ttft_ms']:.0f} ms, TPOT ≤ {answer['tpot_ms']:.0f} ms")
    for title, rates in (("learned", answer["learned"]), ("halved", answer["follows"]["learned"])):
        for name, workers in rates.items():
            for worker, row in workers.items():
                print(f"{title:8}{name:42}{worker:8}", end="")
                print(f"{row['believed']:9.4g}  share {row['share']:.2f}, cap {row['cap']:.2f}")
    for when in ("before", "after"):
        told = ", ".join(f"{w} {share:.0%}" for w, share in answer["follows"][when].items())
        print(f"share of tokens {when} half-1 is halved: {told}")
    means = {policy: sum(runs) / len(runs) for policy, runs in answer["goodput"].items()}
    for policy, runs in answer["goodput"].items():
        told = ", ".join(f"{run:.2f}" for run in runs)
        print(f"goodput {policy:12} {means[policy]:.2f} requests/s in time ({told})")
    print(f"priced is {means['priced'] / max(means['least-load'], 1e-9):.2f} × least-load")


if __name__ == "__main__":
    main()

"""Workers under CPU caps behind a live router, and a client that measures.

Caps are those of control groups (v1's cpu controller, as root), in periods of 10 ms: shorter than
most steps, so that a capped worker is like a slow core and not like a fast one that pauses. Their
shares are large, so that the cap decides and not what else the machine does, and each stays on one
core: the kernel gives quota away per core, and could leave a thread without any for many periods.
The processes run at the usual priority also where the bench itself has real time: caps hold for
nothing else.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

GROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 10_000
SHARES = 16_384  # 1,024 is usual
MODEL = "smollm2"
NAME = "smollm2-135m-instruct"
IDS = range(1000, 40_000)  # plain words' tokens
READY_S, EMPTY_S, LOOK_S = 120.0, 10.0, 0.25
SHARE = 0.9  # of the requests, in time: what goodput is about


@dataclass(frozen=True)
class Box:
    """A worker, and the CPU that it gets."""

    name: str
    cores: float
    role: str = "mixed"
    options: tuple[str, ...] = ()
    place: tuple[str, ...] = ()  # words before its command: another host


def can_cap() -> bool:
    """Whether this machine lets us; says so on standard error if not.

    From here on SIGTERM is like Ctrl-C: what was started ends, and its groups are removed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with group("probe", 0.5):
            return True
    except OSError as error:
        print(f"skipped: CPU caps cannot be set here ({error})", file=sys.stderr)
        return False


@contextmanager
def group(name: str, cores: float | None) -> Iterator[Path]:
    """A control group with this cap; removed at the end. Raises OSError where there is none."""
    path = GROUPS / f"motley-bench-{os.getpid()}-{name}"
    path.mkdir()
    try:
        (path / "cpu.shares").write_text(str(SHARES))
        (path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        if cores:
            cap(path, cores)
        yield path
    finally:
        for _ in range(int(EMPTY_S / LOOK_S)):
            with suppress(OSError):  # what was killed may take a moment to be gone
                path.rmdir()
                break
            time.sleep(LOOK_S)


def cap(path: Path, cores: float) -> None:
    (path / "cpu.cfs_quota_us").write_text(str(int(cores * PERIOD_US)))


@dataclass
class Answer:
    """When its tokens came, in seconds since it was to be sent. None: it was refused."""

    times: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.times[0] if self.times else float("nan")

    @property
    def tpot(self) -> float:
        if len(self.times) < 2:
            return float("nan") if not self.times else 0.0
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)

    @property
    def gaps(self) -> list[float]:
        return np.diff(self.times).tolist()

    def met(self, ttft: float, tpot: float) -> bool:
        return self.ttft <= ttft and self.tpot <= tpot  # nan is neither


@dataclass(frozen=True)
class Request:
    at: float  # seconds after the first
    prompt: int  # tokens
    output: int


@dataclass
class Cluster:
    url: str
    groups: dict[str, Path]
    session: aiohttp.ClientSession
    headers: dict[str, str] = field(default_factory=dict)

    async def metric(self, name: str, label: str = "worker") -> dict[str, float]:
        """Its values by a label."""
        async with self.session.get(f"{self.url}/metrics") as reply:
            text = await reply.text()
        found = re.findall(rf'^{name}{{.*?{label}="([^"]+)".*}} (\S+)$', text, re.MULTILINE)
        return {key: float(value) for key, value in found}

    async def ready(self) -> None:
        """Wait for the router, and then for every worker to join it."""
        async with asyncio.timeout(READY_S):
            while True:
                with suppress(aiohttp.ClientError):
                    if len(await self.metric("motley_worker_kv_blocks")) == len(self.groups):
                        return
                await asyncio.sleep(LOOK_S)

    async def ask(self, prompt: list[int], output: int, due: float | None = None) -> Answer:
        """The times of its tokens, from when it was due on `perf_counter`, else from now."""
        body = {"model": NAME, "prompt": prompt, "max_tokens": output, "stream": True}
        body |= {"ignore_eos": True, "temperature": 0}
        begun = time.perf_counter() if due is None else due
        url = f"{self.url}/v1/completions"
        async with self.session.post(url, json=body, headers=self.headers) as reply:
            if reply.status != 200:
                return Answer()
            lines = reply.content
            times = [time.perf_counter() async for line in lines if line.startswith(b"data: {")]
        return Answer([when - begun for when in times[:output]])

    async def load(self, requests: Sequence[Request], seed: int) -> list[Answer]:
        """All of them at their times; prompts have nothing in common."""
        rng = np.random.default_rng(seed)
        start = time.perf_counter() + 0.1
        async with asyncio.TaskGroup() as tasks:
            running = []
            for request in requests:
                prompt = rng.integers(IDS.start, IDS.stop, request.prompt).tolist()
                due = start + request.at
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                running.append(tasks.create_task(self.ask(prompt, request.output, due)))
        return [task.result() for task in running]

    async def alone(self, prompt: int, output: int, times: int = 5) -> tuple[float, float]:
        """Seconds to the first token and between two, of requests one by one; medians."""
        rng = np.random.default_rng()  # nothing of these is in a cache
        answers = []
        for _ in range(times + 1):  # the first one warms up
            ids = rng.integers(IDS.start, IDS.stop, prompt).tolist()
            answers.append(await self.ask(ids, output))
        found = [(answer.ttft, answer.tpot) for answer in answers[1:]]
        ttft, tpot = np.median(found, axis=0).tolist()
        return ttft, tpot


@asynccontextmanager
async def cluster(
    boxes: Sequence[Box], *options: str, host: str = "127.0.0.1"
) -> AsyncIterator[Cluster]:
    """A router with these options, and the workers; everything ends with the context."""
    with ExitStack() as stack:
        groups = {box.name: stack.enter_context(group(box.name, box.cores)) for box in boxes}
        http, join = free_port(), f"{host}:{free_port()}"
        shape = ("--prefill", "0", "--decode", "0", "--port", str(http), "--cluster", join)
        router = stack.enter_context(group("router", None))
        stack.enter_context(_process(("serve", MODEL, *shape, *options), inside=router))
        cores = sorted(os.sched_getaffinity(0))
        for number, box in enumerate(boxes):
            place = ("taskset", "--cpu-list", str(cores[number % len(cores)]), *box.place)
            words = ("--role", box.role, "--name", box.name, "--join", join, *box.options)
            engine = ("--threads", "1", "--kv-tokens", "16384", "--no-speculation")
            worker = ("worker", MODEL, *words, *engine)
            stack.enter_context(_process(worker, inside=groups[box.name], place=place))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            it = Cluster(f"http://127.0.0.1:{http}", groups, session)
            await it.ready()
            yield it


@contextmanager
def _process(words: tuple[str, ...], inside: Path, place: tuple[str, ...] = ()) -> Iterator[None]:
    """`motley WORDS`, from its first instruction in the control group."""
    enter = f'echo $$ > {inside}/cgroup.procs && exec "$@"'
    command = ["chrt", "--other", "0", "sh", "-c", enter, "sh", *place]
    environment: dict[str, Any] = os.environ | {"MOTLEY_SECRET": "of this bench"}
    process = subprocess.Popen(
        [*command, sys.executable, "-m", "motley", *words],
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def poisson(rate: float, seconds: float, seed: int, prompt: int, output: int) -> list[Request]:
    """Requests with prompts of 16 tokens to three times `prompt`, geometric; one size of output."""
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
    sizes = np.minimum(rng.geometric(1 / (0.75 * prompt), len(at)) + 16, 3 * prompt)
    return [Request(*each, output) for each in zip(at.tolist(), sizes.tolist(), strict=True)]


def highest(rows: list[dict[str, float]]) -> float:
    """The rate at which 90 % are in time, between the last that holds and the next."""
    held, before = 0.0, 1.0
    for row in rows:
        if row["share"] < SHARE:
            part = (before - SHARE) / (before - row["share"])
            return held + part * (row["rate"] - held)
        held, before = row["rate"], row["share"]
    return held


def told(rows: list[dict[str, float]]) -> str:
    return ", ".join(f"{row['share']:.0%} of {row['rate']:.1f}/s" for row in rows)

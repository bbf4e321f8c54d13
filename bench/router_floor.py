"""How long requests take without a router: the least that one over the framed link could add to.

    python bench/router_floor.py '{"model": "m=fake:step_ms=1", "workers": 2, "rate": 200, …}'

Workers join this process, which sends each its jobs in turn, and does nothing else with what comes
back than look at the clock. Prints one line of JSON: latencies in seconds, sorted.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import msgspec
import uvloop

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from scheduler.messages import Outputs, Submit, Wire  # noqa: E402 - found by the path above
from scheduler.request import Job, Limits, Prompt, Sampling, job_id  # noqa: E402
from scheduler.transport import listen  # noqa: E402
from serving.members import Members  # noqa: E402

SECRET = "of the router bench"
WAIT_S = 60.0


class Floor(msgspec.Struct, frozen=True):
    """What to ask for, in an open loop."""

    model: str
    workers: int
    rate: float  # requests a second
    requests: int
    prompt_bytes: int
    tokens: int


class Asker:
    """Sends jobs and waits for their last tokens."""

    def __init__(self, floor: Floor) -> None:
        self.members = Members()
        self.members.on_message = self._on_message
        self._floor = floor
        self._ends: dict[str, asyncio.Future[float]] = {}

    def _on_message(self, _: str, message: Wire) -> None:
        if isinstance(message, Outputs):
            for output in message.items:
                if output.finish and (end := self._ends.get(output.id)):
                    end.set_result(time.perf_counter())

    async def ask(self, number: int, at: float) -> float:
        """One request's latency; it begins at `at`."""
        floor = self._floor
        job = Job(
            id=job_id(self.members.router, number, "floor"),
            epoch=1,
            model="m",
            prompt=Prompt(text=f"{number} " + "x" * floor.prompt_bytes),
            sampling=Sampling(seed=1, temperature=0.0),
            limits=Limits(floor.tokens, (), ignore_eos=True),
            created=0.0,
            whole=True,
        )
        self._ends[job.id] = asyncio.get_running_loop().create_future()
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        begun = time.perf_counter()
        self.members.post(f"w{number % floor.workers}", Submit(job))
        async with asyncio.timeout(WAIT_S):
            return await self._ends[job.id] - begun


async def start_worker(model: str, router: str, name: str) -> asyncio.subprocess.Process:
    command = (sys.executable, "motley.py", "worker", model, "--join", router, "--name", name)
    return await asyncio.create_subprocess_exec(
        *(*command, "--role", "mixed", "--kv-tokens", "4000000"),
        cwd=ROOT,
        env={**os.environ, "MOTLEY_SECRET": SECRET},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )


async def main(floor: Floor) -> list[float]:
    asker = Asker(floor)
    names = [f"w{number}" for number in range(floor.workers)]
    started: list[asyncio.subprocess.Process] = []
    async with listen("127.0.0.1", 0, SECRET.encode(), asker.members.serve) as (host, port):
        try:
            router = f"{host}:{port}"
            started.extend([await start_worker(floor.model, router, name) for name in names])
            async with asyncio.timeout(WAIT_S):
                for name in names:
                    await asker.members.joined(name)
            start = time.perf_counter() + 0.1
            asks = [asker.ask(n, start + n / floor.rate) for n in range(floor.requests)]
            return sorted(await asyncio.gather(*asks))
        finally:
            for process in started:
                process.terminate()
            for process in started:
                await process.wait()


if __name__ == "__main__":
    spec = msgspec.json.decode(sys.argv[1], type=Floor)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(msgspec.json.encode(runner.run(main(spec))).decode())

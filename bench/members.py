"""What workers that only live cost a router: CPU time and memory of their membership.

Real members over loopback, each with a heartbeat every quarter of a second; they live in another
process, so that only the router's side is counted.

    python -m bench.members --workers 250 1000 --seconds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import time
from typing import TYPE_CHECKING, Any

import uvloop

from scheduler.cost import CostModel
from scheduler.messages import Address, Join, Joined, Load, Rates, Role
from scheduler.transport import dial, listen
from serving.members import Members

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

SECRET = b"of this bench"
COST = CostModel(0.02, 2e-4, 2e-8, 2e-4, 1.5e-7, "measured")
AT_ONCE = 20  # that join together


async def live(port: int, count: int, over: Event) -> None:
    """So many workers, until it is over."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with turns:
            connection = await dial("127.0.0.1", port, SECRET, timeout=60)
            await connection.send(
                Join(
                    name=f"w{number}",
                    model="m",
                    role=Role.MIXED,
                    address=Address("127.0.0.1", 1),
                    fingerprint="f",
                    context_length=4096,
                    kv_blocks=1000,
                    rates=Rates(3000.0, 0.02),
                    pid=number,
                )
            )
            beat = (await connection.expect(Joined)).heartbeat_s
        steps = 0
        while not over.is_set():
            steps += 1
            await connection.send(Load(8, 0, 500, steps, 8 * steps, 0, 0, 0, 0, 0, cost=COST))
            await asyncio.sleep(beat)
        connection.close()

    await asyncio.gather(*(one(number) for number in range(count)))


def child(port: int, count: int, over: Event) -> None:
    uvloop.run(live(port, count, over))


async def arm(count: int, seconds: float) -> dict[str, Any]:
    members = Members()
    context = multiprocessing.get_context("spawn")
    over = context.Event()
    async with listen("127.0.0.1", 0, SECRET, members.serve) as (_, port):
        others = context.Process(target=child, args=(port, count, over))
        memory, begun = _memory(), time.process_time()
        others.start()
        try:
            async with asyncio.timeout(300):
                while len(members.of()) < count:
                    await members.changed()
            joined, wall = time.process_time() - begun, time.monotonic()
            begun = time.process_time()
            await asyncio.sleep(seconds)
            spent = (time.process_time() - begun) / (time.monotonic() - wall)
            memory, lost = _memory() - memory, members.lost
        finally:
            over.set()
            await asyncio.to_thread(others.join, 60)
    return {
        "workers": count,
        "cores": round(spent, 4),
        "us_a_worker_second": round(1e6 * spent / count, 1),
        "joining_ms_a_worker": round(1e3 * joined / count, 2),
        "memory_kb_a_worker": round(memory / count, 1),
        "lost": lost,
    }


def _memory() -> float:
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="*", default=[250, 1000, 2000])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [uvloop.run(arm(count, options.seconds)) for count in options.workers]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()

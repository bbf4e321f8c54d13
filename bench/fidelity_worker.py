"""A worker whose steps are written down, for bench/fidelity.py; otherwise that of `motley worker`.

Started as its own process: MODEL ROLE NAME HOST:PORT FILE [CAP], with the cluster secret in the
environment. FILE gets, at the end, one JSON list per step: prompt tokens, their contexts' sum,
decodes, theirs, when it began, when it ended, and when the next one began (seconds).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from scheduler.messages import Address, Role
from workers.build import EngineOptions, build, find
from workers.recording import RecordingEngine
from workers.run import run_worker
from workers.service import WorkerConfig, WorkerService

PERIOD_US = 10_000  # of the cap: short, so that a capped step is slower rather than interrupted


def main() -> None:
    text, role, name, join, file, *cap = sys.argv[1:]
    if cap:
        _cap(name, float(cap[0]))
    host, _, port = join.rpartition(":")
    model = find(text)
    options = EngineOptions(kv_tokens=16384, threads=1, speculate=False)
    made, rates = build(model, options)
    engine = RecordingEngine(made)
    config = WorkerConfig(
        name=name,
        model=model.name,
        role=Role(role),
        routers=(Address(host, int(port)),),
        secret=os.environ["MOTLEY_SECRET"].encode(),
        listen_host="127.0.0.1",
        advertise_host="127.0.0.1",
    )
    asyncio.run(_serve(WorkerService(config, engine, rates)))
    steps = engine.recorded
    with Path(file).open("w", encoding="utf-8") as lines:
        for (shape, begun, ended), after in zip(steps, [*steps[1:], None], strict=True):
            following = after[1] if after else None
            lines.write(json.dumps([*shape, begun, ended, following]) + "\n")


async def _serve(service: WorkerService) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await run_worker(service, stop, child=False)


def _cap(name: str, share: float) -> None:
    """At most this share of one core (cgroup v1); the group is removed by whoever started us."""
    group = Path("/sys/fs/cgroup/cpu") / name
    group.mkdir()
    (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
    (group / "cpu.cfs_quota_us").write_text(str(int(share * PERIOD_US)))
    (group / "cpu.shares").write_text("20480")  # before others: the cap says how fast it is
    (group / "cgroup.procs").write_text(str(os.getpid()))


if __name__ == "__main__":
    main()

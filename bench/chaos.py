"""Hurt a running cluster and count what its clients notice.

    python bench/chaos.py                      # the long form: about 20 minutes
    python bench/chaos.py --only kills --kills 40 --json

kills        fake workers killed: a quarter during prefill, half during decode, a quarter while a KV
             cache is on its way
model-kills  the same with SmolLM2 in exact mode, where every text must be the unbroken run's
stops        fake workers stopped (SIGSTOP) and woken again
leases       prefill workers killed while a decode worker keeps room for their prompt: the time
             until it is free again, as heartbeats tell (every 0.25 s)
disconnects  clients that leave at random moments; what is left of their requests is counted
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from chaos_cluster import Cluster, cluster, held, until
from chaos_disconnects import disconnects
from chaos_streams import Answer, Crowd, Toll, questions, toll

from scheduler.messages import Role
from scheduler.suspicion import LOOK_S

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from chaos_cluster import Blow
    from chaos_history import History

RESTART_S = 0.3  # from a worker's death to its next life
STEP_MS, PREFILL_TPS = 5, 8000  # of a fake worker
LONG_TPS = 500  # of one whose prompts take seconds
FAKE = f"fake:step_ms={STEP_MS},prefill_tps={PREFILL_TPS}"
SMOLLM2 = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Scene:
    """What is hurt, how often, and what its clients ask."""

    model: str
    name: str  # as clients write it
    shape: dict[Role, int]
    clients: int
    questions: list[str]
    tokens: int
    arguments: tuple[str, ...] = ()


def fake(clients: int = 8) -> Scene:
    shape = {Role.PREFILL: 2, Role.DECODE: 3}
    return Scene(FAKE, "fake", shape, clients, questions(40, 80), 80)


def smollm2() -> Scene:
    shape = {Role.PREFILL: 1, Role.DECODE: 2}
    arguments = ("--mode", "exact", "--threads", "1", "--kv-tokens", "4096")
    return Scene(SMOLLM2, SMOLLM2, shape, 1, questions(6, 40), 48, arguments)


def kinds(count: int, chance: random.Random) -> list[str]:
    """A quarter during prefill, half during decode, a quarter during a transfer, in any order."""
    listed = ["prefill", "decode", "transfer", "decode"] * (count // 4 + 1)
    chosen = listed[:count]
    chance.shuffle(chosen)
    return chosen


async def hurt(
    scene: Scene,
    count: int,
    chance: random.Random,
    strike: Callable[[Cluster, str, random.Random], Coroutine[None, None, Blow]],
) -> tuple[Toll, list[Blow], list[Answer], dict[str, float]]:
    """Strike so many times while clients ask; the toll, and the rates that workers told."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "workers.log"
        async with cluster(scene.model, scene.shape, log, *scene.arguments) as it:
            crowd = Crowd(it.url, scene.name, scene.questions, scene.tokens)
            unbroken = await crowd.unbroken()
            asking = asyncio.create_task(crowd.run(scene.clients))
            blows = [await strike(it, kind, chance) for kind in kinds(count, chance)]
            crowd.stop()
            await asking
            rates = {m.join.name: m.join.rates.prefill_tokens_per_s for m in it.members.of()}
        result = toll(crowd.answers, unbroken, blows)
        for answer in result.unlike:
            explain(answer, unbroken[answer.question], it.history, log)
    return result, blows, crowd.answers, rates


def explain(answer: Answer, unbroken: Answer, history: History, log: Path) -> None:
    """All that is known of an answer which is not the unbroken one."""
    words = [line for line in log.read_text(errors="replace").splitlines() if answer.name in line]
    lines = [
        f"request {answer.name}: {answer.tokens} tokens {answer.error}",
        f"is        {answer.text!r}",
        f"should be {unbroken.text!r}",
        *history.of(answer.name),
        *words,
    ]
    print(*lines, sep="\n    ", file=sys.stderr)


async def kill(it: Cluster, kind: str, chance: random.Random) -> Blow:
    blow = await it.strike(kind, signal.SIGKILL, chance)
    await asyncio.sleep(RESTART_S)
    await it.revive(blow.worker)
    return blow


async def stop(it: Cluster, kind: str, chance: random.Random) -> Blow:
    """Stop a worker until it is taken for lost, wake it, and wait until it is back."""
    blow = await it.strike(kind, signal.SIGSTOP, chance)
    stopped = it.members.get(blow.worker)
    assert stopped
    try:
        await until(lambda: it.members.get(blow.worker) is not stopped)
        await asyncio.sleep(chance.uniform(0, 0.5))
    finally:
        os.kill(stopped.join.pid, signal.SIGCONT)
    await it.members.joined(blow.worker)
    return blow


def summary(result: Toll, count: int, bound: float) -> dict[str, object]:
    return {
        "blows": count,
        "requests": result.requests,
        "requests hit": result.hit,
        "lost": result.lost,
        "errors": result.errors,
        "wrong text": result.wrong,
        "missing or repeated tokens": result.miscounted,
        "extra gap p50 s": round(result.gap(0.5), 3),
        "extra gap p99 s": round(result.gap(0.99), 3),
        "extra gap max s": round(result.gap(1.0), 3),
        "bound s": round(bound, 3),
        "holds": result.clean and result.gap(0.99) <= bound,
    }


async def run_kills(count: int, seed: int) -> dict[str, object]:
    result, *_ = await hurt(fake(), count, random.Random(seed), kill)
    return summary(result, count, 2.0)


async def run_model_kills(count: int, seed: int) -> dict[str, object]:
    """1 s, and the prefill of prompt and emitted tokens at the measured rate, and 1 s."""
    scene = smollm2()
    result, _, answers, rates = await hurt(scene, count, random.Random(seed), kill)
    longest = max(answer.prompt_tokens for answer in answers) + scene.tokens
    bound = 2.0 + longest / min(rates.values())
    return summary(result, count, bound) | {"holds": result.clean and result.gap(1.0) <= bound}


async def run_stops(count: int, seed: int) -> dict[str, object]:
    """The deadline: the silence that the worker was allowed, and the replay's prefill."""
    scene = fake()
    result, blows, answers, _ = await hurt(scene, count, random.Random(seed), stop)
    longest = max(answer.prompt_tokens for answer in answers) + scene.tokens
    replay = 2 * LOOK_S + longest / PREFILL_TPS
    overdue = max((gap - blow.patience - replay for blow, gap in result.hits), default=0.0)
    report = summary(result, count, max(blow.patience for blow in blows) + replay + 1.0)
    return report | {"most overdue s": round(overdue, 3), "holds": result.clean and overdue <= 1.0}


async def run_leases(count: int, seed: int) -> dict[str, object]:
    """Another decode worker takes the request over, so what the first one kept must become free."""
    shape, chance = {Role.PREFILL: 1, Role.DECODE: 2}, random.Random(seed)
    times, answers = [], []
    with tempfile.TemporaryDirectory() as folder:
        async with cluster(f"fake:prefill_tps={LONG_TPS}", shape, Path(folder) / "log") as it:
            crowd = Crowd(it.url, "fake", questions(count, 80), 4)
            for number in range(count):
                await crowd.ask(number - 1)  # unharmed, or the worker would be spared
                asking = asyncio.create_task(crowd.ask(number))
                (lender,) = await until(it.lenders)
                blow = await it.strike("prefill", signal.SIGKILL, chance)
                await until(lambda lender=lender: not held(lender))
                times.append(asyncio.get_running_loop().time() - blow.time)
                answers.append(await asking)
                await it.revive(blow.worker)
                await until(lambda: not any(map(held, it.members.of())))
            result = toll(answers, await crowd.unbroken(), [])
    return {
        "blows": count,
        "lost": result.lost,
        "wrong text": result.wrong,
        "free again p50 s": round(median(times), 3),
        "free again max s": round(max(times), 3),
        "holds": result.clean and max(times) <= 1.0,
    }


SCENES = {
    "kills": run_kills,
    "model-kills": run_model_kills,
    "stops": run_stops,
    "leases": run_leases,
    "disconnects": disconnects,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SCENES, action="append", help="may be repeated")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--model-kills", type=int, default=30)
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--leases", type=int, default=20)
    parser.add_argument("--disconnects", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reports = {}
    for name in options.only or SCENES:
        count = getattr(options, name.replace("-", "_"))
        reports[name] = asyncio.run(SCENES[name](count, options.seed))
        if not options.json:
            print(name)
            for what, value in reports[name].items():
                print(f"    {what:30}{value}")
    if options.json:
        print(json.dumps(reports))
    return 0 if all(report["holds"] for report in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

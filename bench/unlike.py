"""Workers that are not alike, for real: SmolLM2 under CPU caps of 50 %, 50 % and 16.5 % of a core.

Where CPU caps cannot be set (see capped.py) nothing is measured and the exit code is 3. Shown are:

- learned: after 10 s of traffic, the time of a prompt and of a step on each worker as the router
  believes it, beside what a client of a worker that is alone under the same cap measures; once
  more, 10 s after one worker's cap was halved, the idle ones included.
- follows: that worker's share of all tokens before its cap is halved, and in each 5 s after.
- goodput: the highest rate of requests of which 90 % are in time, and the most requests in time
  per second at any rate, under `priced` and `least-load`; refused ones are late. Limits: five times
  the TTFT and three times the TPOT of a request that is alone on half a core.

Nothing is guessed ahead, so that a token is a step.

    python bench/unlike.py
    python bench/unlike.py --only goodput --seconds 10 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

from capped import Box, Cluster, can_cap, cap, cluster, highest, poisson, told

CAPS = {"half-0": 0.5, "half-1": 0.5, "sixth": 0.165}  # cores
BOXES = [Box(name, cores) for name, cores in CAPS.items()]
HALVED = "half-1"
PROMPT, OUTPUT = 128, 24
SLACK = 5.0, 3.0  # of the limits on TTFT and TPOT
LEARN_S, WINDOW_S, WINDOWS = 10.0, 5.0, 4
BUSY = (0.4, 0.6, 0.8, 1.0, 1.3)  # rates, by how many lone requests the caps have CPU for
POLICIES = ("priced", "least-load")
FIGURES = ("learned", "goodput")
SKIPPED = 3

Pair = tuple[float, float]  # seconds of a prompt, and of a step


async def lone() -> dict[float, Pair]:
    """What a client measures of one worker that is alone, by its cap."""
    found = {}
    async with cluster([Box("alone", 1.0)]) as it:
        for cores in (0.5, 0.25, 0.165):
            cap(it.groups["alone"], cores)
            found[cores] = await it.alone(PROMPT, OUTPUT)
    return found


async def believed(it: Cluster) -> dict[str, Pair]:
    """The same as the router believes it, by worker."""
    rates = await it.metric("motley_worker_prefill_tokens_per_second")
    steps = await it.metric("motley_worker_decode_step_seconds")
    return {worker: (PROMPT / rates[worker], steps[worker]) for worker in CAPS}


async def shares(it: Cluster, seconds: float) -> dict[str, float]:
    """Of all tokens in the next so many seconds."""
    name = "motley_worker_tokens_total"
    before = await it.metric(name)
    await asyncio.sleep(seconds)
    after = await it.metric(name)
    given = {worker: after[worker] - before[worker] for worker in after}
    return {worker: count / max(1.0, sum(given.values())) for worker, count in given.items()}


def beside(true: dict[float, Pair], now: dict[str, float], said: dict[str, Pair]) -> dict[str, Any]:
    """Believed over measured, by worker."""
    return {
        worker: {
            "prompt_ms": 1e3 * said[worker][0],
            "prompt": said[worker][0] / true[cores][0],
            "step_ms": 1e3 * said[worker][1],
            "step": said[worker][1] / true[cores][1],
        }
        for worker, cores in now.items()
    }


def per_second(true: dict[float, Pair]) -> float:
    """Lone requests that the caps have CPU for."""
    ttft, tpot = true[0.5]
    return sum(CAPS.values()) / 0.5 / (ttft + tpot * OUTPUT)


def limits(true: dict[float, Pair]) -> Pair:
    ttft, tpot = true[0.5]
    return SLACK[0] * ttft, SLACK[1] * tpot


def headers(true: dict[float, Pair]) -> dict[str, str]:
    ttft, tpot = limits(true)
    return {"x-slo-ttft-ms": f"{1e3 * ttft:.1f}", "x-slo-tpot-ms": f"{1e3 * tpot:.1f}"}


async def learned(true: dict[float, Pair], busy: float) -> dict[str, Any]:
    rate = busy * per_second(true)
    async with cluster(BOXES, "--policy", "priced") as it:
        it.headers = headers(true)
        await it.load(poisson(rate, LEARN_S, 99, PROMPT, OUTPUT), 99)
        answer: dict[str, Any] = {"learned": beside(true, CAPS, await believed(it))}
        seconds = (1 + WINDOWS) * WINDOW_S + 1
        traffic = asyncio.create_task(it.load(poisson(rate, seconds, 97, PROMPT, OUTPUT), 97))
        answer["before"] = await shares(it, WINDOW_S)
        cap(it.groups[HALVED], CAPS[HALVED] / 2)
        answer["after"] = [await shares(it, WINDOW_S) for _ in range(2)]
        halved = CAPS | {HALVED: CAPS[HALVED] / 2}
        answer["learned after"] = beside(true, halved, await believed(it))
        answer["after"] += [await shares(it, WINDOW_S) for _ in range(WINDOWS - 2)]
        await traffic
    return answer


async def goodput(true: dict[float, Pair], policy: str, seconds: float) -> list[dict[str, float]]:
    """Requests offered, in time, and the share of these, at one rate after another."""
    rows = []
    async with cluster(BOXES, "--policy", policy) as it:
        it.headers = headers(true)
        for number, busy in enumerate(BUSY):
            rate = busy * per_second(true)
            requests = poisson(rate, seconds, number, PROMPT, OUTPUT)
            answers = await it.load(requests, number)
            met = sum(answer.met(*limits(true)) for answer in answers)
            rows.append({"rate": rate, "in_time": met / seconds, "share": met / len(answers)})
    return rows


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    true = await lone()
    ttft, tpot = limits(true)
    answer: dict[str, Any] = {
        "alone": {f"{cores} cores": {"ttft": t, "tpot": p} for cores, (t, p) in true.items()},
        "limits": {"ttft": ttft, "tpot": tpot},
    }
    if "learned" in options.only:
        answer |= await learned(true, options.busy)
    if "goodput" in options.only:
        answer["rates"] = {p: await goodput(true, p, options.seconds) for p in POLICIES}
        answer["goodput"] = {policy: highest(rows) for policy, rows in answer["rates"].items()}
        answer["most"] = {
            policy: max(row["in_time"] for row in rows) for policy, rows in answer["rates"].items()
        }
    return answer


def show(answer: dict[str, Any]) -> None:
    for cores, row in answer["alone"].items():
        print(f"alone on {cores:11} TTFT {1e3 * row['ttft']:6.1f} ms, TPOT {1e3 * row['tpot']:.1f}")
    for title in ("learned", "learned after"):
        for worker, row in answer.get(title, {}).items():
            prompt = f"prompt {row['prompt_ms']:6.1f} ms ({row['prompt']:.2f} of measured)"
            step = f"step {row['step_ms']:5.1f} ms ({row['step']:.2f})"
            print(f"{title:14} {worker:7} {prompt}, {step}")
    if "before" in answer:
        for when, row in zip(
            ("before", *("after" for _ in answer["after"])),
            [answer["before"], *answer["after"]],
            strict=True,
        ):
            each = ", ".join(f"{worker} {share:.0%}" for worker, share in row.items())
            print(f"share of tokens, 5 s {when} {HALVED} is halved: {each}")
    for policy, rows in answer.get("rates", {}).items():
        print(f"{policy:10} in time: {told(rows)}")
        held, most = answer["goodput"][policy], answer["most"][policy]
        print(f"{policy:10} 90 % in time up to {held:.1f}/s; at most {most:.1f}/s in time")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=FIGURES, nargs="+", default=FIGURES)
    parser.add_argument("--seconds", type=float, default=8.0, help="at each rate (default 8)")
    parser.add_argument(
        "--busy", type=float, default=0.8, help="while learning: see BUSY (default 0.8)"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not can_cap():
        sys.exit(SKIPPED)
    answer = asyncio.run(measure(options))
    if options.json:
        print(json.dumps(answer, indent=1))
    else:
        show(answer)


if __name__ == "__main__":
    main()

"""The body of `motley plan --goodput`: the best TP × PP of each phase on one GPU type."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

from scheduler.errors import SetupError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from scheduler.goodput import Answer, Phase
    from scheduler.hardware import Catalogue

# Multi-turn ShareGPT as DistServe's paper sums it up (OSDI'24, §6.1): means of 755 tokens in and
# 200 out, cut below 2,048 in all. The spread is ours: medians and sigmas of two lognormals.
SHAREGPT = ((760, 0.8), (123, 1.3), 2048)
POOL = 4000  # sizes to draw from
MOST_KV = 10**9


def add_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("goodput")
    group.add_argument("--model", default="opt-13b", help="default opt-13b")
    group.add_argument("--gpu", default="A100-80GB", help="default A100-80GB")
    group.add_argument("--gpus", type=int, default=4, help="of one node (default 4)")
    group.add_argument("--ttft-ms", type=float, default=200.0)
    group.add_argument("--tpot-ms", type=float, default=100.0)
    group.add_argument("--share", type=float, default=0.9, help="must meet the SLO (default 0.9)")
    group.add_argument(
        "--attainment",
        choices=["joint", "marginal"],
        default="joint",
        help="both limits at once, or each by itself (default joint)",
    )
    group.add_argument(
        "--workload", default="sharegpt", help="a trace's file, or sharegpt: drawn, as published"
    )
    group.add_argument("--requests", type=int, default=300, help="of a run (default 300)")
    group.add_argument("--runs", type=int, default=20, help="with other draws (default 20)")
    group.add_argument("--max-rate", type=float, default=5.0, help="requests/s per GPU (default 5)")
    group.add_argument(
        "--step", type=float, default=0.25, help="how well to know it (default 0.25)"
    )
    group.add_argument("--rate", type=float, help="requests/s to serve: says how many replicas")
    group.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace, clock: Callable[[], float]) -> Answer:
    """Raises SetupError naming the option."""
    import numpy as np

    from scheduler.goodput import Answer, Target, draw_requests, search
    from scheduler.hardware import read_catalogue

    for name in ("ttft_ms", "tpot_ms", "max_rate", "step", "requests", "runs", "gpus"):
        value = getattr(options, name)
        if not (math.isfinite(value) and value > 0):
            raise SetupError(f"--{name.replace('_', '-')} {value:g}: above 0")
    if not 0 < options.share < 1:
        raise SetupError(f"--share {options.share:g}: above 0 and below 1")
    start = clock()
    phases = _phases(options, read_catalogue())
    pairs = [pair for pair in itertools.product(phases, phases) if _gpus(pair) <= options.gpus]
    if not pairs:
        raise SetupError(f"--gpus {options.gpus}: no pair of workers of {options.model} fits")
    sizes = _sizes(options.workload)
    draws = [
        draw_requests(sizes, options.requests, np.random.default_rng(options.seed + number))
        for number in range(options.runs)
    ]
    target = Target(options.ttft_ms, options.tpot_ms, options.share, options.attainment)
    found = search(pairs, draws, target, max_rate=options.max_rate, step=options.step)
    best = found[0]
    replicas = math.ceil(options.rate / best.rate) if options.rate and best.rate else None
    simulations = sum(each.simulations for each in found)
    return Answer(options.attainment, found, replicas, simulations, clock() - start)


def _gpus(pair: tuple[Phase, Phase]) -> int:
    return pair[0].gpus + pair[1].gpus


def _phases(options: argparse.Namespace, catalogue: Catalogue) -> list[Phase]:
    """All TP × PP that hold the model; step times that were fitted, where there are any."""
    from scheduler.goodput import Phase
    from scheduler.roofline import roofline

    model, gpu = catalogue.model(options.model, "--model"), catalogue.gpu(options.gpu, "--gpu")
    fitted = [s for s in catalogue.steps if (s.model, s.gpu) == (options.model, options.gpu)]
    steps = fitted or [roofline(model, gpu, tp) for tp in (1, 2, 4, 8) if model.heads % tp == 0]
    phases = []
    for profile in steps:
        for pp in (n for n in range(1, options.gpus + 1) if model.layers % n == 0):
            held = model.kv_tokens(gpu, profile.tp, pp)
            most = profile.batch_tokens * pp or MOST_KV
            if profile.tp * pp <= options.gpus and held:
                phases.append(Phase(profile, pp, min(held, most)))
    return phases


def _sizes(workload: str) -> list[tuple[int, int]]:
    import numpy as np

    from scheduler.workload import read_trace

    if workload != "sharegpt":
        return [(arrival.input, arrival.output) for arrival in read_trace(Path(workload))]
    (in_median, in_sigma), (out_median, out_sigma), most = SHAREGPT
    rng = np.random.default_rng(1)
    sizes: list[tuple[int, int]] = []
    while len(sizes) < POOL:
        inputs = int(rng.lognormal(math.log(in_median), in_sigma))
        outputs = int(rng.lognormal(math.log(out_median), out_sigma))
        if inputs >= 4 and outputs >= 1 and inputs + outputs < most:
            sizes.append((inputs, outputs))
    return sizes

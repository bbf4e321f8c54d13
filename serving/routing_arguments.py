"""What `motley serve` may be told of routing."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from scheduler.policies import POLICIES
from serving.placing import RoutingOptions

if TYPE_CHECKING:
    from scheduler.plan_file import PlanFile


def add_routing_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--policy",
        choices=POLICIES,
        default="priced",
        help="how a request finds its workers (default priced; docs/routing.md)",
    )
    for limit, meaning in (("ttft", "until the first token"), ("tpot", "between two tokens")):
        command.add_argument(
            f"--slo-{limit}-ms",
            type=_limit,
            action="append",
            default=[],
            metavar="[NAME=]MS",
            help=f"most ms {meaning}, of requests that set no limit themselves (default: none)",
        )
    command.add_argument(
        "--on-no-prefill",
        choices=["local", "reject"],
        default="local",
        help="without a prefill worker: decode workers compute prompts (default), or 503",
    )


def routing_options(options: argparse.Namespace, plan: PlanFile | None = None) -> RoutingOptions:
    """From what was parsed; limits that are not given are the plan's."""
    slos = plan.slo if plan else {}
    return RoutingOptions(
        policy=options.policy,
        local=options.on_no_prefill == "local",
        ttft_s={m: slo.ttft_ms / 1e3 for m, slo in slos.items()} | dict(options.slo_ttft_ms),
        tpot_s={m: slo.tpot_ms / 1e3 for m, slo in slos.items()} | dict(options.slo_tpot_ms),
    )


def _limit(text: str) -> tuple[str, float]:
    """(model or "", seconds) of NAME=MS or MS."""
    name, _, number = text.rpartition("=")
    milliseconds = float(number)
    if not 0 < milliseconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{number} is not a number of ms above 0")
    return name, milliseconds / 1e3

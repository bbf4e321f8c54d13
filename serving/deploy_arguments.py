"""The arguments of `motley deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from serving.arguments import add_router_arguments

if TYPE_CHECKING:
    import argparse

EXAMPLES = """\
PLAN.json is what `motley plan --output` wrote. Its models are found as `motley serve` finds them;
NAME=MODEL says where one is. Every worker of the plan starts on this machine, or with --here those
on these kinds of machine; for the others the commands to start them elsewhere are printed.

examples:
  motley deploy plan.json
  motley deploy plan.json chat=./model.gguf --threads 1
  motley deploy plan.json --here CPU-2 --cluster 0.0.0.0:8100
"""


def add_deploy_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("plan", type=Path, metavar="PLAN.json")
    command.add_argument("models", nargs="*", metavar="NAME=MODEL")
    command.add_argument(
        "--here", type=_names, metavar="GPU[,…]", help="what this machine is (default: all of them)"
    )
    add_router_arguments(command)
    command.set_defaults(routers=1, sibling=False)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))

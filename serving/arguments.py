"""The arguments of `motley serve` beside those of its workers' engines."""

from __future__ import annotations

import argparse
from pathlib import Path

from scheduler.argument_types import address, count, port, positive, sizes
from scheduler.messages import Address
from serving.routing_arguments import add_routing_arguments

DEFAULT_MODEL = "smollm2-135m-instruct"
HTTP_PORT, CLUSTER_PORT = 8000, 8100

EXAMPLES = """\
MODEL is a known name (smollm2), a GGUF file, a folder of safetensors, or a Hugging Face repository
as org/name; NAME=MODEL chooses the name that clients write. Several models share the router.

examples:
  motley serve
  motley serve ./model.gguf --prefill 2 --decode 1
  motley serve smollm2 chat=./folder --prefill 0 --decode 0 --mixed 1
  motley serve smollm2 --cluster 0.0.0.0:8100    # workers on other machines may join
  motley serve --endpoint http://gpu1:8000,http://gpu2:8000    # relay to servers that run already
"""


def add_serve_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"default {DEFAULT_MODEL}, or none with --endpoint",
    )
    command.add_argument("--prefill", type=count, default=1, metavar="N", help="default 1")
    command.add_argument("--decode", type=count, default=1, metavar="N", help="default 1")
    command.add_argument("--mixed", type=count, default=0, metavar="N", help="default 0")
    command.add_argument(
        "--plan", type=Path, metavar="PLAN.json", help="route by its prices, shares and limits"
    )
    command.add_argument(
        "--group-ranks",
        type=positive,
        default=1,
        metavar="N",
        help="make each worker a group of N processes that share its model (default 1)",
    )
    command.add_argument(
        "--routers",
        type=positive,
        default=1,
        metavar="N",
        help="router processes that share the HTTP port; workers elsewhere join each, at the"
        " cluster port and the N-1 after it (default 1)",
    )
    command.add_argument("--sibling", action="store_true", help=argparse.SUPPRESS)
    add_router_arguments(command)


def add_router_arguments(command: argparse.ArgumentParser) -> None:
    """What `motley serve` and `motley deploy` have in common beside the workers' engines."""
    command.add_argument("--host", default="127.0.0.1", help="HTTP address (default 127.0.0.1)")
    command.add_argument(
        "--port", type=port, default=HTTP_PORT, help=f"HTTP port (default {HTTP_PORT})"
    )
    command.add_argument(
        "--drain-s",
        type=count,
        default=30,
        metavar="S",
        help="at the end, what requests in flight have to finish (default 30)",
    )
    command.add_argument(
        "--cluster",
        type=address,
        default=Address("127.0.0.1", 0),
        metavar="HOST:PORT",
        help=f"where workers join, e.g. 0.0.0.0:{CLUSTER_PORT} (default: this machine only)",
    )
    command.add_argument(
        "--memory-cap",
        type=sizes,
        default=(),
        metavar="SIZE,…",
        help="of each rank's process, one for all or one each: 300MB,300MB,1GB",
    )
    command.add_argument(
        "--endpoint",
        type=urls,
        default=(),
        metavar="URL,…",
        help="OpenAI servers whose models this router relays to: http://gpu1:8000,http://gpu2:8000",
    )
    add_routing_arguments(command)


def urls(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))

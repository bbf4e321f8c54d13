"""The arguments of `motley worker`: its engine, and the group that it is a rank of."""

from __future__ import annotations

import argparse
import os
import secrets
from pathlib import Path

from scheduler.argument_types import above_zero, address, addresses, count, positive, size
from scheduler.messages import Address, Role

EXAMPLES = """\
example, on another machine, with what `motley secret` prints on the router's:
  MOTLEY_SECRET=… motley worker smollm2 --role decode --join 192.0.2.7:8100

a group of two machines that share one model; the second joins the first:
  motley worker smollm2 --join 192.0.2.7:8100 --group g --rank 0 --ranks 2 \\
      --group-listen 0.0.0.0:8200
  motley worker smollm2 --join 192.0.2.8:8200 --group g
"""


def add_worker_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL")
    command.add_argument(
        "--join",
        type=addresses,
        required=True,
        metavar="HOST:PORT[,…]",
        help="its routers; each of several sees what the others send here",
    )
    command.add_argument("--role", choices=[str(role) for role in Role], default="mixed")
    command.add_argument(
        "--kind", default="", metavar="COLUMN", help="of the router's plan, where it has several"
    )
    command.add_argument("--name", default=f"{os.uname().nodename}-{secrets.token_hex(3)}")
    command.add_argument("--listen", default="0.0.0.0", help="address for other workers' KV caches")
    command.add_argument("--advertise", metavar="HOST", help="how other workers reach this one")
    command.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    _group_arguments(command)
    add_engine_arguments(command)


def _group_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "groups", "several processes, on any machines, that together are one worker"
    )
    group.add_argument("--group", metavar="NAME", help="be a rank of this group")
    group.add_argument(
        "--rank", type=count, metavar="R", help="0: speak for the group; else leave it out"
    )
    group.add_argument(
        "--ranks", type=positive, default=1, metavar="N", help="of rank 0: wait for N"
    )
    group.add_argument(
        "--group-listen",
        type=address,
        default=Address("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="of rank 0: where the other ranks join",
    )
    group.add_argument(
        "--weight",
        type=above_zero,
        metavar="W",
        help="share of the work, relative to other ranks (default: measured and planned)",
    )
    group.add_argument(
        "--memory-cap",
        type=size,
        metavar="SIZE",
        help="of this rank's process, such as 500MB: weights that do not fit pass through",
    )
    group.add_argument(
        "--shards", type=Path, metavar="DIR", help="where the weights of a rank with a cap are kept"
    )
    group.add_argument(
        "--fetch",
        action="store_true",
        help="rank 0 sends this rank its weights: MODEL is only the name that the group serves",
    )
    group.add_argument(
        "--stream-cached",
        action="store_true",
        help="stream weights through the page cache: faster where that holds them all",
    )
    group.add_argument(
        "--allreduce",
        choices=["star", "direct", "two-shot", "ring"],
        help="of rank 0: how sums travel (default: the fastest, by size)",
    )
    group.add_argument(
        "--sums",
        choices=["float32", "int8"],
        default="float32",
        help="of rank 0: int8 for a quarter of the bytes where that is faster, less exact",
    )


def add_compute_arguments(command: argparse.ArgumentParser) -> None:
    """What a step's time depends on."""
    command.add_argument(
        "--threads", type=count, default=0, metavar="N", help="of a worker (default: its share)"
    )
    command.add_argument(
        "--kv-tokens",
        type=count,
        default=16384,
        metavar="N",
        help="tokens of KV cache of a worker (default 16384)",
    )
    command.add_argument(
        "--mode",
        choices=["fast", "exact"],
        default="fast",
        help="fast: int8 activations, fp16 KV cache (default); exact: fp32 throughout",
    )
    command.add_argument(
        "--kv-dtype",
        choices=["float16", "int8"],
        default="float16",
        help="of fast mode's KV cache; int8 halves its memory (default float16)",
    )
    command.add_argument(
        "--quantize", choices=["int4", "int8"], help="round the weights of safetensors"
    )


def add_engine_arguments(command: argparse.ArgumentParser) -> None:
    add_compute_arguments(command)
    command.add_argument(
        "--kv-codecs",
        type=kv_codecs,
        default=("raw", "int8"),
        metavar="raw,int8,int4",
        help="how a KV cache may travel, best quality first; a link gets the first one that keeps "
        "up with prefill, and exact mode always raw (default raw,int8)",
    )
    command.add_argument(
        "--no-speculation",
        dest="speculate",
        action="store_false",
        help="never guess tokens ahead (the output is the same)",
    )
    command.add_argument(
        "--itl-bound-ms",
        type=count,
        metavar="MS",
        help="cut prompts so that no gap between tokens gets longer (default: no bound)",
    )


def kv_codecs(text: str) -> tuple[str, ...]:
    codecs, known = tuple(text.split(",")), ("raw", "int8", "int4")
    if unknown := set(codecs).difference(known):
        raise argparse.ArgumentTypeError(f"{unknown.pop()!r} is none of {', '.join(known)}")
    return codecs

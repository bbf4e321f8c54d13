"""The body of `motley group plan`: what a group of unlike boxes would do with a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from scheduler.errors import SetupError
from scheduler.units import COUNTS, RATES, SIZES, TIMES, quantity

if TYPE_CHECKING:
    import argparse

    from workers.group.plan import Box, Choice, Plan

EXAMPLES = """\
MODEL is a known name, a file or folder, or random:SHAPE. The first box speaks for the group and is
never left out. compute is in weights a second (`python -m kernels.bench`: one row, in the format of
the model); a cap bounds the whole process, and what does not fit is read from the disk.

examples:
  motley group plan smollm2 --box desk,compute=9G --box pi,compute=1.5G --link 1Gbit,0.2ms
  motley group plan random:llama2-70b --link 1Gbit,0.3ms --kv-tokens 2048 \\
      --box a,compute=9G,cap=8GB,disk=3GB --box b,compute=9G,cap=8GB,disk=3GB \\
      --box c,compute=5G,cap=4GB,disk=1GB --box attic,compute=2G,cap=4GB,rate=300Mbit,latency=5ms
"""
PROCESS = 44 << 20  # bytes of a rank before any weights
FIELDS = {"compute": COUNTS, "disk": SIZES, "cap": SIZES, "rate": RATES, "latency": TIMES}
LINK = "1Gbit,0.2ms"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL")
    command.add_argument(
        "--box",
        action="append",
        required=True,
        metavar="NAME,compute=N[,cap=SIZE,disk=SIZE][,rate=R,latency=T]",
        help="a machine: weights/s, memory, disk bytes/s, and its own link if it has another",
    )
    command.add_argument(
        "--link", default=LINK, metavar="RATE,LATENCY", help=f"of all boxes (default {LINK})"
    )
    command.add_argument("--kv-tokens", type=int, default=16384, help="default 16384")
    command.add_argument("--kv-dtype", choices=["float16", "int8"], default="float16")
    command.add_argument("--quantize", choices=["int4", "int8"], help="of safetensors")
    command.add_argument("--rows", type=int, default=544, help="of a step (default 544)")
    command.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(options: argparse.Namespace) -> None:
    """Raises SetupError that names what the operator must change."""
    from workers.build import find
    from workers.group.demand import demand_of
    from workers.group.plan import choose
    from workers.weights.checkpoint import open_checkpoint

    boxes = read_boxes(options.box, options.link)
    checkpoint = open_checkpoint(Path(find(options.model).location), options.quantize)
    try:
        demand = demand_of(
            checkpoint,
            options.quantize,
            "fast",
            options.kv_dtype,
            options.kv_tokens,
            options.rows,
        )
    finally:
        checkpoint.close()
    choice = choose(demand, boxes)
    if options.json:
        encoded = msgspec.json.format(msgspec.json.encode(choice), indent=2)
        sys.stdout.write(encoded.decode() + "\n")
    else:
        show(choice)


def read_boxes(texts: list[str], link: str) -> list[Box]:
    """Raises SetupError for what is not a box or a link."""
    from workers.group.plan import Box

    rate, _, latency = link.partition(",")
    common = {
        "rate": _number("--link", rate, "rate"),
        "latency": _number("--link", latency, "latency"),
    }
    boxes: list[Box] = []
    for text in texts:
        name, *parts = text.split(",")
        values = dict(common)
        for part in parts:
            field, _, value = part.partition("=")
            values[field] = _number(f"--box {text}", value, field)
        if "compute" not in values:
            raise SetupError(f"--box {text}: say how fast it is, such as compute=5G")
        boxes.append(
            Box(
                name=name,
                weights_per_s=values["compute"],
                latency_s=values["latency"],
                link_bytes_per_s=values["rate"],
                cap=int(values["cap"]) if "cap" in values else None,
                disk_bytes_per_s=values.get("disk", 0.0),
                base=PROCESS,
            )
        )
    names = [box.name for box in boxes]
    if len(set(names)) < len(names):
        raise SetupError("--box: two have the same name")
    return boxes


def _number(where: str, text: str, field: str) -> float:
    if field not in FIELDS:
        raise SetupError(f"{where}: no field {field!r}; known are {', '.join(FIELDS)}")
    try:
        return quantity(text, FIELDS[field])
    except ValueError as error:
        raise SetupError(f"{where}: {field}: {error}") from None


def show(choice: Choice) -> None:
    from rich.console import Console
    from rich.table import Table

    console, plan = Console(), choice.plan
    table = Table(title="Shares")
    columns = ("rank", "part", "heads", "kv", "ffn", "memory", "reads", "compute", "disk")
    for column in columns:
        table.add_column(column, justify="left" if column == "rank" else "right")
    for rank in plan.ranks:
        share = rank.share
        ffn = share.ffn.count or share.expert_ffn.count
        counts = (share.heads.count, share.kv_heads.count, ffn)
        sizes = (rank.resident_bytes, rank.streamed_bytes)
        table.add_row(
            rank.name,
            f"{rank.part:.1%}",
            *map(str, counts),
            *(f"{size / 1e6:.0f} MB" for size in sizes),
            *(f"{seconds:.4f} s" for seconds in (rank.compute_s, rank.disk_s)),
        )
    console.print(table)
    console.print(_sentence(plan))
    others = Table(title="Compared")
    for column in ("without", "s/token", ""):
        others.add_column(column, justify="right" if column == "s/token" else "left")
    for other in choice.alternatives:
        token = "-" if other.token_s is None else f"{other.token_s:.4f}"
        others.add_row(", ".join(other.left_out) or "(nobody left out)", token, other.reason)
    console.print(others)


def _sentence(plan: Plan) -> str:
    text = (
        f"{plan.token_s:.4f} s a token ({1 / plan.token_s:.2f} tokens/s), bound by {plan.bound} "
        f"({plan.slowest} is the slowest rank)"
    )
    if plan.sums_s:
        text += f"; sums ({plan.way}) take {plan.sums_s:.4f} s of it"
    if plan.left_out:
        text += f".\nFaster without {', '.join(plan.left_out)}: leave them out"
    return text + "."

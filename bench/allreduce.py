"""Sums over ranks: each way of ours beside the least that sockets take, and beside pickled arrays.

    python bench/allreduce.py                                  4 processes of one host
    python bench/allreduce.py --link 300Mbit,1ms --grid        emulated links, beside the formulas
    python bench/allreduce.py --grid --loss 0.001              and one chunk of 8 KB in 1000 is lost
    python bench/allreduce.py --tiny                           seconds: does everything still run?

"raw star" is the shortest program that does the same: blocking sockets, rank 0 adds and sends back.
"pickle star" is what it costs to send the arrays as pickles; "sockets_p50_us" is the same way where
ranks share no memory, as on several hosts. With --grid, every way is measured for several sizes and
links; "chosen" is what a group's own trial took, before that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import socket
import time
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import numpy as np
from link_emulator import LinkEmulator
from rich.console import Console
from rich.table import Table

from workers.group.allreduce import ALGORITHMS, Mesh
from workers.group.formation import connect
from workers.group.links import listener
from workers.group.sum_cost import predicted_s
from workers.group.ways import measure as trial
from workers.group.ways import rehearse
from workers.group.words import ORDER, Peer, Try, Use

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workers.group.passage import Passage
    from workers.group.words import Word

    Ways = tuple[tuple[int, str], ...]
    Array = np.ndarray[Any, np.dtype[np.float32]]

SECRET = b"bench"


@dataclass(frozen=True, slots=True)
class Link:
    """One-way delay between two ranks, and the rate of a rank's own link."""

    name: str
    delay_s: float
    bytes_per_s: float


LINKS = (
    Link("1Gbit,0.2ms", 2e-4, 125e6),
    Link("300Mbit,1ms", 1e-3, 37.5e6),
    Link("100Mbit,5ms", 5e-3, 12.5e6),
)
ALONE = ", sockets"  # after the name of a way: without shared memory
LOCAL_SIZES = (16_384, 262_144, 1_048_576)
SIZES = (4096, 16_384, 65_536, 262_144, 1_048_576)


def raw_star(mesh: Mesh, part: Array) -> None:
    """The least that it takes."""
    if mesh.rank:
        sock = mesh.links[0].sock
        sock.sendall(part)
        receive(sock, part.data.cast("B"))
        return
    row = mesh.buffers(1, part.size)[0]
    for other in mesh.others:
        receive(mesh.links[other].sock, row.data.cast("B"))
        part += row
    for other in mesh.others:
        mesh.links[other].sock.sendall(part)


def pickle_star(mesh: Mesh, part: Array) -> None:
    """Objects over sockets as they come (no TCP_NODELAY), received in pieces of 4 KB."""
    for link in mesh.links.values():
        link.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    if mesh.rank:
        sock = mesh.links[0].sock
        send_object(sock, part)
        part[:] = receive_object(sock)
        return
    for other in mesh.others:
        part += receive_object(mesh.links[other].sock)
    for other in mesh.others:
        send_object(mesh.links[other].sock, part)


def receive(sock: socket.socket, view: memoryview) -> None:
    while view:
        view = view[sock.recv_into(view) :]


def send_object(sock: socket.socket, value: Array) -> None:
    body = pickle.dumps(value)
    sock.sendall(len(body).to_bytes(8, "big"))
    sock.sendall(body)


def receive_object(sock: socket.socket) -> Array:
    size = int.from_bytes(sock.recv(8), "big")
    body = b""
    while len(body) < size:
        body += sock.recv(min(4096, size - len(body)))
    value: Array = pickle.loads(body)  # of our own child, to show what it costs
    return value


WAYS: dict[str, Callable[[Mesh, Array], None]] = {
    **ALGORITHMS,
    "raw star": raw_star,
    "pickle star": pickle_star,
}


def rank_main(
    rank: int,
    server: socket.socket,
    peers: list[Peer],
    plan: list[tuple[str, int, int]],
    sizes: Sequence[int],
    far: bool,
    out: Any,
) -> None:
    """Sums of each (way, bytes, count); rank 0 tells the seconds of each.

    Before that, and told first, the way that a group would choose for each of `sizes`. If the ranks
    stand for distant ones (`far`), their links pass through no memory.
    """
    mesh = connect(server, SECRET, 1, rank, peers)
    passages = {} if far else {other: link.passage for other, link in mesh.links.items()}
    through(mesh, passages)
    ways = choice(mesh, sizes) if sizes else ()
    if rank == 0:
        out.send([next(way for bound, way in ways if size <= bound) for size in sizes])
    times: list[list[float]] = []
    for way, size, count in plan:
        part = np.ones(size // 4, np.float32)
        row = []
        through(mesh, {} if way.endswith(ALONE) else passages)
        for _ in range(count + 2):
            begun = time.perf_counter()
            WAYS[way.removesuffix(ALONE)](mesh, part)
            row.append(time.perf_counter() - begun)
            part[:] = 1
        times.append(row[2:])
        for link in mesh.links.values():
            link.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if rank == 0:
        out.send(times)
    mesh.close()


def through(mesh: Mesh, passages: dict[int, Passage | None]) -> None:
    """The links pass through these from here on; the other ranks do the same."""
    for other, link in mesh.links.items():
        link.passage = passages.get(other)


def choice(mesh: Mesh, sizes: Sequence[int]) -> Ways:
    """A group's own trial: rank 0 measures, the others do as they are told."""
    if mesh.rank == 0:

        def say(word: Word) -> None:
            for link in mesh.links.values():
                link.say(word)

        ways = trial(mesh, say, sizes)
        say(Use(ways))
        return ways
    while not isinstance(order := mesh.links[0].hear(ORDER), Use):
        assert isinstance(order, Try)
        rehearse(mesh, order)
    return order.ways


def measure(
    ranks: int,
    plan: list[tuple[str, int, int]],
    link: Link | None,
    sizes: Sequence[int] = (),
    loss: float = 0.0,
) -> tuple[list[str], list[list[float]]]:
    """Of processes of their own, over loopback or over emulated links: see `rank_main`."""
    servers = [listener("127.0.0.1", 0) for _ in range(ranks)]
    ports = [server.getsockname()[1] for server in servers]
    emulator = LinkEmulator(ports, link.delay_s, link.bytes_per_s, loss=loss) if link else None
    near, far = multiprocessing.Pipe()
    processes = []
    for rank, server in enumerate(servers):
        seen = [emulator.port(rank, o) if emulator and o < rank else ports[o] for o in range(ranks)]
        peers = [Peer(str(other), "127.0.0.1", port) for other, port in enumerate(seen)]
        process = multiprocessing.Process(
            target=rank_main, args=(rank, server, peers, plan, sizes, link is not None, far)
        )
        process.start()
        processes.append(process)
    answers = []
    for _ in range(2):
        if not near.poll(300):
            raise SystemExit("the ranks did not answer")
        answers.append(near.recv())
    for process in processes:
        process.join(10)
    for server in servers:
        server.close()
    if emulator:
        emulator.cut()
    chosen, times = answers
    return chosen, times


def loopback(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ways in turn, round after round, so that a busy moment hits all alike."""
    names = [*WAYS, *(way + ALONE for way in ALGORITHMS)]
    cells = [(way, size) for size in options.size for way in names]
    plan = [(*cell, options.count) for _ in range(options.rounds) for cell in cells]
    _, times = measure(options.ranks, plan, None)
    own = {
        cell: [seconds for row in times[number :: len(cells)] for seconds in row]
        for number, cell in enumerate(cells)
    }
    return [
        {
            "size": size,
            "way": way,
            "p50_us": 1e6 * median(own[way, size]),
            "p90_us": 1e6 * quantiles(own[way, size], n=10)[8],
            "sockets_p50_us": 1e6 * median(own.get((way + ALONE, size), own[way, size])),
        }
        for size in options.size
        for way in WAYS
    ]


def grid(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every size over every link: measured, by the formula, and what a group would choose.

    Ways in turn, round after round, so that a busy moment hits all alike.
    """
    rows = []
    cells = [(size, way) for size in SIZES for way in ALGORITHMS]
    plan = [(way, size, options.count) for _ in range(options.rounds) for size, way in cells]
    links = [link for link in LINKS if options.link in (None, link.name)]
    for link in links:
        ways, times = measure(options.ranks, plan, link, SIZES, options.loss)
        medians = {
            cell: median(seconds for row in times[number :: len(cells)] for seconds in row)
            for number, cell in enumerate(cells)
        }
        for size, chosen in zip(SIZES, ways, strict=True):
            measured = {way: medians[size, way] for way in ALGORITHMS}
            formula = {
                way: predicted_s(way, options.ranks, size, link.delay_s, link.bytes_per_s)
                for way in ALGORITHMS
            }
            rows.append(
                {
                    "link": link.name,
                    "size": size,
                    "ms": {way: 1e3 * seconds for way, seconds in measured.items()},
                    "formula_ms": {way: 1e3 * seconds for way, seconds in formula.items()},
                    "chosen": chosen,
                    "over_fastest": measured[chosen] / min(measured.values()),
                    "over_formula": measured[chosen] / formula[chosen],
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table()
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(words(value) for value in row.values()))
    Console().print(table)


def words(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {number:.2f}" for name, number in value.items())
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--size", type=int, nargs="+", default=LOCAL_SIZES, help="bytes of a sum")
    parser.add_argument("--count", type=int, default=50, help="sums of each way in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grid", action="store_true", help="sizes and links")
    parser.add_argument("--link", choices=[link.name for link in LINKS], help="only this one")
    parser.add_argument("--loss", type=float, default=0.0, help="of --grid: share of lost chunks")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.ranks, options.count, options.rounds = 2, 2, 1
    rows = grid(options) if options.grid else loopback(options)
    if options.json:
        conditions = {"cores": os.cpu_count(), "load": os.getloadavg(), "ranks": options.ranks}
        links = [asdict(link) for link in LINKS]
        print(json.dumps({"conditions": conditions, "links": links, "rows": rows}))
    else:
        show(rows)


if __name__ == "__main__":
    main()

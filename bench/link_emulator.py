"""Slow links between processes of one machine: delay, rate, loss and partition, by a TCP proxy.

Each rank has a link of its own to the network, which all its connections share: what it sends waits
for its uplink, crosses in `delay_s`, and waits for the receiver's downlink. Threads sleep, since an
event loop's timers are no finer than a millisecond.

TCP hides a loss as a pause: a share of the chunks comes a retransmission later, and what follows on
its connection waits behind it. Where more bytes are already waiting to be sent, their
acknowledgments tell the sender within one round trip (fast retransmit, RFC 5681); the last chunk of
a burst waits for the timeout (RFC 6298), with Linux's least of 200 ms above the round trip. Simpler
than the truth: a chunk is lost whole and once, the rate stays (no congestion window shrinks), and
what is sent again takes none of the uplink.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from contextlib import suppress
from random import Random

CHUNK = 8192  # bytes that hold a link at a time
TIMEOUT_S = 0.2  # above the round trip, until what was lost at the end of a burst is sent again


class Wire:
    """One direction of one rank's link."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._free = 0.0
        self._lock = threading.Lock()

    def carry(self, size: int, earliest: float) -> float:
        """When the last byte is through."""
        with self._lock:
            self._free = max(self._free, earliest) + size / self._rate
            return self._free


class Losses:
    """Which chunks of one direction of a connection are lost."""

    def __init__(self, share: float, delay_s: float, seed: str) -> None:
        self._share = share
        self._round_trip = 2 * delay_s
        self._random = Random(seed)

    def next(self) -> bool:
        """Whether the next chunk is lost."""
        return self._random.random() < self._share

    def pause_s(self, *, more: bool) -> float:
        """How much later a lost chunk comes, if `more` follows it or not."""
        return self._round_trip + (0.0 if more else TIMEOUT_S)


def has_more(source: socket.socket) -> bool:
    """Whether bytes wait to be read."""
    try:
        return bool(source.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


def sleep_until(when: float) -> None:
    if (wait := when - time.perf_counter()) > 0:
        time.sleep(wait)


class LinkEmulator:
    """Proxies between ranks: `port(dialler, listener)` stands for the listener's own port."""

    def __init__(
        self,
        ports: list[int],
        delay_s: float,
        bytes_per_s: float,
        *,
        loss: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`loss` is the share of the chunks that are lost once; `seed` says which."""
        self._delay = delay_s
        self._loss, self._seed = loss, seed
        self._up = [Wire(bytes_per_s) for _ in ports]
        self._down = [Wire(bytes_per_s) for _ in ports]
        self._sockets: list[socket.socket] = []
        self._ports: dict[tuple[int, int], int] = {}
        for dialler in range(len(ports)):
            for listener in range(dialler):
                self._proxy(dialler, listener, ports[listener])

    def port(self, dialler: int, listener: int) -> int:
        return self._ports[dialler, listener]

    def cut(self) -> None:
        """Every connection breaks: a partition, and the end of the emulation."""
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _proxy(self, dialler: int, listener: int, port: int) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        self._sockets.append(server)
        self._ports[dialler, listener] = server.getsockname()[1]

        def serve() -> None:
            with suppress(OSError):
                while True:
                    near, _ = server.accept()
                    far = socket.create_connection(("127.0.0.1", port))
                    self._sockets += (near, far)  # before anything passes: see `cut`
                    self._pipe(near, far, dialler, listener)
                    self._pipe(far, near, listener, dialler)

        threading.Thread(target=serve, daemon=True).start()

    def _pipe(self, source: socket.socket, target: socket.socket, sender: int, to: int) -> None:
        """Carry bytes one way: one thread takes them in, one gives them out when they are due."""
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        due: deque[tuple[float, bytes]] = deque()
        news = threading.Condition()
        losses = Losses(self._loss, self._delay, f"{self._seed} {sender} {to}")

        def take() -> None:
            with suppress(OSError):
                while data := source.recv(CHUNK):
                    sent = self._up[sender].carry(len(data), time.perf_counter())
                    first = sent - len(data) / self._up[sender]._rate + self._delay
                    if losses.next():
                        first += losses.pause_s(more=has_more(source))
                    with news:
                        due.append((first, data))
                        news.notify()
            with news:
                due.append((0.0, b""))
                news.notify()

        def give() -> None:
            with suppress(OSError):
                while True:
                    with news:
                        news.wait_for(lambda: due)
                        first, data = due.popleft()
                    if not data:
                        target.shutdown(socket.SHUT_WR)
                        return
                    # The downlink takes the bytes as they come: only what others send delays them,
                    # and of that only what is there before.
                    sleep_until(first)
                    sleep_until(self._down[to].carry(len(data), first))
                    target.sendall(data)

        for run in (take, give):
            threading.Thread(target=run, daemon=True).start()

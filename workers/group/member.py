"""A rank that is not the first: a process that obeys rank 0, formation after formation."""

from __future__ import annotations

import logging
import threading
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from kernels.program import Span
from scheduler.errors import ProtocolError, SetupError
from workers.group.candidates import pack
from workers.group.formation import connect
from workers.group.gauge import gauge_link
from workers.group.kv_exchange import serve_kv
from workers.group.links import dial, listener
from workers.group.part import Means, Wanted, load_part
from workers.group.travel import fetch
from workers.group.ways import Combine, rehearse
from workers.group.words import (
    ORDER,
    TO_RANK,
    Beat,
    Copy,
    Form,
    Hello,
    Leave,
    Left,
    Logits,
    Ready,
    Refuse,
    Run,
    Try,
    Word,
)

if TYPE_CHECKING:
    import socket

    from scheduler.messages import Address
    from workers.group.links import Link
    from workers.group.part import Part
    from workers.group.plan import Box
    from workers.group.shard_folder import ShardFolder
    from workers.group.words import ToRank

logger = logging.getLogger(__name__)

BEAT_S = 0.5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0


@dataclass(frozen=True, slots=True)
class MemberConfig:
    """Who this rank is, and where rank 0 listens."""

    name: str
    leader: Address
    secret: bytes
    listen_host: str  # for the links of other ranks
    advertise_host: str  # how they reach it; empty: as rank 0 sees it
    means: Means
    weight: float | None  # how much it computes, relative to other ranks; None: as `box` says
    box: Box | None  # what it can do
    model: str  # its name
    path: str  # of the model on this machine; empty: where rank 0 has it
    fetch: bool  # its weights from rank 0
    pid: int


class Control:
    """The control link, which the heart shares with whoever answers."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heart", daemon=True)
        self._heart.start()

    def say(self, word: Word) -> None:
        with self._lock:
            self._link.say(word)

    def hear(self) -> ToRank:
        return self._link.hear(TO_RANK)

    def close(self) -> None:
        self._stop.set()
        self._link.close()
        self._heart.join()

    def _beat(self) -> None:
        try:
            while not self._stop.wait(BEAT_S):
                self.say(Beat())
        except OSError:
            self._link.close()  # whoever hears on it learns of the loss


def run_member(config: MemberConfig, stop: threading.Event) -> None:
    """Serve as a rank until rank 0 is lost and `stop` is set.

    Raises SetupError if rank 0 refuses us.
    """
    pause = FIRST_PAUSE_S
    with closing(config.means.shards), listener(config.listen_host, 0) as server:
        while not stop.is_set():
            try:
                link = dial(config.leader.host, config.leader.port, config.secret, limit_s=0)
            except (OSError, ProtocolError) as error:
                level = logging.WARNING if pause == LONGEST_PAUSE_S else logging.DEBUG
                logger.log(level, "no rank 0 yet: %s; trying again", error)
                stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            pause = FIRST_PAUSE_S
            try:
                _belong(config, server, link)
            except (OSError, ProtocolError) as error:
                logger.warning("rank 0 is lost: %s", error)
            finally:
                link.close()


def _belong(config: MemberConfig, server: socket.socket, link: Link) -> None:
    """Try the link, if that matters, then be a member on it until rank 0 is lost."""
    box = config.box
    if box:
        latency_s, rate = gauge_link(link)
        box = replace(box, latency_s=latency_s, link_bytes_per_s=rate)
        link.set_limit(0)
    control = Control(link)
    try:
        _attend(config, server, control, box)
    finally:
        control.close()


def _attend(config: MemberConfig, server: socket.socket, control: Control, box: Box | None) -> None:
    """One membership, until rank 0 is lost."""
    control.say(
        Hello(
            name=config.name,
            host=config.advertise_host,
            port=server.getsockname()[1],
            model=config.model,
            path=config.path,
            weight=config.weight,
            box=box,
            pid=config.pid,
        )
    )
    while True:
        word = control.hear()
        if isinstance(word, Refuse):
            raise SetupError(f"rank 0 refused this rank: {word.reason}")
        reason = ""
        try:
            _serve(config, server, control, word)
        except (OSError, ProtocolError) as error:
            reason = str(error)
            logger.info("formation %d broke: %s", word.epoch, error)
        control.say(Left(word.epoch, reason))


def _serve(config: MemberConfig, server: socket.socket, control: Control, form: Form) -> None:
    """One formation, until it breaks or rank 0 ends it."""
    peers = [peer if peer.host else replace(peer, host=config.leader.host) for peer in form.peers]
    mesh = connect(server, config.secret, form.epoch, form.rank, peers)
    try:
        wanted = Wanted(
            share=form.share,
            mode=form.mode,
            quantize=form.quantize,
            path=config.path or form.path,
            kv_dtype=form.kv_dtype,
            kv_blocks=form.kv_blocks,
            max_rows=form.max_rows,
        )
        combine = Combine(mesh)
        fetched = None
        if config.fetch:
            fetched = fetch(config.leader, config.secret, form.share, config.means.shards)
        part = load_part(wanted, config.means, combine, fetched)
        kv = threading.Thread(target=serve_kv, args=(mesh.kv_links[0], part.cache), name="kv")
        kv.start()
        try:
            control.say(Ready(form.epoch))
            logger.info("rank %d of %d", form.rank, len(form.peers))
            _obey(combine, part, form.hidden, config.means.shards)
        finally:
            mesh.close()  # with it ends the thread
            kv.join()
            part.close()
    finally:
        mesh.close()


def _obey(combine: Combine, part: Part, width: int, shards: ShardFolder) -> None:
    """Do what rank 0 says until it says Leave, or a link breaks."""
    leader = combine.mesh.links[0]
    while True:
        order = leader.hear(ORDER)
        if isinstance(order, Leave):
            return
        if isinstance(order, Run | Logits):
            _compute(leader, part, width, order)
        elif isinstance(order, Copy):
            part.cache.copy(list(order.pairs))
        elif isinstance(order, Try):
            rehearse(combine.mesh, order)
        else:  # every rank is ready
            combine.use(order.ways)
            shards.stands()


def _compute(leader: Link, part: Part, width: int, order: Run | Logits) -> None:
    """Rows come, logits go."""
    x = np.empty((order.rows, width), np.float32)
    leader.receive_into(x.data.cast("B"))
    if isinstance(order, Run):
        spans = [Span(s.first, s.count, s.start, s.blocks) for s in order.spans]
        _, logits = part.run(x, spans, order.drawn)
        counts = order.counts
    else:
        logits = part.logits(x)
        counts = (0,) * order.rows
    if logits.size:
        leader.send(pack(logits, counts))

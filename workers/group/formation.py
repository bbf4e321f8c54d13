"""Making the links of a group: every rank with every other, and once more with rank 0 for KV."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from scheduler.errors import ProtocolError
from workers.group.allreduce import Mesh
from workers.group.links import HANDSHAKE_S, accept, dial
from workers.group.passage import Offer, attach
from workers.group.words import INTRODUCE, MET, Introduce, Met

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from workers.group.links import Link
    from workers.group.words import Peer

CONNECT_S = 20.0  # for all links of a formation to stand
STEP_S = 900.0  # a step that streams all weights of a large model from a slow disk
KV_S = 30.0  # without a byte of a KV cache that was asked for or is on its way


def connect(
    server: socket.socket, secret: bytes, epoch: int, rank: int, peers: Sequence[Peer]
) -> Mesh:
    """Dial the lower ranks and accept the higher ones.

    Raises ConnectionError, TimeoutError or ProtocolError; then no link is left.
    """
    until = time.monotonic() + CONNECT_S
    mesh = Mesh(rank, len(peers))
    to_call = [(number, False) for number in range(rank)] + [(0, True)] * bool(rank)
    try:
        for number, kv in to_call:
            link = dial(peers[number].host, peers[number].port, secret, HANDSHAKE_S)
            mesh.add(number, link, kv=kv)
            _introduce(link, epoch, rank, kv=kv)
            link.set_limit(0 if kv else STEP_S)
        while not mesh.complete:
            link = accept(server, secret, STEP_S, max(0.001, until - time.monotonic()))
            try:
                word = link.hear(INTRODUCE)
                fits = word.epoch == epoch and rank < word.rank < len(peers)
            except (OSError, ProtocolError):
                fits = False
            if not fits:  # a late word of an earlier formation
                link.close()
                continue
            if word.kv:
                link.set_limit(KV_S)
            mesh.add(word.rank, link, kv=word.kv)
            if word.memory:
                link.passage = attach(word.memory)
                link.say(Met(link.passage is not None))
    except BaseException:
        mesh.close()
        raise
    return mesh


def _introduce(link: Link, epoch: int, rank: int, *, kv: bool) -> None:
    """Say who we are; a link for steps gets its passage, where both ranks are on one host."""
    with Offer.of_this_host(wanted=not kv) as offer:
        link.say(Introduce(epoch, rank, kv, offer.memory))
        if offer.memory and link.hear(MET).shared:
            link.passage = offer.passage

"""Making the links of a group: every rank with every other, each link once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from scheduler.errors import ProtocolError
from workers.group.allreduce import Mesh
from workers.group.links import Link, accept, dial
from workers.group.words import INTRODUCE, Introduce

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from workers.group.words import Peer

CONNECT_S = 20.0  # for all links of a formation to stand
STEP_S = 900.0  # a step that streams all weights of a large model from a slow disk


def connect(
    server: socket.socket, secret: bytes, epoch: int, rank: int, peers: Sequence[Peer]
) -> Mesh:
    """Dial the lower ranks and accept the higher ones.

    Raises ConnectionError, TimeoutError or ProtocolError; then no link is left.
    """
    until = time.monotonic() + CONNECT_S
    links: dict[int, Link] = {}
    try:
        for number, peer in enumerate(peers[:rank]):
            links[number] = dial(peer.host, peer.port, secret, STEP_S)
            links[number].say(Introduce(epoch, rank))
        while len(links) < len(peers) - 1:
            link = accept(server, secret, STEP_S, max(0.001, until - time.monotonic()))
            try:
                word = link.hear(INTRODUCE)
                fits = word.epoch == epoch and rank < word.rank < len(peers)
            except (OSError, ProtocolError):
                fits = False
            if fits:
                links[word.rank] = link
            else:  # a late word of an earlier formation
                link.close()
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return Mesh(rank, len(peers), links)

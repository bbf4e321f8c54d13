"""Rank 0's side of membership: who offers itself as a rank, and how it fares."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.errors import ProtocolError, SetupError
from workers.group.gauge import PROBES, answer_probe
from workers.group.links import accept, listener
from workers.group.words import FROM_RANK, OFFER, Hello, Left, Probe, Ready, Refuse, Want

if TYPE_CHECKING:
    from collections.abc import Callable

    from workers.group.links import Link
    from workers.group.travel import Shelf
    from workers.group.words import Form

logger = logging.getLogger(__name__)

SILENCE_S = 5.0  # ten beats
ACCEPT_S = 1.0  # how soon a closed server is noticed


@dataclass(eq=False, slots=True)
class Member:
    """A process that offers itself as a rank. Changed under the leader's lock only."""

    hello: Hello
    control: Link
    host: str  # how other ranks reach it
    alive: bool = True
    ready: int = 0  # the formation that it said Ready to last
    left: int = 0  # the formation that it left last


class Leader:
    """Takes members in on threads of its own; whoever forms a group asks who is there."""

    def __init__(self, host: str, port: int, secret: bytes, model: str) -> None:
        """Raises SetupError when the address cannot be bound."""
        self._secret, self._model = secret, model
        self._members: dict[str, Member] = {}
        self._news = threading.Condition()
        self._closed = False
        self.shelf: Shelf | None = None  # set before the first formation
        self._server = listener(host, port)
        self.address: tuple[str, int] = self._server.getsockname()[:2]
        threading.Thread(target=self._accept, name="members", daemon=True).start()

    def members(self) -> list[Member]:
        """Those who live, in the order in which they came."""
        with self._news:
            return list(self._members.values())

    def wait_for(self, count: int, limit_s: float) -> list[Member]:
        """Until so many are here. Raises SetupError when the time is over."""
        if not self._wait(lambda: len(self._members) >= count, limit_s):
            raise SetupError(
                f"{len(self._members)} of {count} ranks joined within {limit_s:.0f} s; start the "
                "others with `motley worker MODEL --group NAME --join` and this rank's address"
            )
        return self.members()

    def tell(self, member: Member, form: Form) -> None:
        """Its place in a formation. A member that does not hear it is lost."""
        try:
            member.control.say(form)
        except OSError:
            member.control.close()  # its reader notices

    def all_ready(self, members: list[Member], epoch: int, limit_s: float) -> bool:
        """Until each has its share in memory; False if one broke, was lost or took too long."""
        self._wait(lambda: all(m.ready == epoch or _gone(m, epoch) for m in members), limit_s)
        with self._news:
            return all(m.ready == epoch and not _gone(m, epoch) for m in members)

    def settle(self, members: list[Member], epoch: int, limit_s: float) -> None:
        """Until each has left this formation or is lost; one that does not is closed."""
        self._wait(lambda: all(_gone(m, epoch) for m in members), limit_s)
        for member in members:
            if not _gone(member, epoch):
                logger.warning("rank %s does not answer and is left out", member.hello.name)
                member.control.close()
                self._lose(member)

    def close(self) -> None:
        """Nobody is taken in any more, and every member hears of it."""
        self._closed = True
        self._server.close()
        for member in self.members():
            member.control.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                link = accept(self._server, self._secret, SILENCE_S, ACCEPT_S)
            except TimeoutError:
                continue
            except OSError as error:
                if not self._closed:  # out of file descriptors: some will be freed
                    logger.warning("cannot accept a rank: %s", error)
                    time.sleep(ACCEPT_S)
                continue
            threading.Thread(target=self._attend, args=(link,), name="rank", daemon=True).start()

    def _attend(self, link: Link) -> None:
        """Hear one member until it is lost."""
        member: Member | None = None
        try:
            hello = _hello(link)
            if isinstance(hello, Want):
                self._give(link, hello)
                return
            if hello.model != self._model:
                link.say(Refuse(f"this group serves {self._model}, not {hello.model}"))
                return
            member = Member(hello, link, hello.host or link.remote[0])
            self._take(member)
            while True:
                word = link.hear(FROM_RANK)
                with self._news:
                    if isinstance(word, Ready):
                        member.ready = word.epoch
                    elif isinstance(word, Left):
                        member.left = word.epoch
                    self._news.notify_all()
        except (OSError, ProtocolError) as error:
            logger.info("rank %s is lost: %r", member.hello.name if member else link, error)
        finally:
            link.close()
            if member:
                self._lose(member)

    def _give(self, link: Link, want: Want) -> None:
        """A shard to a rank that fetches its weights, until it has them."""
        if self.shelf is None:
            link.say(Refuse("this group is not formed yet"))
            return
        with suppress(ConnectionError):
            self.shelf.serve(link, want)

    def _take(self, member: Member) -> None:
        with self._news:
            if old := self._members.pop(member.hello.name, None):
                old.control.close()  # it came back before we noticed that it was gone
                old.alive = False
            self._members[member.hello.name] = member
            self._news.notify_all()
        logger.info("rank %s joined from %s", member.hello.name, member.host)

    def _lose(self, member: Member) -> None:
        with self._news:
            member.alive = False
            if self._members.get(member.hello.name) is member:
                del self._members[member.hello.name]
            self._news.notify_all()

    def _wait(self, true: Callable[[], bool], limit_s: float) -> bool:
        with self._news:
            return self._news.wait_for(true, limit_s)


def _gone(member: Member, epoch: int) -> bool:
    return not member.alive or member.left >= epoch


def _hello(link: Link) -> Hello | Want:
    """What a newcomer says of itself, once it has tried its link. Raises ProtocolError."""
    for _ in range(PROBES + 1):
        word = link.hear(OFFER)
        if not isinstance(word, Probe):
            return word
        answer_probe(link, word)
    raise ProtocolError("a rank tries its link for ever")

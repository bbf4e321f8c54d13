"""How fast a KV cache crosses from one worker to another, learned from those that did."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_BYTES = 1 << 16  # fewer say more of delays than of the rate
NEWEST = 0.5  # weight of the newest transfer
# A link that carried nothing for so long may be better by now: it is tried again. Until then a slow
# one is left alone, and nothing else would tell.
FORGET_S = 300.0


@dataclass(slots=True)
class Link:
    """One way. Times are in seconds of the router's clock."""

    byte_s: float = 0.0  # that a byte takes; 0: not known
    learned: float = 0.0
    carrying: int = 0  # KV caches that prefills have left behind and that have not arrived
    since: float = 0.0  # for so long none of them has

    def begin(self, now: float) -> None:
        """A KV cache is under way, and nothing is left that could hide it."""
        if not self.carrying:
            self.since = now
        self.carrying += 1

    def end(self, now: float) -> None:
        """It has arrived, or never will."""
        self.carrying -= 1
        self.since = now

    def learn(self, size: float, seconds: float, now: float) -> None:
        """So many bytes kept it busy for so long."""
        if size < LEAST_BYTES or seconds <= 0:
            return
        known = self.byte_s if self._known(now) else seconds / size
        self.byte_s = known + NEWEST * (seconds / size - known)
        self.learned = now

    def rate(self, assumed: float, backlog: float, now: float) -> float:
        """Bytes per second; `assumed` while nothing is known.

        Of the `backlog`, bytes that wait at its ends, none has arrived for a while: it is no faster
        than that. So a link that is much slower than was thought is seen before its first transfer
        ends.
        """
        rate = 1 / self.byte_s if self._known(now) else assumed
        if self.carrying and now > self.since:
            return min(rate, backlog / (now - self.since))
        return rate

    def _known(self, now: float) -> bool:
        return self.byte_s > 0 and now - self.learned < FORGET_S

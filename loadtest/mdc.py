"""The M/D/c queue: simulated in virtual time, and solved, so that a search can be checked.

Poisson arrivals of `rate` per second, `servers` servers that each take exactly `service` seconds,
first come, first served.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Vector = NDArray[np.float64]


class Queue(msgspec.Struct, frozen=True):
    servers: int
    service: float

    @property
    def saturation(self) -> float:
        """Arrivals per second above which the queue grows without end."""
        return self.servers / self.service

    def waits(self, rate: float, rng: random.Random) -> Iterator[float]:
        """Seconds that each arrival waits for a server, from an empty queue on, without end.

        Equal service times make servers free in the order in which they were taken, so a customer
        starts when the one `servers` places before it ends.
        """
        free = deque([0.0] * self.servers)
        now = 0.0
        while True:
            now += rng.expovariate(rate)
            begin = max(now, free.popleft())
            free.append(begin + self.service)
            yield begin - now

    def waits_at_most(self, limit: float, rate: float) -> float:
        """P(wait ≤ limit) in the steady state; 0 from saturation on.

        Franx, A simple solution for the M/D/c waiting time distribution, Operations Research
        Letters 29 (2001), equation 1: for (k-1) D ≤ x < k D,
        P(W ≤ x) = Σ_{j<kc} Q_{kc-1-j} e^{-u} u^j / j!, u = λ (k D - x),
        where Q_n = P(at most n wait).
        """
        if rate >= self.saturation:
            return 0.0
        k = int(limit / self.service) + 1
        u = rate * (k * self.service - limit)
        terms = k * self.servers
        queued = self._at_most_queued(rate, terms)
        return float(np.dot(queued[terms - 1 :: -1], _poisson(u, terms)))

    def capacity(self, limit: float, share: float) -> float:
        """The highest rate at which `share` of arrivals wait at most `limit` seconds."""
        low, high = 0.0, self.saturation
        while high - low > 1e-6 * self.saturation:
            middle = (low + high) / 2
            if self.waits_at_most(limit, middle) >= share:
                low = middle
            else:
                high = middle
        return low

    def _at_most_queued(self, rate: float, terms: int) -> Vector:
        """P(at most n wait) for n < terms: the number present one service time later is what did
        not get a server plus what has come (Crommelin 1932), a chain solved by iteration."""
        load = rate * self.service
        states = terms + self.servers + math.ceil(60 / (1 - load / self.servers))
        come = _poisson(load, states)
        present = np.zeros(states)
        present[0] = 1.0
        while True:
            left = np.concatenate(
                ([present[: self.servers + 1].sum()], present[self.servers + 1 :])
            )
            later = np.convolve(left, come)[:states]
            later[-1] += 1 - later.sum()
            if np.abs(later - present).sum() < 1e-10:
                break
            present = later
        at_most = np.cumsum(present)[self.servers :]
        return at_most[:terms]


def _poisson(mean: float, terms: int) -> Vector:
    counts = np.arange(terms)
    if mean <= 0:
        return np.where(counts == 0, 1.0, 0.0)
    logs = np.cumsum(np.log(np.maximum(counts, 1)))
    terms_of_mean: Vector = np.exp(counts * math.log(mean) - mean - logs)
    return terms_of_mean

"""Fair share: who has had more than the others waits behind them, within a priority.

The virtual token counter of Sheng et al. (arXiv 2401.00588): each key's counter grows with the
tokens that it is served, an output token counting as two; a key that comes back after a pause is
lifted to the least of those who are active, so that nobody saves up. It lives in the router,
because a worker sees only a part of a key's requests; what travels with a request is how many
quanta its key is ahead of the least served, a number that means the same to every worker whatever
other routers count.
"""

from __future__ import annotations

INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
QUANTUM = 20_000.0  # weighted tokens: less than this ahead is no reason to wait
KEYS_MOST = 4096  # remembered while they ask for nothing


class FairShare:
    """Counters of one model's keys."""

    def __init__(self, quantum: float = QUANTUM) -> None:
        self._quantum = quantum
        self._counters: dict[str, float] = {}
        self._active: dict[str, int] = {}  # requests of each key that are being served

    def enter(self, key: str, prompt_tokens: int) -> int:
        """A request of this key comes; gives how many quanta the key is ahead."""
        least = min((self._counters[other] for other in self._active), default=None)
        counter = self._counters.pop(key, 0.0)
        if key not in self._active and least is not None:
            counter = max(counter, least)
        ahead = 0.0 if least is None else max(0.0, counter - least)
        self._active[key] = self._active.get(key, 0) + 1
        self._counters[key] = counter + INPUT_WEIGHT * prompt_tokens
        return int(ahead / self._quantum)

    def serve(self, key: str, tokens: int) -> None:
        """So many tokens were generated for it."""
        self._counters[key] += OUTPUT_WEIGHT * tokens

    def leave(self, key: str) -> None:
        """One of its requests has ended."""
        if self._active[key] > 1:
            self._active[key] -= 1
            return
        del self._active[key]
        if not self._active:
            self._counters.clear()  # nobody waits for anybody
        elif len(self._counters) > KEYS_MOST:
            idle = (other for other in self._counters if other not in self._active)
            del self._counters[next(idle)]

"""What came of the router's predictions: how many times as long as predicted, counted by size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import HistogramMetricFamily

from serving.metrics import Tally

if TYPE_CHECKING:
    from scheduler.placing import Placement

BUCKETS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
FEW = 8  # tokens of a choice after its first, below which its pace is chance


class Beliefs:
    """Of attempts that a policy with predictions has placed: TTFT, and TPOT of those that began."""

    def __init__(self) -> None:
        self.ttft = Tally(BUCKETS)
        self.tpot = Tally(BUCKETS)

    def first(self, placement: Placement, now: float) -> None:
        """Its first token is here, whatever it was placed for."""
        price = placement.chosen.price
        if price and placement.queued and price.ttft > 0:
            self.ttft.add((now - placement.at) / price.ttft)

    def end(self, placement: Placement, now: float) -> None:
        """It is over, or goes on elsewhere."""
        price, each = placement.chosen.price, placement.given / placement.demand.choices
        if price and not placement.ended and each >= FEW and price.tpot > 0:
            self.tpot.add((now - placement.began) / each / price.tpot)

    def metric(self) -> HistogramMetricFamily:
        found = HistogramMetricFamily(
            "motley_route_prediction_ratio",
            "What a route took, as a multiple of what was predicted when it was chosen.",
            labels=("what",),
        )
        self.ttft.show(found, "ttft")
        self.tpot.show(found, "tpot")
        return found

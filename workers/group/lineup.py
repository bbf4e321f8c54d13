"""Who of those that are there becomes a rank, and of how much: the plan, applied."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from workers.group.partition import Share, most_ranks, partition
from workers.group.plan import choose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.models import ModelShape
    from workers.group.leader import Member
    from workers.group.partition import Mode
    from workers.group.plan import Box, Demand

logger = logging.getLogger(__name__)


class Offer(NamedTuple):
    """What rank 0 or a member brings: a weight that the operator chose, or what was measured."""

    weight: float | None
    box: Box | None


class Lineup(NamedTuple):
    """A formation to be: members from rank 1 on, and every rank's share."""

    members: list[Member]
    shares: tuple[Share, ...]


def line_up(demand: Demand, mode: Mode, own: Offer, members: Sequence[Member]) -> Lineup:
    """By the weights, if any was given; else by the plan, which may leave members out as spares.

    In `exact` mode, of which nothing was measured, only the rates' proportions count. Raises
    SetupError if the model cannot be cut so, or does not fit.
    """
    offers = [own, *(Offer(member.hello.weight, member.hello.box) for member in members)]
    boxes = [offer.box for offer in offers if offer.box]
    if len(boxes) < len(offers):
        weights = [1.0 if offer.weight is None else offer.weight for offer in offers]
        return _all(demand.shape, mode, weights, members)
    if mode == "exact":
        return _all(demand.shape, mode, [box.weights_per_s for box in boxes], members)
    plan = choose(demand, boxes).plan
    taken = [member for member in members if member.hello.name not in plan.left_out]
    for rank in plan.ranks:
        logger.info("rank %s takes %.1f %% of the model", rank.name, 100 * rank.part)
    logger.info(
        "predicted: %.1f ms a token, bound by %s of rank %s, sums take %.1f ms",
        1000 * plan.token_s,
        plan.bound,
        plan.slowest,
        1000 * plan.sums_s,
    )
    for name in plan.left_out:
        logger.warning("rank %s would make every token slower: it stays as a spare", name)
    return Lineup(taken, tuple(rank.share for rank in plan.ranks))


def _all(
    shape: ModelShape, mode: Mode, weights: Sequence[float], members: Sequence[Member]
) -> Lineup:
    """Everybody, or the first of them if they are more than the model has parts."""
    most = most_ranks(shape, mode)
    for member in members[most - 1 :]:
        logger.warning(
            "rank %s stays as a spare: this model has parts for %d", member.hello.name, most
        )
    return Lineup(list(members[: most - 1]), partition(shape, weights[:most], mode))

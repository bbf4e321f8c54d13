"""A plan beside the workers that have joined: which column each is a replica of."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scheduler.shares import Allowance, Planned

if TYPE_CHECKING:
    from scheduler.messages import Join
    from scheduler.plan_file import PlanFile

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LivePlan:
    """The allowances of one router."""

    plan: PlanFile
    _columns: dict[str, Allowance] = field(init=False)
    _others: dict[str, Allowance] = field(init=False)  # by model: of who is in no column

    def __post_init__(self) -> None:
        planned = self.plan.planned()
        self._columns = {name: Allowance(each) for name, each in planned.items()}
        prices: dict[str, float] = {}
        for name, column in self.plan.columns.items():
            prices[column.model] = max(prices.get(column.model, 0.0), planned[name].price)
        self._others = {model: Allowance(Planned(price)) for model, price in prices.items()}

    def allowance(self, join: Join) -> Allowance | None:
        """Of the column that a worker names; else of the only one of its model and role.

        Who is in no column is for what the others cannot do in time. None: a model without a plan.
        """
        columns = self.plan.columns
        named = columns.get(join.kind)
        if named and (named.model, named.role) == (join.model, join.role):
            return self._columns[join.kind]
        like = [n for n, c in columns.items() if (c.model, c.role) == (join.model, join.role)]
        if len(like) == 1 and not join.kind:
            return self._columns[like[0]]
        if join.model in self._others:
            logger.warning("worker %s is in no column of the plan (--kind)", join.name)
        return self._others.get(join.model)

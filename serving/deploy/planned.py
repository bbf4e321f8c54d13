"""The workers that a plan wants: on this machine, and on others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scheduler.messages import Address, Role
    from scheduler.plan_file import PlanFile


class Wanted(NamedTuple):
    """Workers alike, `name`-0 and so on, each of so many ranks."""

    name: str
    model: tuple[str, str]  # name, location
    role: Role
    replicas: int
    kind: str = ""  # the plan's column
    ranks: int = 1


def located(plan: PlanFile, texts: list[str]) -> dict[str, str]:
    """What to look for by each model's name. Raises SetupError for a model the plan has not."""
    found = {column.model: column.model for column in plan.columns.values()}
    for text in texts:
        name, equals, _ = text.partition("=")
        if not equals or name not in found:
            known = ", ".join(sorted(found))
            raise SetupError(f"{text}: write NAME=MODEL for a model of the plan: {known}")
        found[name] = text
    return found


def wanted_here(
    plan: PlanFile, here: tuple[str, ...] | None, models: Mapping[str, str]
) -> tuple[Wanted, ...]:
    """The plan's workers of this machine. `models`: locations by name. Raises SetupError."""
    gpus = {column.gpu for column in plan.columns.values()}
    if unknown := set(here or ()) - gpus:
        raise SetupError(f"--here {unknown.pop()}: the plan has {', '.join(sorted(gpus))}")
    return tuple(
        Wanted(
            worker_name(name),
            (column.model, models[column.model]),
            column.role,
            plan.replicas[name],
            kind=name,
            ranks=column.gpus,
        )
        for name, column in plan.columns.items()
        if plan.replicas.get(name) and (here is None or column.gpu in here)
    )


def commands_elsewhere(plan: PlanFile, here: tuple[str, ...] | None, cluster: Address) -> list[str]:
    """What starts the plan's other workers, a line each with how many of them."""
    return [
        f"{plan.replicas[name]} × {column.gpu}: motley worker {column.model} --role {column.role} "
        f"--kind '{name}' --join {cluster.host}:{cluster.port}"
        for name, column in plan.columns.items()
        if plan.replicas.get(name) and here is not None and column.gpu not in here
    ]


def worker_name(column: str) -> str:
    """A column's name as one word."""
    return re.sub(r"[^\w.]+", "-", column)

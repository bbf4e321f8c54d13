"""What `motley plan --output` wrote, as those read it who carry it out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import msgspec

from scheduler.capacity import Slo
from scheduler.errors import SetupError
from scheduler.messages import Role
from scheduler.shares import Planned, PlannedBucket, planned

if TYPE_CHECKING:
    from pathlib import Path

Count = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1 + 1e-6)]
Price = Annotated[float, msgspec.Meta(ge=0)]


class PlanColumn(msgspec.Struct, frozen=True):
    """One kind of worker: `price` in $/h of a replica, of `gpus` GPUs."""

    model: str
    role: Role
    gpu: str
    gpus: Annotated[int, msgspec.Meta(ge=1)]
    price: Price


class PlanBucket(msgspec.Struct, frozen=True):
    """Mean tokens in and out, and requests/s."""

    name: str
    model: str
    input: float
    output: float
    rate: Annotated[float, msgspec.Meta(ge=0)]


class PlanFile(msgspec.Struct, frozen=True):
    """A plan of a service; one of a problem file has neither columns nor buckets nor SLOs."""

    replicas: dict[str, Count]
    routing: dict[str, dict[str, Share]] = {}
    columns: dict[str, PlanColumn] = {}
    buckets: tuple[PlanBucket, ...] = ()
    slo: dict[str, Slo] = {}  # by model

    def planned(self) -> dict[str, Planned]:
        """What routing wants of each column."""
        return planned(
            [PlannedBucket(b.name, b.model, b.input, b.rate) for b in self.buckets],
            self.routing,
            {name: (column.model, column.price) for name, column in self.columns.items()},
        )


def read_plan(option: str, path: Path) -> PlanFile:
    """Raises SetupError naming option, file and field."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=PlanFile)
    except OSError as error:
        raise SetupError(f"{option} {path}: {error}") from None
    except msgspec.MsgspecError as error:
        said = str(error).replace("`$.", "`")
        raise SetupError(f"{option} {path}: no plan: {said}") from None


def read_deployable(option: str, path: Path) -> PlanFile:
    """A plan that says what its workers are. Raises SetupError."""
    plan = read_plan(option, path)
    if not plan.columns:
        raise SetupError(
            f"{option} {path}: it says nothing of its workers; plan a service, not a problem file"
        )
    for name in plan.replicas:
        if name not in plan.columns:
            raise SetupError(f"{option} {path}: columns: {name!r} is missing; plan it anew")
    for model, slo in plan.slo.items():
        for field in ("ttft_ms", "tpot_ms"):
            if not (math.isfinite(value := getattr(slo, field)) and value > 0):
                raise SetupError(f"{option} {path}: slo.{model}.{field}: {value:g} is not above 0")
    return plan

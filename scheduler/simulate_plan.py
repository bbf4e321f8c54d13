"""From a plan and its service to the workers that are simulated."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import msgspec

from scheduler.capacity import Slo
from scheduler.cost import LINK_BYTES_S, STEP_TOKENS, CostModel, of_rates
from scheduler.cost_fit import of_profile
from scheduler.errors import SetupError
from scheduler.hardware import convert
from scheduler.measured import read_worker_profile
from scheduler.messages import Rates, Role
from scheduler.planner_columns import step_profile
from scheduler.profiles import Bounds
from scheduler.shares import Planned, PlannedBucket, planned
from scheduler.simulate_spec import WorkerSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scheduler.plan import Plan
    from scheduler.plan_file import PlanFile
    from scheduler.planner_columns import Built
    from scheduler.service_file import Service

NATIVE = Bounds(STEP_TOKENS, 64, 16384)  # the native engine's defaults


def plan_workers(
    service: Service, built: Built, plan: Plan | PlanFile
) -> dict[str, list[WorkerSpec]]:
    """By model of the service. Raises SetupError for a plan of another service."""
    columns = {column.name: column for column in built.problem.columns}
    demands = {demand.name: demand for demand in service.demands}
    found: dict[str, list[WorkerSpec]] = {demand.name: [] for demand in service.demands}
    if unknown := [name for name in plan.replicas if name not in columns]:
        raise SetupError(f"replicas.{unknown[0]}: the service has no such column; plan it anew")
    due = planned_shares(service, built, plan.routing)
    for name, count in plan.replicas.items():
        column = columns[name]
        demand = demands[column.model]
        gpu = service.catalogue.gpus[column.gpu]
        profile = step_profile(service, demand, gpu, column.gpus)
        bounds = profile.bounds
        cost = of_profile(
            profile,
            kv_token_bytes=demand.model.kv_token_bytes(1),
            link_bytes_s=gpu.network * 1e9 * column.gpus,
        )
        found[column.model] += [
            WorkerSpec(
                name=f"{name} #{number}",
                role=column.role,
                cost=cost,
                kv_tokens=bounds.kv(demand.model.kv_tokens(gpu, column.gpus)),
                kind=name,
                max_step_tokens=bounds.step_tokens,
                max_sequences=bounds.sequences,
                plan=due[name],
            )
            for number in range(count)
        ]
    return found


def planned_shares(
    service: Service, built: Built, routing: Mapping[str, Mapping[str, float]]
) -> dict[str, Planned]:
    """What routing wants of each column, at the service's rates."""
    buckets = [
        PlannedBucket(bucket.name, demand.name, bucket.size[0], bucket.rate)
        for demand in service.demands
        for bucket in demand.workload.buckets
    ]
    columns = {column.name: (column.model, column.price) for column in built.problem.columns}
    return planned(buckets, routing, columns)


class _Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The coefficients of `CostModel`, in seconds."""

    step: float
    token: float
    attend: float = 0.0
    sequence: float = 0.0
    context: float = 0.0


class _Workers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`count` alike: a `motley profile`'s file, the coefficients of `cost`, or two rates.

    What a profile says goes before what is left out here.
    """

    role: Role
    count: int = 1
    kind: str = ""
    profile: str = ""
    cost: _Cost | None = None
    prefill_tokens_per_s: float = 0.0
    decode_s_per_token: float = 0.0
    kv_tokens: int = 0
    kv_token_bytes: float = 0.0
    link_bytes_s: float = LINK_BYTES_S
    max_step_tokens: int = 0
    max_sequences: int = 0


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    slo: Slo
    worker: tuple[_Workers, ...]


def read_workers(path: Path) -> tuple[list[WorkerSpec], Slo]:
    """A workers file (TOML): `[slo]` and `[[worker]]`. Raises SetupError naming the field."""
    try:
        file = convert(tomllib.loads(path.read_text(encoding="utf-8")), _File, "workers")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, SetupError) as error:
        raise SetupError(f"{path}: {error}") from None
    found: list[WorkerSpec] = []
    for at, each in enumerate(file.worker):
        kind = each.kind or f"{each.role}"
        cost, bounds = _cost(each, path, at)
        found += [
            WorkerSpec(
                name=f"{kind} {at}.{number}",
                role=each.role,
                cost=cost,
                kv_tokens=each.kv_tokens or bounds.kv(0),
                kind=kind,
                max_step_tokens=each.max_step_tokens or bounds.step_tokens,
                max_sequences=each.max_sequences or bounds.sequences,
            )
            for number in range(each.count)
        ]
    return found, file.slo


def _cost(each: _Workers, path: Path, at: int) -> tuple[CostModel, Bounds]:
    """And the bounds of an engine about which nothing else is said."""
    measured = each.prefill_tokens_per_s > 0 and each.decode_s_per_token > 0
    if measured + (each.cost is not None) + bool(each.profile) != 1:
        raise SetupError(
            f"{path}: worker[{at}]: give just one of profile, cost, or prefill_tokens_per_s with "
            "decode_s_per_token"
        )
    if each.profile:
        profile = read_worker_profile(path.parent / each.profile)
        return msgspec.structs.replace(profile.cost, link_bytes_s=each.link_bytes_s), profile.bounds
    if each.cost is None:
        rates = Rates(each.prefill_tokens_per_s, each.decode_s_per_token)
        return of_rates(rates, each.kv_token_bytes, each.link_bytes_s), NATIVE
    cost = each.cost
    line = CostModel(
        step=cost.step,
        token=cost.token,
        attend=cost.attend,
        sequence=cost.sequence,
        context=cost.context,
        provenance="assumed",
        kv_token_bytes=each.kv_token_bytes,
        link_bytes_s=each.link_bytes_s,
    )
    return line, NATIVE

"""From a plan and its service to the workers that are simulated."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import msgspec

from scheduler.capacity import MOST_SEQUENCES, Slo
from scheduler.cost import LINK_BYTES_S, STEP_TOKENS, CostModel, of_rates
from scheduler.cost_fit import of_profile
from scheduler.errors import SetupError
from scheduler.hardware import convert
from scheduler.messages import Rates, Role
from scheduler.planner_columns import step_profile
from scheduler.simulate_spec import WorkerSpec

if TYPE_CHECKING:
    from pathlib import Path

    from scheduler.planner_columns import Built
    from scheduler.service_file import Service

PLAN_STEP_TOKENS = 2048  # of a GPU's engine: a prompt in few pieces, as its capacity was reckoned


def plan_workers(
    service: Service, built: Built, replicas: dict[str, int]
) -> dict[str, list[WorkerSpec]]:
    """By model of the service. Raises SetupError for a plan of another service."""
    columns = {column.name: column for column in built.problem.columns}
    demands = {demand.name: demand for demand in service.demands}
    found: dict[str, list[WorkerSpec]] = {demand.name: [] for demand in service.demands}
    for name, count in replicas.items():
        if name not in columns:
            raise SetupError(f"replicas.{name}: the service has no such column; plan it anew")
        column = columns[name]
        demand = demands[column.model]
        gpu = service.catalogue.gpus[column.gpu]
        cost = of_profile(
            step_profile(service, demand, gpu, column.gpus),
            kv_token_bytes=demand.model.kv_token_bytes(1),
            link_bytes_s=gpu.network * 1e9 * column.gpus,
        )
        found[column.model] += [
            WorkerSpec(
                name=f"{name} #{number}",
                role=column.role,
                cost=cost,
                kv_tokens=demand.model.kv_tokens(gpu, column.gpus),
                kind=name,
                max_step_tokens=PLAN_STEP_TOKENS,
                max_sequences=MOST_SEQUENCES,
            )
            for number in range(count)
        ]
    return found


class _Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The coefficients of `CostModel`, in seconds."""

    step: float
    token: float
    attend: float = 0.0
    sequence: float = 0.0
    context: float = 0.0


class _Workers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`count` alike: either the coefficients of `cost`, or the two measured rates."""

    role: Role
    count: int = 1
    kind: str = ""
    cost: _Cost | None = None
    prefill_tokens_per_s: float = 0.0
    decode_s_per_token: float = 0.0
    kv_tokens: int = 16384
    kv_token_bytes: float = 0.0
    link_bytes_s: float = LINK_BYTES_S
    max_step_tokens: int = STEP_TOKENS
    max_sequences: int = 64


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
        found += [
            WorkerSpec(
                name=f"{kind} {at}.{number}",
                role=each.role,
                cost=_cost(each, f"{path}: worker[{at}]"),
                kv_tokens=each.kv_tokens,
                kind=kind,
                max_step_tokens=each.max_step_tokens,
                max_sequences=each.max_sequences,
            )
            for number in range(each.count)
        ]
    return found, file.slo


def _cost(each: _Workers, where: str) -> CostModel:
    measured = each.prefill_tokens_per_s > 0 and each.decode_s_per_token > 0
    if measured == (each.cost is not None):
        raise SetupError(f"{where}: give cost, or prefill_tokens_per_s and decode_s_per_token")
    if each.cost is None:
        rates = Rates(each.prefill_tokens_per_s, each.decode_s_per_token)
        return of_rates(rates, each.kv_token_bytes, each.link_bytes_s)
    cost = each.cost
    return CostModel(
        step=cost.step,
        token=cost.token,
        attend=cost.attend,
        sequence=cost.sequence,
        context=cost.context,
        provenance="assumed",
        kv_token_bytes=each.kv_token_bytes,
        link_bytes_s=each.link_bytes_s,
    )

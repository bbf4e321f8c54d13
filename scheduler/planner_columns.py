"""From a service to a problem: every way to run a replica, and what it sustains at each size.

What is known best counts: a benchmark of this model on this hardware, then step times that were
measured or fitted, then the roofline. Left out are tensor-parallel degrees that a node cannot be
filled with, shards whose memory does not hold the weights, and markets without a price. PP is 1: it
is what the native engine runs.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from scheduler.aiconfigurator import table_profile
from scheduler.capacity import Capacity, Slo, capacity
from scheduler.cost import Provenance
from scheduler.messages import Role
from scheduler.planner_model import Options
from scheduler.problem import Bucket, Column, Problem, WholeNodes, check
from scheduler.profile_import import Imported, read_profile
from scheduler.roofline import roofline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scheduler.hardware import Gpu, Offer
    from scheduler.profiles import Profile
    from scheduler.service_file import Demand, Key, Service

MOST_MISSES = 0.5  # that may be planned for: beyond, head-room for chance would be less than none
PLACES = 16.0  # assumed of a benchmark that does not say how many requests were under way


class Facts(msgspec.Struct, frozen=True):
    """Where a column's numbers come from: of its capacity, and of its price."""

    provenance: Provenance
    source: str
    price: Provenance
    priced: str  # source and date
    extrapolated: tuple[str, ...] = ()  # buckets outside what was measured


class Built(NamedTuple):
    problem: Problem
    options: Options
    facts: dict[str, Facts]  # by column


def build(service: Service, previous: dict[str, int] | None = None) -> Built:
    """Raises SetupError of the files that the service names."""
    imported = _imported(service)
    columns: list[Column] = []
    facts: dict[str, Facts] = {}
    for demand, offer, tp in _candidates(service):
        gpu = service.catalogue.gpus[offer.gpu]
        for role in service.choices.roles:
            made = _column(service, demand, gpu, offer, tp, role, imported)
            if made:
                columns.append(made[0])
                facts[made[0].name] = made[1]
    used = {column.gpu for column in columns}
    problem = Problem(
        buckets=tuple(
            Bucket(bucket.name, demand.name, bucket.rate)
            for demand in service.demands
            for bucket in demand.workload.buckets
        ),
        columns=tuple(columns),
        limits=tuple(limit for limit in service.limits if limit.gpu in used),
        nodes=tuple(
            WholeNodes(o.gpu, o.market, o.region, o.whole, o.whole * o.price)
            for o in service.catalogue.offers
            if o.whole and o.gpu in used
        ),
    )
    check(problem)
    return Built(problem, _options(service, previous or {}), facts)


def _options(service: Service, previous: dict[str, int]) -> Options:
    choices = service.choices
    return Options(
        spare=choices.spare,
        on_demand=choices.on_demand,
        previous=previous,
        switching=choices.switching,
        time_limit=choices.time_limit,
        gap=choices.gap,
    )


def _imported(service: Service) -> dict[Key, Imported]:
    slos = {demand.name: demand.slo for demand in service.demands}
    return {
        (each.model, each.gpu, each.tp): read_profile(
            service.folder / each.file,
            each.format,
            each.key or each.gpu,
            slos[each.model],
            (each.input_edges, each.output_edges) if each.input_edges else None,
        )
        for each in service.profiles
        if each.format != "motley"
    }


def _candidates(service: Service) -> Iterator[tuple[Demand, Offer, int]]:
    for demand in service.demands:
        for offer in service.catalogue.offers:
            if service.choices.gpus and offer.gpu not in service.choices.gpus:
                continue
            node = offer.whole or service.catalogue.gpus[offer.gpu].node
            for tp in service.choices.tp:
                if node % tp == 0 and demand.model.heads % tp == 0:
                    yield demand, offer, tp


def _column(
    service: Service,
    demand: Demand,
    gpu: Gpu,
    offer: Offer,
    tp: int,
    role: Role,
    imported: dict[Key, Imported],
) -> tuple[Column, Facts] | None:
    """None where the memory does not hold the model, or no bucket's SLO can be met."""
    table = imported.get((demand.name, gpu.name, tp)) if role is Role.MIXED else None
    steps = step_profile(service, demand, gpu, tp)
    kv_tokens = steps.bounds.kv(demand.model.kv_tokens(gpu, tp))
    capacities: dict[str, Capacity] = {}
    extrapolated = []
    for bucket in demand.workload.buckets:
        found = capacity(steps, role, kv_tokens, bucket.size, demand.slo)
        if table:
            known = table.rate(bucket.size)
            found = Capacity(known.rate, PLACES) if known else None
            if known and known.provenance == "modelled":
                extrapolated.append(bucket.name)
        if found and sum(bucket.size) <= demand.model.context:
            capacities[bucket.name] = found
    if not capacities:
        return None
    place = "".join(
        f" {part}" for part in (offer.market, offer.region) if part != "on-demand" and part
    )
    column = Column(
        name=f"{demand.name} {role} {gpu.name} x{tp}{place}",
        model=demand.name,
        gpu=gpu.name,
        gpus=tp,
        role=role,
        price=round(offer.price * tp, 9),
        capacity={name: each.rate for name, each in capacities.items()},
        market=offer.market,
        region=offer.region,
        link=_link(demand, gpu, tp, capacities) if role is not Role.MIXED else {},
        burst=_burst(demand, capacities) if service.choices.head_room else 0.0,
    )
    return column, Facts(
        provenance=table.provenance if table else steps.provenance,
        source=table.source if table else steps.source,
        price=offer.provenance,
        priced=f"{offer.source}, {offer.date}",
        extrapolated=tuple(extrapolated),
    )


def step_profile(service: Service, demand: Demand, gpu: Gpu, tp: int) -> Profile:
    """The first of: a measured worker, steps (the service's own before the shipped),
    aiconfigurator's tables, the roofline."""
    if measured := service.measured.get((demand.name, gpu.name, tp)):
        return measured
    for steps in service.catalogue.steps:
        if steps.model in (demand.name, demand.model.name) and (steps.gpu, steps.tp) == (
            gpu.name,
            tp,
        ):
            return steps
    tables = service.tables.get(demand.name)
    known = table_profile(tables.path, gpu.name, tp, tables.backend) if tables else None
    return known or roofline(demand.model, gpu, tp)


def _link(demand: Demand, gpu: Gpu, tp: int, capacities: dict[str, Capacity]) -> dict[str, float]:
    """requests/s whose prompts' KV caches the replica's network carries."""
    rate = gpu.network * 1e9 * tp / demand.model.kv_token_bytes(1)  # tokens/s
    return {
        bucket.name: rate / bucket.size[0]
        for bucket in demand.workload.buckets
        if bucket.name in capacities
    }


def _burst(demand: Demand, capacities: dict[str, Capacity]) -> float:
    """z·√(dispersion / places): what `head_room.usable` wants, at the mean of the places."""
    rates = {b.name: b.rate for b in demand.workload.buckets if b.name in capacities}
    places = sum(rates[name] * each.places for name, each in capacities.items()) / sum(
        rates.values()
    )
    z = NormalDist().inv_cdf(demand.slo.share)
    return z * math.sqrt(demand.workload.dispersion / places)


def with_slo(
    service: Service, *, ttft: float = 1.0, tpot: float = 1.0, misses: float = 1.0
) -> Service:
    """The same service with every SLO's limits, and the share that may miss them, multiplied."""

    def scaled(slo: Slo) -> Slo:
        return Slo(slo.ttft_ms * ttft, slo.tpot_ms * tpot, 1 - (1 - slo.share) * misses)

    return msgspec.structs.replace(
        service,
        demands=tuple(
            msgspec.structs.replace(demand, slo=scaled(demand.slo)) for demand in service.demands
        ),
    )

"""What a service file may not say, field by field. All raise SetupError that names the field."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scheduler.errors import SetupError
from scheduler.messages import Role
from scheduler.problem import MOST
from scheduler.simulate_load import parse_process

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.capacity import Slo
    from scheduler.hardware import Catalogue, Gpu, Model, Offer
    from scheduler.problem import Limit
    from scheduler.profiles import StepProfile
    from scheduler.service_file import Autoscaling, Choices, Size

MOST_TOKENS = 1e8  # of a request, on the mean


def check_slo(slo: Slo, where: str) -> None:
    positive(f"{where}.ttft_ms", slo.ttft_ms)
    positive(f"{where}.tpot_ms", slo.tpot_ms)
    if not 0.5 < slo.share < 1:
        raise SetupError(f"{where}.share: {slo.share:g} must be above 0.5 and below 1")


def check_sizes(sizes: Iterable[Size], where: str) -> None:
    total, seen = 0.0, set()
    for at, size in enumerate(sizes):
        for field in ("input", "output"):
            positive(f"{where}[{at}].{field}", getattr(size, field), MOST_TOKENS)
        positive(f"{where}[{at}].weight", size.weight)
        if (size.input, size.output) in seen:
            raise SetupError(f"{where}[{at}]: {size.input:g} in and {size.output:g} out, again")
        seen.add((size.input, size.output))
        total += size.weight
    if not abs(total - 1) <= 1e-6:
        raise SetupError(f"{where}: the weights sum to {total:g}, not to 1")


def check_choices(plan: Choices, catalogue: Catalogue, *, traced: bool) -> None:
    """`traced`: every model's workload is a trace."""
    for name in plan.gpus:
        catalogue.gpu(name, "plan.gpus")
    if not plan.tp or min(plan.tp) < 1:
        raise SetupError(f"plan.tp: {list(plan.tp)}: at least one degree, and none below 1")
    if Role.MIXED not in plan.roles and len(set(plan.roles)) < 2:
        raise SetupError("plan.roles: a plan needs mixed, or prefill and decode")
    if not 0 <= plan.on_demand <= 1:
        raise SetupError(f"plan.on_demand: {plan.on_demand:g} is not a share")
    if not 0 <= plan.gap < 1:
        raise SetupError(f"plan.gap: {plan.gap:g} is not a share, 0 or above and below 1")
    not_negative("plan.switching", plan.switching)
    positive("plan.time_limit", plan.time_limit)
    for process in plan.certify:
        try:
            parse_process(process)
        except SetupError as error:
            raise SetupError(f"plan.certify: {error}") from None
        if process == "trace" and not traced:
            raise SetupError("plan.certify: trace: not every model has one")


def check_autoscale(settings: Autoscaling) -> None:
    for field in ("window_s", "start_s", "hold_s", "horizon_s"):
        positive(f"autoscale.{field}", getattr(settings, field))
    for field in ("flip_s", "drain_s", "band"):
        not_negative(f"autoscale.{field}", getattr(settings, field))
    if not 0 < settings.cover < 1:
        raise SetupError(f"autoscale.cover: {settings.cover:g} must be above 0 and below 1")


def check_limits(limits: Iterable[Limit], catalogue: Catalogue) -> None:
    for at, limit in enumerate(limits):
        catalogue.gpu(limit.gpu, f"limit[{at}].gpu")
        if not 0 <= limit.gpus <= MOST:
            raise SetupError(f"limit[{at}].gpus: {limit.gpus} is not a number of GPUs")
        offers = [offer for offer in catalogue.offers if offer.gpu == limit.gpu]
        for field in ("market", "region"):
            asked, known = getattr(limit, field), {getattr(offer, field) for offer in offers}
            if asked is not None and asked not in known:
                raise SetupError(
                    f"limit[{at}].{field}: {asked!r}: {limit.gpu} is offered in "
                    f"{', '.join(map(repr, sorted(known))) or 'none'}"
                )


def check_hardware(gpus: Iterable[Gpu], offers: Iterable[Offer], catalogue: Catalogue) -> None:
    for gpu in gpus:
        for field in ("memory", "bandwidth", "tflops", "link", "network", "node"):
            positive(f"gpu.{gpu.name}.{field}", getattr(gpu, field))
    for at, offer in enumerate(offers):
        catalogue.gpu(offer.gpu, f"offer[{at}].gpu")
        positive(f"offer[{at}].price", offer.price)
        not_negative(f"offer[{at}].whole", offer.whole)


def check_shapes(shapes: Iterable[Model]) -> None:
    sizes = ("parameters", "layers", "hidden", "heads", "kv_heads", "head_dim", "context")
    for shape in shapes:
        for field in (*sizes, "weight_bytes", "kv_bytes"):
            positive(f"shape.{shape.name}.{field}", getattr(shape, field), math.inf)
        not_negative(f"shape.{shape.name}.active", shape.active)


def check_steps(steps: Iterable[StepProfile], catalogue: Catalogue) -> None:
    for at, step in enumerate(steps):
        catalogue.gpu(step.gpu, f"step[{at}].gpu")
        if step.tp < 1:
            raise SetupError(f"step[{at}].tp: {step.tp} is below 1")
        for field in ("prefill", "decode", "decode_large", "overhead"):
            for value in getattr(step, field) or ():
                not_negative(f"step[{at}].{field}", value)
        for field in ("prefill", "decode"):
            if not any(getattr(step, field)):
                raise SetupError(f"step[{at}].{field}: a step that takes no time")


def positive(field: str, value: float, most: float = MOST) -> None:
    if not (math.isfinite(value) and 0 < value <= most):
        above = f" up to {most:g}" if most < math.inf and value > most else ""
        raise SetupError(f"{field}: {value:g} is not a number above 0{above}")


def not_negative(field: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise SetupError(f"{field}: {value:g} is not a number of at least 0")

"""A plan and its reasons as tables that a person can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from scheduler.plan import shed_rate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from scheduler.certify import Certificate
    from scheduler.explain import Explanation, SloStep
    from scheduler.goodput import Found
    from scheduler.plan import Plan
    from scheduler.planner_columns import Facts
    from scheduler.problem import Problem
    from scheduler.suffice import Relaxed, Suffices

HOURS = 730  # of a month


def plan_tables(
    problem: Problem, plan: Plan, facts: dict[str, Facts] | None = None
) -> Iterator[RenderableType]:
    """The columns that run, then what is shed."""
    table = Table("replicas", "of", "$/h", "of the load", "capacity from", "price from")
    shares = _shares(problem, plan)
    for column in problem.columns:
        count = plan.replicas.get(column.name, 0)
        if not count:
            continue
        known = (facts or {}).get(column.name)
        table.add_row(
            str(count),
            column.name,
            f"{count * column.price:.2f}",
            f"{shares[column.name]:.0%}",
            f"{known.provenance}: {known.source}" if known else "the problem file",
            f"{known.price}: {known.priced}" if known else "the problem file",
        )
    yield table
    yield (
        f"{plan.cost:.2f} $/h ({plan.cost * HOURS:,.0f} $ a month), {plan.status}, at most "
        f"{plan.gap:.2%} above the least, found in {plan.seconds:.2f} s"
    )
    if plan.shed:
        rate = sum(bucket.rate for bucket in problem.buckets)
        yield f"shed: {shed_rate(problem, plan):.3g} of {rate:.3g} requests/s"
    for name, share in plan.shed.items():
        yield f"shed: {share:.1%} of {name}"
    for name in plan.replicas:
        if facts and facts[name].extrapolated:
            yield f"{name}: beyond what was measured at {', '.join(facts[name].extrapolated)}"


def _shares(problem: Problem, plan: Plan) -> dict[str, float]:
    """Of its model's requests, the share that each column sees."""
    asked: dict[str, float] = {}
    for bucket in problem.buckets:
        asked[bucket.model] = asked.get(bucket.model, 0.0) + bucket.rate
    shares = {column.name: 0.0 for column in problem.columns}
    for column in problem.columns:
        for bucket in problem.buckets:
            if bucket.model == column.model and asked[column.model]:
                part = plan.routing[bucket.name].get(column.name, 0.0)
                shares[column.name] += part * bucket.rate / asked[column.model]
    return shares


def certificate_lines(certificate: Certificate) -> Iterator[str]:
    """Attainment by model and process, and what the certificate cost."""
    for model, processes in certificate.attainment.items():
        for process, held in processes.items():
            yield (
                f"{model}, {process}: both limits met by {held.mean:.1%} "
                f"({held.low:.1%} to {held.high:.1%}, {held.runs} runs)"
            )
    said = f"{certificate.rounds} rounds, {certificate.seconds:.0f} s"
    if certificate.certified:
        yield f"certified, at a premium of {certificate.premium:.1%} ({said})"
    else:
        yield f"NOT certified: {certificate.reason} ({said})"


def explanation_lines(why: Explanation, plan: Plan) -> Iterator[str]:
    for each in why.binding:
        gain = f"saves {each.saving:.2f} $/h" if each.saving > 0 else ""
        gain = f"serves {each.served:.2f} requests/s more" if each.served > 0 else gain
        yield f"{each.limit}: {each.used} of {each.gpus} GPUs used; {each.more} more {gain}"
    if not why.binding:
        yield "no limit binds"
    for name in ("TTFT", "TPOT", "share") if plan.replicas else ():
        steps = [step for step in why.slo if step.limit == name]
        yield f"{_limit(name, steps[0].at)} now: " + "; ".join(_step(step) for step in steps)
    for bucket in why.unserved:
        need = (
            f"one alone needs TTFT {bucket.ttft_ms:.0f} ms and TPOT {bucket.tpot_ms:.0f} ms "
            f"on {bucket.on}"
            if bucket.on
            else "no memory holds it"
        )
        yield f"{bucket.bucket} ({bucket.size[0]:.0f} in, {bucket.size[1]:.0f} out): {need}"
    if why.suffices:
        yield from _ways(why.suffices)
    if not plan.replicas:
        return
    others = {"mixed workers only": why.mixed_only, "split workers only": why.split_only}
    others |= {f"{gpu} alone": cost for gpu, cost in why.one_gpu.items()}
    for other, cost in others.items():
        yield f"{other}: {_against(cost, plan.cost)}"


def _limit(name: str, value: float) -> str:
    return f"{value * 100:.4g} % in time" if name == "share" else f"{name} {value:.0f} ms"


def _step(step: SloStep) -> str:
    """What another limit costs or saves, or lets through; per ms where there are any."""
    to = _limit(step.limit, step.to)
    if step.served:
        kind = "more" if step.served > 0 else "fewer"
        cost = f" for {step.more:+.2f} $/h" if step.more else ""
        return f"{to} serves {abs(step.served):.2g} requests/s {kind}{cost}"
    if not step.more:
        return f"{to} costs the same"
    verb = "costs" if step.more > 0 else "saves"
    said = f"{to} {verb} {abs(step.more):.2f} $/h"
    if step.limit == "share":
        return said
    return f"{said} ({abs(step.more / (step.to - step.at)):.3f} per ms)"


def _ways(ways: Suffices) -> Iterator[str]:
    """The cheapest first; less of the rate is no way to serve it."""
    found = [
        (each.cost, " and ".join(_limit(name, _value(each, name)) for name in each.limits))
        for each in ways.relaxed
    ]
    if ways.cost is not None:
        more = ", ".join(f"{count} more {limit}" for limit, count in ways.gpus.items())
        found.append((ways.cost, more))
    for at, (cost, said) in enumerate(sorted(found)):
        cheapest = " (the cheapest)" if at == 0 and len(found) > 1 else ""
        yield f"to serve all: {said}: {cost:.2f} $/h in all{cheapest}"
    if ways.rate:
        yield f"as it is, {ways.rate:.0%} of the rate is served whole"
    elif not found:
        yield "no looser SLO, more GPUs or lower rate serves all"


def _value(each: Relaxed, name: str) -> float:
    return each.ttft_ms if name == "TTFT" else each.tpot_ms


def _against(other: float | None, cost: float) -> str:
    if other is None:
        return "cannot serve as much"
    return f"{other:.2f} $/h" + (f" ({other / cost - 1:+.0%})" if cost else "")


def goodput_table(found: list[Found], most: int = 8) -> Table:
    table = Table("prefill", "decode", "GPUs", "requests/s per GPU", "TTFT met", "TPOT met", "both")
    for each in found[:most]:
        shares = (
            [
                f"{share:.1%}"
                for share in (each.attained.ttft, each.attained.tpot, each.attained.joint)
            ]
            if each.attained
            else ["-"] * 3
        )
        table.add_row(
            str(each.prefill), str(each.decode), str(each.gpus), f"{each.rate_per_gpu:.3f}", *shares
        )
    return table

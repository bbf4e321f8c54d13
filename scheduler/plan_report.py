"""A plan and its reasons as tables that a person can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from scheduler.certify import Certificate
    from scheduler.explain import Explanation
    from scheduler.goodput import Found
    from scheduler.plan import Plan
    from scheduler.planner_columns import Facts
    from scheduler.problem import Problem

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
    for cost in why.slo:
        yield (
            f"{cost.limit}: {cost.looser_ms:.0f} ms more would save {cost.saving:.2f} $/h"
            f" ({cost.saving_per_ms:.3f} $/h per ms)"
        )
    for bucket in why.unserved:
        need = (
            f"one alone needs TTFT {bucket.ttft_ms:.0f} ms and TPOT {bucket.tpot_ms:.0f} ms "
            f"on {bucket.on}"
            if bucket.on
            else "no memory holds it"
        )
        yield f"{bucket.bucket} ({bucket.size[0]:.0f} in, {bucket.size[1]:.0f} out): {need}"
    if why.suffices:
        more = ", ".join(f"{count} more {limit}" for limit, count in why.suffices.gpus.items())
        yield (
            f"to serve all: {more or 'other limits'} ({why.suffices.cost:.2f} $/h in all), "
            f"or {why.suffices.rate:.0%} of the rate"
        )
    others = {"mixed workers only": why.mixed_only, "split workers only": why.split_only}
    others |= {f"{gpu} alone": cost for gpu, cost in why.one_gpu.items()}
    for name, other in others.items():
        yield f"{name}: {_against(other, plan.cost)}"


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

"""A simulation's answer as tables that a person can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from scheduler.simulate_command import Answer


def tables(name: str, answer: Answer) -> Iterator[RenderableType]:
    """Of one model: latencies of the first run, its workers by kind, then attainment over all."""
    first = answer.runs[0]
    yield f"{name}: {first.requests} requests at {answer.rate:.3g} a second"
    latencies = Table("ms", "p50", "p90", "p99", "limit", "met by")
    for label, values, limit, share in (
        ("TTFT", first.ttft_ms, answer.slo.ttft_ms, first.attainment_ttft),
        ("TPOT", first.tpot_ms, answer.slo.tpot_ms, first.attainment_tpot),
    ):
        numbers = (f"{value:.1f}" for value in (values.p50, values.p90, values.p99))
        latencies.add_row(label, *numbers, f"{limit:g}", f"{share:.1%}")
    yield latencies
    kinds = Table("workers", "of", "prefills", "decodes", "busy")
    for kind, each in first.kinds.items():
        shares = (f"{share:.0%}" for share in (each.prefilled, each.decoded, each.utilisation))
        kinds.add_row(str(each.workers), kind, *shares)
    yield kinds
    attained = answer.attainment
    yield (
        f"both limits met by {attained.mean:.1%} ({attained.low:.1%} to {attained.high:.1%}), "
        f"asked for: {answer.slo.share:.0%}; {first.refused} refused, "
        f"{first.preempted} preemptions, {first.transferred_gb:.1f} GB handed over"
    )
    if answer.goodput is not None:
        yield f"goodput: {answer.goodput:.3g} requests/s"
    yield f"{attained.runs} runs, {answer.seconds:.1f} s"

"""A day under several policies as tables that a person can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from scheduler.compare_day import FORESIGHT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from scheduler.compare_day import Change, Comparison


def shown(answer: Comparison, *, decisions: bool) -> Iterator[RenderableType]:
    """The policies beside each other, what the forecasts were worth, then every change."""
    bound = answer.days[FORESIGHT].dollars
    table = Table("policy", "$", "of foresight", "GPU h", "both met", "worst hour", "switches")
    for name, day in answer.days.items():
        actions = ", ".join(f"{count} {action}" for action, count in sorted(day.switches.items()))
        table.add_row(
            name,
            f"{day.dollars:.2f}",
            f"{day.dollars / bound:.2f}" if bound else "",
            f"{day.gpu_hours:.1f}",
            f"{day.attainment:.1%}",
            f"{day.worst_hour:.1%}",
            f"{sum(day.switches.values())}" + (f" ({actions})" if actions else ""),
        )
    yield table
    requests = next(iter(answer.days.values())).requests
    yield (
        f"{requests:,} requests, {answer.rate:.3g} a second on the mean; asked for: "
        f"{answer.share:.0%} within both limits; {answer.seconds:.0f} s"
    )
    for name, told in answer.forecasts.items():
        sources = ", ".join(f"{source} {count}" for source, count in told.sources.items())
        yield (
            f"{name}: forecasts were off by {told.error:.1%} on the mean (the last window: "
            f"{told.naive:.1%}) and covered {told.covered:.0%} of the windows; from: {sources}"
        )
    if decisions:
        yield _changes(answer.changes)


def _changes(changes: list[Change]) -> Table:
    table = Table("hour", "why", "$/h", "steps", "replicas")
    for change in changes:
        table.add_row(
            f"{change.at / 3600:.2f}",
            change.reason,
            f"{change.cost:.2f}",
            ", ".join(f"{count} {action}" for action, count in change.steps.items()),
            ", ".join(f"{count} {column}" for column, count in change.replicas.items()),
        )
    return table

"""A search's report as a page: attainment against rate, and against the scale of the SLO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest import page as frame
from loadtest.console import check_text
from loadtest.plots import Mark, Series, chart

if TYPE_CHECKING:
    from loadtest.probing import Measured, SearchReport

_SHARES = (0.0, 1.02)


def page(report: SearchReport) -> str:
    ordered = sorted(report.measured, key=lambda measured: measured.probe.rate)
    capacity = report.capacity
    figure = "none" if capacity is None else f"{capacity:.3g}/s"
    return frame.page(
        f"{report.spec.endpoint.model}: {figure} within the SLO",
        [
            _head(report, figure),
            frame.charts(_charts(report, ordered)),
            _probes(ordered),
            frame.facts(
                "Conditions",
                [
                    ("Endpoint", f"{report.spec.endpoint.model} at {report.spec.endpoint.url}"),
                    ("Load", report.load),
                    ("SLO", "; ".join(f"{g.name}: {g.slo}" for g in report.spec.classes)),
                    ("Seed", str(report.spec.seed)),
                    ("Schema", report.schema),
                ],
            ),
        ],
    )


def _head(report: SearchReport, figure: str) -> str:
    if report.failed is None:
        bracket = "no rate that was tried has failed"
    elif report.held is None:
        bracket = f"even {report.failed:.3g}/s fails"
    else:
        bracket = f"holds at {report.held:.3g}/s, fails at {report.failed:.3g}/s"
    return frame.hero(
        [("VALID" if report.valid else "INVALID", report.valid)],
        figure,
        f"highest rate at which {report.share * 100:g} % of requests meet their SLO; {bracket}",
        f"{report.spec.endpoint.model} at {report.spec.endpoint.url}",
    )


def _charts(report: SearchReport, ordered: list[Measured]) -> list[str]:
    probes = [measured.probe for measured in ordered]
    nearest = max(
        (m for m in ordered if m.probe.held), key=lambda m: m.probe.rate, default=ordered[0]
    )
    target = Mark(f"{report.share * 100:g} %", y=report.share)
    return [
        chart(
            "Attainment against rate",
            [
                Series("requests within SLO", [(p.rate, p.share) for p in probes], 1, dots=True),
                Series("95 % interval", [(p.rate, p.low) for p in probes], 2),
                Series("", [(p.rate, p.high) for p in probes], 2),
            ],
            x=lambda rate: f"{rate:.3g}/s",
            y=lambda share: f"{share:.0%}",
            x_log=True,
            y_range=_SHARES,
            marks=[target],
        ),
        chart(
            f"Attainment if the SLO were scaled, at {nearest.probe.rate:.3g}/s",
            [Series("requests within", nearest.scales, 3, dots=True)],
            x=lambda scale: f"× {scale:g}",
            y=lambda share: f"{share:.0%}",
            x_log=True,
            y_range=_SHARES,
            marks=[target, Mark("as asked", x=1.0)],
        ),
    ]


def _probes(ordered: list[Measured]) -> str:
    rows = []
    for measured in ordered:
        probe = measured.probe
        broken = [check_text(check) for check in measured.checks if not check.ok]
        rows.append(
            (
                f"{probe.rate:.4g}/s",
                "holds" if probe.held else "fails",
                f"{probe.share:.2%}",
                f"{probe.low:.1%} – {probe.high:.1%}",
                str(probe.scheduled),
                "interval" if probe.decided else "share only",
                "; ".join(broken) or "valid",
            )
        )
    head = ("rate", "", "within SLO", "95 % interval", "requests", "decided by", "client")
    return frame.table("Probes", head, rows)

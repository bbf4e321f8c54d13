"""A run's report as a page to look at and to share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest import page as frame
from loadtest.console import NAMES, check_text
from loadtest.plots import Band, Mark, Series, chart
from loadtest.units import seconds_text

if TYPE_CHECKING:
    from loadtest.histogram import Histogram
    from loadtest.report import Report

_SHARES = (0.0, 1.02)


def page(report: Report) -> str:
    return frame.page(
        f"{report.spec.endpoint.model}: {report.share:.1%} of requests within their SLO",
        [
            _head(report),
            _tiles(report),
            frame.charts(_charts(report)),
            _faults(report),
            _classes(report),
            _latencies(report),
            _errors(report),
            _checks(report),
            _conditions(report),
        ],
    )


def _head(report: Report) -> str:
    verdicts = [("VALID" if report.valid else "INVALID", report.valid)]
    verdicts.append(("SLO MET" if report.attained else "SLO MISSED", report.attained))
    if report.faults is not None:
        kept = report.faults.integrity.ok
        verdicts.append(("EACH TOKEN ONCE" if kept else "TOKENS LOST OR REPEATED", kept))
    if report.valid:
        groups = report.classes
        what = f"asked: {groups[0].slo}" if len(groups) == 1 else f"{len(groups)} SLO classes"
        caption = f"of {report.totals.scheduled} scheduled requests met their SLO ({what})"
    else:
        reasons = "; ".join(check_text(check) for check in report.checks if not check.ok)
        caption = f"Do not use these figures: {reasons}"
    detail = f"{report.spec.endpoint.model} at {report.spec.endpoint.url}, {report.load}"
    return frame.hero(verdicts, f"{report.share:.1%}", caption, detail)


def _tiles(report: Report) -> str:
    totals, latencies = report.totals, report.latencies
    failed = totals.scheduled - totals.answered
    items = [
        (
            NAMES[key],
            seconds_text(latencies[key].p50),
            f"median; p99 {seconds_text(latencies[key].p99)}",
        )
        for key in ("ttft", "tpot", "e2e")
    ]
    items += [
        (
            "Goodput",
            f"{totals.goodput:.3g}/s",
            f"of {totals.asked_rate:.3g}/s asked, {totals.achieved_rate:.3g}/s sent",
        ),
        ("Output", f"{totals.output_rate:.3g} tok/s", f"{totals.output_tokens:,} tokens in all"),
        ("Failed", f"{failed}", f"of {totals.scheduled} requests; they count as misses"),
    ]
    if totals.cost_per_million_output is not None:
        items.append(("Cost", f"{totals.cost_per_million_output:.3g}", "per million output tokens"))
    return frame.tiles(items)


def _charts(report: Report) -> list[str]:
    slo = report.classes[0].slo if len(report.classes) == 1 else None
    histograms = report.histograms
    ttft = [Mark("TTFT SLO", x=slo.ttft)] if slo and slo.ttft else []
    tpot = [Mark("TPOT SLO", x=slo.tpot)] if slo and slo.tpot else []
    return [
        chart(
            "TTFT: share of answered requests within",
            [
                Series("from schedule", _cdf(histograms["ttft"]), 1, steps=True),
                Series("from send", _cdf(histograms["ttft_from_send"]), 2, steps=True),
            ],
            x=seconds_text,
            y=_percent,
            x_log=True,
            y_range=_SHARES,
            marks=ttft,
        ),
        chart(
            "TPOT and ITL: share within",
            [
                Series("TPOT of requests", _cdf(histograms["tpot"]), 1, steps=True),
                Series("ITL per chunk", _cdf(histograms["itl_chunk"]), 2, steps=True),
            ],
            x=seconds_text,
            y=_percent,
            x_log=True,
            y_range=_SHARES,
            marks=tpot,
        ),
        *_timeline(report, slo.ttft if slo else None),
        chart(
            "Attainment if the SLO were scaled",
            [Series("requests within", report.scales, 3, dots=True)],
            x=lambda scale: f"× {scale:g}",
            y=_percent,
            x_log=True,
            y_range=_SHARES,
            marks=[Mark("as asked", x=1.0)],
        ),
        chart(
            "Schedule lag of the client: share within",
            [Series("", _cdf(histograms["lag"]), 4, steps=True)],
            x=seconds_text,
            y=_percent,
            x_log=True,
            y_range=_SHARES,
            marks=[Mark("limit", x=c.limit) for c in report.checks if "lag" in c.name],
        ),
    ]


def _timeline(report: Report, ttft: float | None) -> list[str]:
    windows = report.timeline
    busy = [window for window in windows if window.scheduled]
    bands = [Band(*window) for window in report.faults.plan.windows()] if report.faults else []
    return [
        chart(
            "Requests through time, per second",
            [
                Series("scheduled", [(w.at, w.scheduled / w.width) for w in windows], 1, True),
                Series("within SLO", [(w.at, w.met / w.width) for w in windows], 3, True),
            ],
            x=_seconds,
            y=_plain,
            bands=bands,
        ),
        chart(
            "TTFT through time",
            [
                Series("p99", [(w.at, w.ttft_p99) for w in busy], 2),
                Series("median", [(w.at, w.ttft_p50) for w in busy], 1),
            ],
            x=_seconds,
            y=seconds_text,
            marks=[Mark("SLO", y=ttft)] if ttft else [],
            bands=bands,
        ),
    ]


def _faults(report: Report) -> str:
    faults = report.faults
    if faults is None:
        return ""
    found = faults.integrity
    unbroken = (
        "" if faults.unbroken_share is None else f"; without them {faults.unbroken_share:.2%}"
    )
    return frame.table(
        "Attainment before, during and after the faults",
        ("", "requests", "met SLO", "95 % interval", "failed"),
        [
            (
                p.name,
                str(p.scheduled),
                f"{p.share:.2%}",
                f"{p.low:.1%} – {p.high:.1%}",
                str(p.failed),
            )
            for p in faults.phases
        ],
        note="; ".join(f"at {event.at:.2f} s {event.what}" for event in faults.events) + unbroken,
    ) + frame.facts(
        "Tokens: each once?",
        [
            ("answers compared with an unbroken run", str(found.compared)),
            (
                "with tokens lost / repeated / changed",
                f"{found.lost} / {found.repeated} / {found.changed}",
            ),
            ("shorter than asked / more chunks than tokens", f"{found.short} / {found.over}"),
            *(("example", example) for example in found.examples),
        ],
    )


def _classes(report: Report) -> str:
    return frame.table(
        "SLO classes",
        ("class", "SLO", "requests", "met", "95 % interval", "TTFT at share", "TPOT at share", ""),
        [
            (
                group.name,
                str(group.slo),
                str(group.scheduled),
                f"{group.share:.2%}",
                f"{group.low:.1%} – {group.high:.1%}",
                seconds_text(group.ttft),
                seconds_text(group.tpot),
                "met" if group.attained else "missed",
            )
            for group in report.classes
        ],
        note="Of all scheduled requests; refused, failed and unfinished ones are misses.",
    )


def _latencies(report: Report) -> str:
    rows = []
    for key, name in NAMES.items():
        q = report.latencies[key]
        values = (q.mean, q.p50, q.p90, q.p95, q.p99, q.max)
        rows.append((name, *(seconds_text(value) for value in values)))
    return frame.table(
        "Latencies of answered requests",
        ("", "mean", "p50", "p90", "p95", "p99", "max"),
        rows,
    )


def _errors(report: Report) -> str:
    return frame.table(
        "Errors",
        ("kind", "requests", "for example"),
        [(kind, str(found.count), found.example) for kind, found in report.errors.items()],
    )


def _checks(report: Report) -> str:
    return frame.facts(
        "May this run be believed?",
        [("✓ held" if check.ok else "✗ BROKEN", check_text(check)) for check in report.checks],
    )


def _conditions(report: Report) -> str:
    totals, client, realised = report.totals, report.client, report.realised
    sizes = f"{totals.input_tokens:,} in (asked {totals.asked_input_tokens:,}), "
    sizes += f"{totals.output_tokens:,} out (asked {totals.asked_output_tokens:,})"
    hits = f"{totals.prefix_hit_share:.1%} of prompt tokens"
    if totals.block_sharing:
        hits += f"; the trace's blocks allow {totals.block_sharing:.1%}"
    warmup = f"{report.spec.warmup:g} s left out"
    if report.warmup_detected:
        warmup += f"; the first {report.warmup_detected:.1f} s look like warm-up"
    return frame.facts(
        "Conditions",
        [
            ("Started", report.started),
            ("Load", report.load),
            (
                "Arrivals as they came",
                f"{realised.count}, {realised.rate:.4g}/s, CV {realised.cv:.3g}, "
                f"dispersion {realised.dispersion:.3g}",
            ),
            ("Tokens", sizes),
            ("Prefix cache hits", hits),
            ("Tokens behind the deadline line", f"{totals.late_token_share:.2%}"),
            ("Chunks that came in one read", f"{totals.coalesced_share:.2%}"),
            ("Warm-up", warmup),
            ("Seed", str(report.spec.seed)),
            (
                "Client",
                f"{client.system}, {client.cores} cores, Python {client.python}; "
                f"{client.cpu_seconds:.2f} CPU-s, {client.peak_rss / 1e6:.0f} MB, "
                f"{report.spec.processes} process(es)",
            ),
            ("Schema", report.schema),
        ],
    )


def _cdf(histogram: Histogram) -> list[tuple[float, float]]:
    """From 0 on, without the lowest hundredth, which would only stretch the axis."""
    points = [point for point in histogram.cdf() if point[1] > 0.01]
    return [(points[0][0] * 0.9, 0.0), *points] if points else []


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _seconds(value: float) -> str:
    return f"{value:g} s"


def _plain(value: float) -> str:
    return f"{value:g}"

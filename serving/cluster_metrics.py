"""The cluster's state for Prometheus, read from the members at each scrape."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from serving.gateway import Gateway
    from serving.members import Member, Members

RATE_PROMPT = 128  # tokens
_LABELS = ("worker", "model", "role")
# What a worker's heartbeat says: field of Load, kind of metric, what it means.
_LOAD = (
    ("running", GaugeMetricFamily, "Sequences in the running batch."),
    ("waiting", GaugeMetricFamily, "Sequences that wait for blocks or for their turn."),
    ("free_blocks", GaugeMetricFamily, "Blocks of KV cache that nobody holds."),
    ("steps", CounterMetricFamily, "Engine steps."),
    ("tokens", CounterMetricFamily, "Tokens drawn."),
    (
        "cancelled",
        CounterMetricFamily,
        "Jobs taken back: the client left, or they went on elsewhere.",
    ),
    (
        "cancel_steps_max",
        GaugeMetricFamily,
        "Most steps that ran between a cancel's arrival and its blocks being free.",
    ),
    ("tasks", GaugeMetricFamily, "Tasks of the worker's event loop."),
    ("preempted", CounterMetricFamily, "Sequences that gave their blocks to older ones."),
    ("kv_bytes_sent", CounterMetricFamily, "KV cache sent to other workers, in bytes."),
    ("drafted", CounterMetricFamily, "Tokens guessed by speculation."),
    ("drafts_accepted", CounterMetricFamily, "Guessed tokens that were right."),
    ("kv_bytes_received", CounterMetricFamily, "KV cache taken from other workers, in bytes."),
)
_GAUGES: tuple[tuple[str, Callable[[Member], float], str], ...] = (
    ("kv_blocks", lambda member: member.join.kv_blocks, "Blocks of KV cache in all."),
    (
        "protocol",
        lambda member: member.connection.version,
        "Version of the protocol spoken with it; older while an upgrade is under way.",
    ),
)
# What routing believes of a worker's speed.
_RATES: tuple[tuple[str, Callable[[Member], float], str], ...] = (
    (
        "prefill_tokens_per_second",
        lambda member: RATE_PROMPT / member.worker.cost.prefill_s(RATE_PROMPT),
        f"Of a prompt of {RATE_PROMPT} tokens alone, as learned from its steps.",
    ),
    (
        "decode_step_seconds",
        lambda member: member.worker.cost.decode_step_s(1, RATE_PROMPT),
        f"Of one sequence with {RATE_PROMPT} tokens alone, as learned from its steps.",
    ),
)


class ClusterCollector:
    """A prometheus_client collector: register it in the router's registry."""

    def __init__(self, members: Members, gateway: Gateway) -> None:
        self._members = members
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        members = self._members.of()
        labels = {m: (m.join.name, m.join.model, m.join.role) for m in members}
        for name, value, meaning in (*_GAUGES, *_RATES):
            gauges = GaugeMetricFamily(f"motley_worker_{name}", meaning, labels=_LABELS)
            for member in members:
                gauges.add_metric(labels[member], value(member))
            yield gauges
        circuits = GaugeMetricFamily(
            "motley_worker_circuit_open",
            "1 while a worker that kept failing is left alone, or on trial.",
            labels=_LABELS,
        )
        for member in members:
            circuits.add_metric(labels[member], self._members.spared(member))
        yield circuits
        for field, kind, meaning in _LOAD:
            family = kind(f"motley_worker_{field}", meaning, labels=_LABELS)
            for member in members:
                if member.load:
                    family.add_metric(labels[member], getattr(member.load, field))
            yield family
        yield _links(members, self._members.clock())
        tasks = len(asyncio.all_tasks())
        yield GaugeMetricFamily("motley_router_tasks", "Tasks of the router's event loop.", tasks)
        yield GaugeMetricFamily("motley_workers", "Workers that are here.", len(members))
        yield CounterMetricFamily(
            "motley_workers_lost", "Worker connections that ended.", self._members.lost
        )
        placing = self._gateway.placing
        yield placing.beliefs.metric()
        yield _counts(
            "motley_routes_degraded",
            "Requests placed on a worker whose role it was not, or whole after a hand-over failed.",
            "reason",
            placing.degraded,
        )
        yield _counts(
            "motley_disagg_decision",
            "Routes: whole on one worker, or split into prefill and decode.",
            "decision_type",
            placing.decisions,
        )
        yield _counts(
            "motley_request_slo_violation",
            "Prompts whose first token, and choices whose pace, came later than their limits.",
            "type",
            placing.violations,
        )
        yield CounterMetricFamily(
            "motley_requests_replayed",
            "Requests, or choices of them, started again on another worker.",
            self._gateway.replayed,
        )


def _links(members: list[Member], now: float) -> Metric:
    """What routing believes of each link that a KV cache has crossed."""
    family = GaugeMetricFamily(
        "motley_link_bytes_per_second",
        "Of KV caches from one worker to another, as learned from those that crossed.",
        labels=("sender", "receiver"),
    )
    workers = {member.join.name: member.worker for member in members}
    for name, sender in workers.items():
        for other in sender.links.keys() & workers.keys():
            family.add_metric((name, other), sender.link_bytes_s(workers[other], now))
    return family


def _counts(name: str, meaning: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, meaning, labels=(label,))
    for value, count in counts.items():
        family.add_metric((value,), count)
    return family

"""Service level objectives: limits per request, the share that must meet them, and presets.

Three rules are in use, and tools that do not say which one they mean cannot be compared:
- joint: `share` of all scheduled requests meet every limit at once (DistServe);
- each:  the `share` percentile of each metric is within its limit, on its own (MLPerf Server);
- mean:  the mean of each metric is within its limit (Mélange).
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Literal, cast

import msgspec

from loadtest.errors import OptionError
from loadtest.units import number, seconds

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.outcome import Outcome

Rule = Literal["joint", "each", "mean"]


class Slo(msgspec.Struct, frozen=True):
    """Limits in seconds; None is no limit. `share` is the part of requests that must meet them."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    share: float = 0.9
    rule: Rule = "joint"

    def met(self, outcome: Outcome, scale: float = 1.0) -> bool:
        """Whether one request met every limit times `scale`. What failed has met nothing."""
        return (
            outcome.ok
            and (self.ttft is None or outcome.ttft <= self.ttft * scale)
            and (self.tpot is None or outcome.tpot <= self.tpot * scale)
            and (self.e2e is None or outcome.e2e <= self.e2e * scale)
        )

    def criteria(self, outcome: Outcome) -> tuple[bool, ...]:
        """What the rule counts shares of: all limits at once, or each limit by itself."""
        if self.rule == "joint":
            return (self.met(outcome),)
        limits = (("ttft", self.ttft), ("tpot", self.tpot), ("e2e", self.e2e))
        return tuple(
            outcome.ok and getattr(outcome, name) <= limit
            for name, limit in limits
            if limit is not None
        )

    def deadline(self, tokens: int) -> float:
        """Seconds after which a request that has not ended has surely missed."""
        if self.e2e is not None:
            return self.e2e
        if self.ttft is None or self.tpot is None:
            return float("inf")
        return self.ttft + self.tpot * max(0, tokens - 1)

    def __str__(self) -> str:
        limits = {"TTFT": self.ttft, "TPOT": self.tpot, "E2E": self.e2e}
        percentile = f"p{self.share * 100:g} "
        each = {"joint": "", "each": percentile, "mean": "mean "}[self.rule]
        parts = [f"{each}{name} ≤ {value * 1e3:g} ms" for name, value in limits.items() if value]
        words = " and ".join(parts) or "no limit"
        return f"{words} for {self.share * 100:g} %" if self.rule == "joint" else words


class SloClass(msgspec.Struct, frozen=True):
    """A kind of request: its SLO, its weight among all, and its sizes when they are its own."""

    name: str
    slo: Slo
    weight: float = 1.0
    input: str | None = None
    output: str | None = None


def _ms(ttft: float | None, tpot: float, share: float, rule: Rule = "joint") -> Slo:
    return Slo(None if ttft is None else ttft / 1e3, tpot / 1e3, share=share, rule=rule)


# MLPerf Inference (Server and interactive scenarios), DistServe (table 1), Mélange (section 6),
# GuideLLM's guide and Dynamo's published comparison.
PRESETS: dict[str, Slo] = {
    "mlperf-llama2-70b": _ms(2000, 200, 0.99, "each"),
    "mlperf-llama2-70b-interactive": _ms(450, 40, 0.99, "each"),
    "mlperf-mixtral-8x7b": _ms(2000, 200, 0.99, "each"),
    "mlperf-llama3.1-8b": _ms(2000, 100, 0.99, "each"),
    "mlperf-llama3.1-8b-interactive": _ms(500, 30, 0.99, "each"),
    "mlperf-llama3.1-405b": _ms(6000, 175, 0.99, "each"),
    "mlperf-llama3.1-405b-interactive": _ms(4500, 80, 0.99, "each"),
    "mlperf-deepseek-r1": _ms(2000, 80, 0.99, "each"),
    "mlperf-deepseek-r1-interactive": _ms(1500, 15, 0.99, "each"),
    "mlperf-gpt-oss-120b": _ms(3000, 80, 0.99, "each"),
    "mlperf-gpt-oss-120b-interactive": _ms(2000, 15, 0.99, "each"),
    "distserve-chat-13b": _ms(250, 100, 0.9),
    "distserve-chat-66b": _ms(2500, 150, 0.9),
    "distserve-chat-175b": _ms(4000, 200, 0.9),
    "distserve-code-66b": _ms(125, 200, 0.9),
    "distserve-summary-66b": _ms(15000, 150, 0.9),
    "melange-tight": _ms(None, 40, 0.5, "mean"),
    "melange-loose": _ms(None, 120, 0.5, "mean"),
    "guidellm-chat": _ms(200, 50, 0.99),
    "guidellm-iterative": _ms(300, 100, 0.99),
    "guidellm-internal": _ms(600, 200, 0.99),
    "guidellm-internal-code": _ms(500, 150, 0.99),
    "dynamo-conversation": _ms(2000, 25, 0.9),
}


def parse(text: str, option: str = "--slo") -> Slo:
    """A preset's name, or `ttft=250ms,tpot=100ms,e2e=30s,share=0.9,rule=joint`."""
    if text in PRESETS:
        return PRESETS[text]
    fields = dict(pair.partition("=")[::2] for pair in text.split(","))
    return _from_fields({name.strip(): value.strip() for name, value in fields.items()}, option)


def _from_fields(fields: dict[str, str], option: str) -> Slo:
    unknown = fields.keys() - {"ttft", "tpot", "e2e", "share", "rule"}
    if unknown:
        known = ", ".join(PRESETS)
        raise OptionError(
            option,
            f"{min(unknown)!r} is neither a preset nor one of ttft, tpot, e2e, share, rule; "
            f"presets: {known}",
        )
    share = number(fields.get("share", "0.9"), option)
    if share >= 1:
        raise OptionError(option, f"share {share:g} must be below 1, such as 0.9 or 0.99")
    rule = fields.get("rule", "joint")
    if rule not in ("joint", "each", "mean"):
        raise OptionError(option, f"rule {rule!r} is none of joint, each, mean")
    limits = {
        name: seconds(fields[name], option) for name in fields.keys() & {"ttft", "tpot", "e2e"}
    }
    return Slo(**limits, share=share, rule=cast("Rule", rule))


def read_classes(path: Path) -> list[SloClass]:
    """Classes from TOML: `[[class]]` with name, weight, preset or limits, input, output.

    Raises OptionError that names the file and the field.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("class")
    except (OSError, ValueError) as error:
        raise OptionError(f"--classes {path}", str(error)) from None
    if not isinstance(tables, list) or not tables:
        raise OptionError(f"--classes {path}", "no [[class]] in it")
    return [_read_class(table, f"{path}: class {at + 1}") for at, table in enumerate(tables)]


def _read_class(table: dict[str, object], where: str) -> SloClass:
    fields = {name: str(value) for name, value in table.items()}
    name = fields.pop("name", "")
    if not name:
        raise OptionError(where, "name is missing")
    weight = number(fields.pop("weight", "1"), f"{where}: weight")
    sizes = fields.pop("input", None), fields.pop("output", None)
    preset = fields.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise OptionError(f"{where}: preset", f"{preset!r} is none of {', '.join(PRESETS)}")
    slo = PRESETS[preset] if preset else _from_fields(fields, where)
    return SloClass(name, slo, weight, *sizes)

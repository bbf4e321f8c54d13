"""Command-line options of a load, and the spec that they make."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from loadtest import sizes, slo, traces
from loadtest.api import Endpoint
from loadtest.arrivals import Arrivals
from loadtest.errors import OptionError
from loadtest.spec import Spec
from loadtest.units import number, seconds

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable


def add_load(parser: argparse.ArgumentParser) -> None:
    """The options of an endpoint and of a load, in groups."""
    _add_endpoint(parser.add_argument_group("endpoint"))
    _add_arrivals(parser.add_argument_group("when requests arrive (open loop)"))
    _add_trace(parser.add_argument_group("a trace instead"))
    _add_requests(parser.add_argument_group("what they are"))
    _add_slo(parser.add_argument_group("what must hold"))


def _add_endpoint(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", default="http://127.0.0.1:8000", help="http(s)://HOST:PORT[/v1]")
    group.add_argument("--model", help="default: the first of GET /v1/models")
    group.add_argument("--api", choices=("chat", "completions"), default="chat")
    group.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="default: $OPENAI_API_KEY"
    )
    group.add_argument("--insecure", action="store_true", help="do not check https certificates")
    group.add_argument("--no-stream", action="store_true", help="ask for whole answers")
    group.add_argument("--eos", action="store_true", help="let answers end early (no ignore_eos)")
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--extra", default="{}", help="JSON object merged into each body")
    group.add_argument("--slo-headers", action="store_true", help="send x-slo-ttft-ms and -tpot-ms")


def _add_arrivals(group: argparse._ArgumentGroup) -> None:
    processes = ("constant", "poisson", "gamma", "on-off", "ramp", "step")
    group.add_argument("--arrivals", choices=processes, default="poisson")
    group.add_argument("--rate", type=_number("--rate"), default=1.0, help="mean, requests/s")
    group.add_argument("--cv", type=_number("--cv"), default=1.0, help="gamma: CV of the gaps")
    group.add_argument("--on", type=_seconds("--on"), default=1.0, help="on-off: mean phase")
    group.add_argument("--off", type=_seconds("--off"), default=1.0)
    group.add_argument("--to-rate", type=_number("--to-rate"), help="ramp, step: rate at the end")
    group.add_argument(
        "--change", type=_seconds("--change"), default=60.0, help="ramp: how long; step: when"
    )
    group.add_argument("--requests", type=_count("--requests"), help="how many at most")
    group.add_argument("--duration", type=_seconds("--duration"), help="how long at most, e.g. 60s")
    group.add_argument(
        "--concurrency", type=_count("--concurrency"), help="closed loop of so many users"
    )
    group.add_argument(
        "--think",
        type=_seconds("--think", positive=False),
        default=0.0,
        help="pause before a user's or session's next request",
    )
    group.add_argument("--turns", type=_count("--turns"), default=1, help="turns of a conversation")


def _add_trace(group: argparse._ArgumentGroup) -> None:
    known = ", ".join(traces.BUILT_IN)
    group.add_argument("--trace", help=f"a CSV (Azure) or JSONL (Mooncake) file, or {known}")
    group.add_argument(
        "--time-scale", type=_number("--time-scale"), default=1.0, help="times × this"
    )
    group.add_argument(
        "--rate-scale", type=_number("--rate-scale"), default=1.0, help="share of requests kept"
    )
    group.add_argument(
        "--length-scale",
        type=_number("--length-scale"),
        default=1.0,
        help="sizes × this, e.g. 1/16",
    )
    group.add_argument("--max-input", type=_count("--max-input"), help="cap in tokens")
    group.add_argument("--max-output", type=_count("--max-output"), help="cap in tokens")
    group.add_argument(
        "--dequantise",
        type=_seconds("--dequantise"),
        default=0.0,
        help="spread rounded times, e.g. 3000ms",
    )


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--input", default="64", help="tokens: 64, 20-60, lognormal:MEAN:CV")
    group.add_argument("--output", default="16", help="tokens, likewise")
    group.add_argument(
        "--shared-prefix",
        type=_count("--shared-prefix"),
        default=0,
        help="tokens that all prompts share",
    )
    group.add_argument("--seed", type=int, default=0, help="same seed, same bytes and times")
    group.add_argument(
        "--warmup",
        type=_seconds("--warmup", positive=False),
        default=0.0,
        help="sent but not counted",
    )
    group.add_argument(
        "--timeout", type=_seconds("--timeout"), default=600.0, help="of one request"
    )
    group.add_argument(
        "--grace", type=_seconds("--grace"), default=60.0, help="wait after the last arrival"
    )
    group.add_argument(
        "--processes", type=_count("--processes"), default=1, help="client processes"
    )


def _add_slo(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--slo",
        default="ttft=2s,tpot=100ms",
        help="a preset (see `presets`), or ttft=250ms,tpot=100ms,share=0.9,rule=joint|each|mean",
    )
    group.add_argument(
        "--classes", type=Path, help="TOML with [[class]] tables: several SLOs in one run"
    )
    group.add_argument(
        "--cost-per-hour", type=_number("--cost-per-hour"), help="of all that served"
    )
    group.add_argument("--plan", type=Path, help="JSON or TOML plan that holds cost_per_hour")


def spec(args: argparse.Namespace, model: str) -> Spec:
    """Raises OptionError naming the option."""
    classes = [slo.SloClass("all", slo.parse(args.slo))]
    if args.classes is not None:
        classes = slo.read_classes(args.classes)
    return Spec(
        endpoint=endpoint(args, model),
        classes=classes,
        arrivals=_arrivals(args),
        trace=args.trace,
        scaling=traces.Scaling(
            args.time_scale,
            args.rate_scale,
            args.length_scale,
            args.max_input,
            args.max_output,
            args.dequantise,
        ),
        requests=args.requests,
        duration=args.duration,
        concurrency=args.concurrency,
        think=args.think,
        turns=args.turns,
        input=sizes.parse(args.input, "--input"),
        output=sizes.parse(args.output, "--output"),
        shared_prefix=args.shared_prefix,
        seed=args.seed,
        warmup=args.warmup,
        timeout=args.timeout,
        grace=args.grace,
        processes=args.processes,
    )


def endpoint(args: argparse.Namespace, model: str) -> Endpoint:
    try:
        extra = msgspec.json.decode(args.extra, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise OptionError("--extra", f"not a JSON object: {error}") from None
    return Endpoint(
        url=args.url,
        model=model,
        api=args.api,
        api_key=args.api_key,
        stream=not args.no_stream,
        ignore_eos=not args.eos,
        temperature=args.temperature,
        slo_headers=args.slo_headers,
        extra=extra,
        insecure=args.insecure,
    )


def cost_per_hour(args: argparse.Namespace) -> float | None:
    """From `--cost-per-hour`, else from the plan. Raises OptionError when a plan has none."""
    given: float | None = args.cost_per_hour
    if args.plan is None or given is not None:
        return given
    try:
        text = args.plan.read_text(encoding="utf-8")
        plan = tomllib.loads(text) if args.plan.suffix == ".toml" else msgspec.json.decode(text)
        return number(str(plan["cost_per_hour"]), "--plan", positive=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"--plan {args.plan}", f"no cost_per_hour to be had: {error!r}") from None


def _arrivals(args: argparse.Namespace) -> Arrivals:
    if args.arrivals in ("ramp", "step") and args.to_rate is None:
        raise OptionError("--to-rate", f"--arrivals {args.arrivals} needs it")
    return Arrivals(
        args.arrivals, args.rate, args.cv, args.on, args.off, args.to_rate or args.rate, args.change
    )


def _number(option: str) -> Callable[[str], float]:
    return lambda text: number(text, option)


def _seconds(option: str, *, positive: bool = True) -> Callable[[str], float]:
    return lambda text: seconds(text, option, positive=positive)


def _count(option: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not 0 < int(text[:12]) <= 10**9:
            raise OptionError(option, f"{text!r} is not a whole number above 0")
        return int(text)

    return parse

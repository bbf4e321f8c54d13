"""What stands in others' benchmark files: grids of rates, or runs with their latencies.

Formats as their own tools write them: Mélange's and AIBrix's profiles, the result of
`vllm bench serve` (one, a list, or a line each as `--append-result` does), GuideLLM's report.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from scheduler.capacity import Slo

Format = Literal["melange", "aibrix", "vllm", "guidellm"]

Rates = list[list[Annotated[float, msgspec.Meta(ge=0)]]]
Above = Annotated[float, msgspec.Meta(gt=0)]
Size = Annotated[float, msgspec.Meta(ge=1)]
T = TypeVar("T")


class Grid(NamedTuple):
    """requests/s [inputs][outputs]; 0 where the SLO it was made for could not be met."""

    inputs: tuple[float, ...]
    outputs: tuple[float, ...]
    rates: tuple[tuple[float, ...], ...]
    made_for: str = ""


class Run(NamedTuple):
    """One size at one rate (requests/s); latencies in ms, of the share that the SLO asks for."""

    inputs: float
    outputs: float
    rate: float
    ttft: float
    tpot: float


class _MelangeGpu(msgspec.Struct):
    tputs: Rates


class _Aibrix(msgspec.Struct):
    tputs: Rates
    indexes: tuple[list[Above], list[Above]]  # outputs, inputs
    slos: dict[str, float] = {}


class _VllmRun(msgspec.Struct):
    completed: Annotated[int, msgspec.Meta(gt=0)]
    total_input_tokens: Size
    total_output_tokens: Size
    request_throughput: Above


class _Spread(msgspec.Struct):
    mean: float
    percentiles: dict[str, float] = {}


class _Successful(msgspec.Struct):
    successful: _Spread


class _GuideMetrics(msgspec.Struct):
    requests_per_second: _Successful
    prompt_token_count: _Successful
    output_token_count: _Successful
    time_to_first_token_ms: _Successful
    inter_token_latency_ms: _Successful


class _GuideRun(msgspec.Struct):
    metrics: _GuideMetrics


class _Guide(msgspec.Struct):
    benchmarks: list[_GuideRun]


def read(text: str, form: Format, gpu: str, slo: Slo, edges: Any = None) -> Grid | list[Run]:
    """Raises ValueError that names the field."""
    return _FORMATS[form](_json(text), gpu, slo, edges)


def _json(text: str) -> Any:
    """One JSON value, or several of a line each as a list."""
    try:
        return json.loads(text)
    except ValueError:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            raise
        return [json.loads(line) for line in lines]
    except RecursionError:
        raise ValueError("brackets within brackets: no benchmark is that deep") from None


def _melange(content: Any, gpu: str, slo: Slo, edges: Any) -> Grid:
    """{gpu: {cost, tputs[input][output]}}; its SLO is whatever the file was made for."""
    if edges is None:
        raise ValueError("a Mélange file needs input_edges and output_edges beside it")
    known = _typed(content, dict[str, Any], "")
    if gpu not in known:
        raise ValueError(f"{gpu!r} is missing; it has {', '.join(known) or 'nothing'}")
    inputs, outputs = edges
    return _grid(inputs, outputs, _typed(known[gpu], _MelangeGpu, gpu).tputs)


def _aibrix(content: Any, gpu: str, slo: Slo, edges: Any) -> Grid:
    """{gpu, cost, tputs[output][input], indexes: [outputs, inputs], slos}."""
    file = _typed(content, _Aibrix, "")
    outputs, inputs = file.indexes
    if len({len(row) for row in file.tputs}) > 1:
        raise ValueError("tputs: its rows are not of one length")
    made = {name: value for name, value in file.slos.items() if name != "percentile"}
    said = ", ".join(f"{name} {value:g} s" for name, value in made.items())
    percentile = file.slos.get("percentile")
    grid = _grid(inputs, outputs, list(map(list, zip(*file.tputs, strict=True))))
    return grid._replace(made_for=f"{said} at P{percentile:g}" if percentile else said)


def _grid(inputs: Sequence[float], outputs: Sequence[float], rates: Rates) -> Grid:
    shape = len(rates), *{len(row) for row in rates}
    if shape != (len(inputs), len(outputs)):
        raise ValueError(
            f"tputs: {' × '.join(map(str, shape))} rates for {len(inputs)} inputs and "
            f"{len(outputs)} outputs"
        )
    for row, line in enumerate(rates):
        for column, rate in enumerate(line):
            _finite(f"tputs[{row}][{column}]", rate)
    for side, axis in (("inputs", inputs), ("outputs", outputs)):
        if list(axis) != sorted(set(axis)) or not all(0 < size < math.inf for size in axis):
            raise ValueError(f"{side} {list(axis)} do not ascend from above 0")
    return Grid(tuple(inputs), tuple(outputs), tuple(map(tuple, rates)))


def _vllm(content: Any, gpu: str, slo: Slo, edges: Any) -> list[Run]:
    found = content if isinstance(content, list) else [content]
    runs = []
    for at, each in enumerate(found):
        where = f"[{at}]" if isinstance(content, list) else ""
        run = _typed(each, _VllmRun, where)
        latencies = [_vllm_latency(each, metric, slo, where) for metric in ("ttft", "tpot")]
        sizes = (
            run.total_input_tokens / run.completed,
            run.total_output_tokens / run.completed,
        )
        _finite(f"{where}.request_throughput", run.request_throughput)
        runs.append(Run(*sizes, run.request_throughput, *latencies))
    return runs


def _vllm_latency(run: Mapping[str, Any], metric: str, slo: Slo, where: str) -> float:
    named = re.compile(rf"p(\d+(?:\.\d+)?)_{metric}_ms")
    percentiles = {float(found[1]): key for key in run if (found := named.fullmatch(key))}
    field = _at_share(percentiles, slo) or f"mean_{metric}_ms"
    if field not in run:
        raise ValueError(f"{where}.{field}: missing".lstrip("."))
    return _finite(f"{where}.{field}".lstrip("."), _typed(run[field], float, field))


def _guidellm(content: Any, gpu: str, slo: Slo, edges: Any) -> list[Run]:
    file = _typed(content, _Guide, "")
    runs = []
    for at, run in enumerate(file.benchmarks):
        where, metrics = f"benchmarks[{at}].metrics", run.metrics
        inputs, outputs, rate = (
            _finite(f"{where}.{name}.successful.mean", getattr(metrics, name).successful.mean)
            for name in ("prompt_token_count", "output_token_count", "requests_per_second")
        )
        if rate > 0:  # of a run in which nothing succeeded there is nothing to learn
            runs.append(
                Run(
                    inputs,
                    outputs,
                    rate,
                    _guidellm_latency(metrics.time_to_first_token_ms.successful, slo),
                    _guidellm_latency(metrics.inter_token_latency_ms.successful, slo),
                )
            )
    return runs


def _guidellm_latency(spread: _Spread, slo: Slo) -> float:
    """Its keys are p001, p01, p05, …, p95, p99, p999: a point follows the second digit."""
    percentiles = {
        int(key[1:]) / 10 ** (len(key) - 3): key
        for key in spread.percentiles
        if key.startswith("p") and key[1:].isdigit() and len(key) > 2
    }
    key = _at_share(percentiles, slo)
    return spread.percentiles[key] if key else spread.mean


def _at_share(percentiles: Mapping[float, str], slo: Slo) -> str | None:
    """The lowest that is not below the SLO's share; None: the mean is all there is."""
    fit = [percent for percent in sorted(percentiles) if percent >= slo.share * 100 - 1e-9]
    return percentiles[fit[0]] if fit else None


def _finite(field: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{field}: {value} is not a number")
    return value


def _typed(value: object, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        said = str(error)
        if "`$" in said:
            raise ValueError(said.replace("`$", "`" + where).replace("`.", "`")) from None
        raise ValueError(f"{where}: {said}" if where else said) from None


_FORMATS: dict[Format, Callable[[Any, str, Slo, Any], Grid | list[Run]]] = {
    "melange": _melange,
    "aibrix": _aibrix,
    "vllm": _vllm,
    "guidellm": _guidellm,
}

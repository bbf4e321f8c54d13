"""Recorded workloads: Azure's CSV and Mooncake's JSONL, read strictly and scaled openly.

Neither holds any text, only times and sizes; Mooncake's also say which 512-token blocks of prompts
were equal. `traces/README.md` says whose they are and what was changed in the slices kept here.
"""

from __future__ import annotations

import csv
import datetime
import math
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from loadtest.errors import OptionError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

BUILT_IN = {
    "azure-conv": "azure2023_conv_0_1200s.csv",
    "azure-code": "azure2023_code_0_1200s.csv",
    "mooncake-conversation": "mooncake_conversation_0_600s.jsonl",
    "mooncake-synthetic": "mooncake_synthetic_0_300s.jsonl",
}
BLOCK_TOKENS = 512  # of Mooncake's hash ids

_ROWS_LIMIT = 5_000_000
_TOKENS_LIMIT = 10_000_000
_SECONDS_LIMIT = 1e9


class Row(msgspec.Struct):
    """One recorded request: seconds since the trace's start, tokens in and out.

    `blocks` are ids of equal prompt blocks of `block_tokens` tokens, () where none are known.
    """

    at: float
    input: int
    output: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = BLOCK_TOKENS


class Scaling(msgspec.Struct, frozen=True):
    """What is changed of a trace; every report states it."""

    time_scale: float = 1.0  # times are multiplied: 2 is half the rate
    rate_scale: float = 1.0  # the share of requests kept, each by a draw: bursts keep their shape
    length_scale: float = 1.0
    max_input: int | None = None
    max_output: int | None = None
    dequantise: float = 0.0  # seconds: times that were rounded to ticks are spread over one


def read(name: str) -> list[Row]:
    """The rows of a built-in trace or of a file (`.csv` Azure's, `.jsonl` Mooncake's).

    Raises OptionError naming the file, the line and what is wrong with it.
    """
    if name in BUILT_IN:
        text = (resources.files("loadtest") / "traces" / BUILT_IN[name]).read_text()
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            known = ", ".join(BUILT_IN)
            raise OptionError("--trace", f"{name}: {error}; built in: {known}") from None
    reader = _mooncake if BUILT_IN.get(name, name).endswith(".jsonl") else _azure
    rows = sorted(reader(name, text), key=lambda row: row.at)
    if not rows:
        raise OptionError("--trace", f"{name}: no requests in it")
    start = rows[0].at
    for row in rows:
        row.at -= start
    return rows


def scaled(rows: list[Row], scaling: Scaling, rng: random.Random) -> list[Row]:
    """A trace made to fit: stretched, thinned, shortened, its ticks spread; times from 0."""
    if not 0 < scaling.rate_scale <= 1:
        raise OptionError("--rate-scale", "thinning only lowers a rate; --time-scale raises it")
    kept = []
    for row in rows:
        jitter = rng.uniform(0, scaling.dequantise) if scaling.dequantise else 0.0
        if rng.random() >= scaling.rate_scale:
            continue
        kept.append(
            Row(
                (row.at + jitter) * scaling.time_scale,
                _length(row.input, scaling.length_scale, scaling.max_input),
                _length(row.output, scaling.length_scale, scaling.max_output),
                row.blocks,
                max(1, round(row.block_tokens * scaling.length_scale)),
            )
        )
    return sorted(kept, key=lambda row: row.at)


def _length(tokens: int, scale: float, most: int | None) -> int:
    length = max(1, round(tokens * scale))
    return length if most is None else min(length, most)


def _azure(name: str, text: str) -> list[Row]:
    reader = csv.reader(text.splitlines())
    header = next(reader, [])
    if header == ["arrival_s", "input_tokens", "output_tokens"]:
        clock: Callable[[str], float] = float
    elif header == ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
        clock = _timestamp
    else:
        raise OptionError(
            "--trace",
            f"{name}: line 1 is neither TIMESTAMP,ContextTokens,GeneratedTokens "
            "nor arrival_s,input_tokens,output_tokens",
        )
    rows: list[Row] = []
    try:
        for fields in reader:
            at, asked, answered = fields
            rows.append(_checked(Row(clock(at), int(asked), int(answered)), len(rows)))
    except (ValueError, OverflowError, csv.Error) as error:
        raise OptionError("--trace", f"{name}: line {reader.line_num}: {error}") from None
    return rows


def _timestamp(text: str) -> float:
    """`2023-11-16 18:17:03.9799600`: seven decimals, of which datetime takes six."""
    whole, _, fraction = text.partition(".")
    moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return moment.timestamp() + float(f"0.{fraction or 0}")


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def _mooncake(name: str, text: str) -> list[Row]:
    decode = msgspec.json.Decoder(_MooncakeRow).decode
    rows: list[Row] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = decode(line)
            row = Row(
                found.timestamp / 1e3, found.input_length, found.output_length, found.hash_ids
            )
            rows.append(_checked(row, len(rows)))
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise OptionError("--trace", f"{name}: line {number}: {error}") from None
    return rows


def _checked(row: Row, rows_before: int) -> Row:
    if not (math.isfinite(row.at) and abs(row.at) <= 4 * _SECONDS_LIMIT):
        raise ValueError(f"a time of {row.at!r} s")
    if not (0 <= row.input <= _TOKENS_LIMIT and 0 <= row.output <= _TOKENS_LIMIT):
        raise ValueError(f"sizes of {row.input} and {row.output} tokens")
    if rows_before >= _ROWS_LIMIT:
        raise ValueError(f"more than {_ROWS_LIMIT} requests")
    return row

"""Are greedy tokens the same through prefill + decode workers, a mixed worker, and transformers?

    python bench/exact_http.py [--json] [--prompts N]

Starts `motley serve` in each shape, asks for 64 tokens of every prompt of the oracle, one at a time
and 16 at once, over HTTP, and compares texts. Exits with 1 if one differs anywhere but after a near
tie (the oracle's top two logits closer than 1e-3).
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
import msgspec
from oracle import MODEL, NEW_TOKENS, Case, load_cases
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from workers.text import Text
from workers.weights.catalogue import resolve
from workers.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SHAPES = {
    "prefill + decode": ("--mode", "exact", "--prefill", "1", "--decode", "1"),
    "mixed": ("--mode", "exact", "--prefill", "0", "--decode", "0", "--mixed", "1"),
}
AT_ONCE = (1, 16)


class Row(msgspec.Struct, frozen=True):
    """How one prompt's text compares with the oracle's, in one shape, with `at_once` requests."""

    shape: str
    at_once: int
    prompt_tokens: int
    equal: bool
    near_tie: bool  # the oracle itself was undecided somewhere


@asynccontextmanager
async def cluster(arguments: tuple[str, ...]) -> AsyncIterator[str]:
    """A running `motley serve`; gives its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "motley", "serve", MODEL, "--port", "0", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield await asyncio.wait_for(ready(process), 120)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def ready(process: asyncio.subprocess.Process) -> str:
    """Wait for the ready line; gives its address."""
    assert process.stdout
    async for line in process.stdout:
        if found := re.search(rb"ready: (\S+)", line):
            return found.group(1).decode()
    raise RuntimeError("motley serve ended before it was ready; run it by hand to see why")


async def complete(session: aiohttp.ClientSession, url: str, case: Case) -> str:
    body = {
        "model": MODEL,
        "prompt": case.prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        reply.raise_for_status()
        text: str = (await reply.json())["choices"][0]["text"]
        return text


async def compare(shape: str, cases: list[Case], expected: list[str]) -> list[Row]:
    """Every case in one shape, alone and in company."""
    rows = []
    timeout = aiohttp.ClientTimeout(total=1200)
    async with cluster(SHAPES[shape]) as url, aiohttp.ClientSession(timeout=timeout) as session:
        for at_once in AT_ONCE:
            texts = await complete_all(session, url, cases, at_once)
            rows += [
                Row(shape, at_once, len(case.prompt), text == right, bool(case.near_ties))
                for case, text, right in zip(cases, texts, expected, strict=True)
            ]
    return rows


async def complete_all(
    session: aiohttp.ClientSession, url: str, cases: list[Case], at_once: int
) -> list[str]:
    places = asyncio.Semaphore(at_once)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"{at_once} at once", total=len(cases))

        async def one(case: Case) -> str:
            async with places:
                text = await complete(session, url, case)
            progress.advance(bar)
            return text

        return await asyncio.gather(*map(one, cases))


def expected_texts(cases: list[Case]) -> list[str]:
    """The oracle's tokens as our own detokeniser writes them."""
    checkpoint = open_checkpoint(resolve(MODEL).path)
    text = Text.from_checkpoint(checkpoint)
    checkpoint.close()
    written = []
    for case in cases:
        stream = text.stream(())
        written.append("".join(map(stream.push, case.tokens)) + stream.finish())
    return written


def show(rows: list[Row]) -> None:
    table = Table("workers", "at once", "prompts", "prompt tokens", "equal", "with near ties")
    for shape in SHAPES:
        for at_once in AT_ONCE:
            part = [row for row in rows if (row.shape, row.at_once) == (shape, at_once)]
            lengths = [row.prompt_tokens for row in part]
            table.add_row(
                shape,
                str(at_once),
                str(len(part)),
                f"{min(lengths)} to {max(lengths)}",
                f"{sum(row.equal for row in part)} of {len(part)}",
                str(sum(row.near_tie for row in part)),
            )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--prompts", type=int, default=None, help="only the first so many")
    options = parser.parse_args()
    cases = load_cases()[: options.prompts]
    expected = expected_texts(cases)
    rows = [row for shape in SHAPES for row in asyncio.run(compare(shape, cases, expected))]
    if options.json:
        print(msgspec.json.encode(rows).decode())
    else:
        show(rows)
    return int(not all(row.equal or row.near_tie for row in rows))


if __name__ == "__main__":
    sys.exit(main())

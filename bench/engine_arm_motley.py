"""Motley in process, as bench/engine.py runs it: the engine that `motley worker` would build."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from engine_process import Emitted, Facts, Setup, Tokens, serve

from scheduler.request import Job, Limits, Prompt, Sampling
from workers.build import EngineOptions, Model, build

if TYPE_CHECKING:
    from collections.abc import Iterator


class Motley:
    """Variants: fast mode without speculation (the default), int8kv, speculate, exact.

    The peers do not speculate either, and greedy answers of a small model repeat themselves: drafts
    look better here than on most of what people ask.
    """

    def __init__(self, setup: Setup) -> None:
        options = EngineOptions(
            kv_tokens=setup.kv_tokens,
            threads=setup.threads,
            mode="exact" if setup.variant == "exact" else "fast",
            kv_dtype="int8" if setup.variant == "int8kv" else "float16",
            speculate=setup.variant == "speculate",
        )
        self.engine, _ = build(Model("bench", setup.model), options)
        self.facts = Facts(
            version=commit(),
            weight_bytes=Path(setup.model).stat().st_size,
            kv_bytes=self.engine.runner.cache.data.nbytes,
        )

    def run(self, prompts: list[Tokens], new_tokens: int) -> Iterator[Emitted]:
        jobs = [
            Job(
                id=str(index),
                epoch=0,
                model="bench",
                prompt=Prompt(ids=prompt),
                sampling=Sampling(seed=0, temperature=0.0),
                limits=Limits(max_tokens=new_tokens, ignore_eos=True),
                created=0.0,
            )
            for index, prompt in enumerate(prompts)
        ]
        return self._steps(jobs, prompts)

    def _steps(self, jobs: list[Job], prompts: list[Tokens]) -> Iterator[Emitted]:
        for job, prompt in zip(jobs, prompts, strict=True):
            self.engine.add(job, prompt)
        while self.engine.has_work:
            outputs = self.engine.step().outputs
            if outputs:
                yield [(int(output.id), token) for output in outputs for token in output.ids]

    def processes(self) -> list[int]:
        return [os.getpid()]


def commit() -> str:
    """Of the checkout that runs, with a + if it has changes."""
    words = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+")
    said = subprocess.run(words, capture_output=True, text=True, check=False, timeout=10)
    return said.stdout.strip() or "no checkout"


if __name__ == "__main__":
    serve(Motley)

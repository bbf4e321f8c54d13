"""What is simulated: workers, requests, and what came of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from scheduler.cost import STEP_TOKENS, CostModel, check
from scheduler.errors import SetupError
from scheduler.messages import Role
from scheduler.models import BLOCK_TOKENS
from scheduler.shares import Planned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scheduler.workload import Arrival

MOST_TOKENS = 1 << 18  # of a request


class WorkerSpec(msgspec.Struct, frozen=True):
    """One simulated worker. `cost` is its true speed; `believed` is what the router is told."""

    name: str
    role: Role
    cost: CostModel
    kv_tokens: int
    kind: str = ""  # by which it is counted: a plan's column
    max_step_tokens: int = STEP_TOKENS
    max_sequences: int = 64
    itl_bound_s: float | None = None
    believed: CostModel | None = None
    plan: Planned | None = None  # what its kind is there for, to routing; None: there is no plan


class Timing(msgspec.Struct, frozen=True):
    """Seconds that pass outside of steps and transfers."""

    network_s: float = 0.0005  # one message between two processes
    tokenise_s: float = 0.001
    overlap: bool = True  # layers are pushed while the prefill goes on


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of each request, by its number; times in s, nan where there is none.

    `refused` were told so at once. `prefilled` and `decoded` are numbers of workers, -1: none.
    """

    at: NDArray[np.float64]
    first: NDArray[np.float64]
    last: NDArray[np.float64]
    outputs: NDArray[np.int64]
    refused: NDArray[np.bool_]
    prefilled: NDArray[np.int32]
    decoded: NDArray[np.int32]
    busy: NDArray[np.float64]  # by worker: seconds in steps
    events: int
    preempted: int = 0
    transferred: float = 0.0  # bytes

    @property
    def ttft(self) -> NDArray[np.float64]:
        return self.first - self.at

    @property
    def tpot(self) -> NDArray[np.float64]:
        """(last token - first token) / (tokens - 1); 0 for an answer of one token."""
        return np.asarray((self.last - self.first) / np.maximum(self.outputs - 1, 1))

    def met(self, ttft_s: float, tpot_s: float) -> NDArray[np.bool_]:
        """Which requests met both limits; a refused one met none."""
        with np.errstate(invalid="ignore"):
            return np.asarray((self.ttft <= ttft_s) & (self.tpot <= tpot_s))


def check_workers(workers: Sequence[WorkerSpec]) -> None:
    """Raises SetupError naming the field."""
    if not workers:
        raise SetupError("workers: none to simulate")
    for at, worker in enumerate(workers):
        where = f"workers[{at}]"
        for model in filter(None, (worker.cost, worker.believed)):
            if wrong := check(model, f"{where}.cost"):
                raise SetupError(wrong)
        if worker.kv_tokens < BLOCK_TOKENS:
            raise SetupError(f"{where}.kv_tokens: {worker.kv_tokens} hold no block of KV cache")
        if worker.max_step_tokens < 1 or worker.max_sequences < 1:
            raise SetupError(f"{where}: a step holds at least one token and one sequence")
    if len({worker.name for worker in workers}) < len(workers):
        raise SetupError("workers: two have one name")


def check_requests(requests: Sequence[Arrival]) -> None:
    """Raises SetupError naming the first that cannot be meant."""
    if not requests:
        raise SetupError("requests: none to simulate")
    before = 0.0
    for at, request in enumerate(requests):
        if not before <= request.at < float("inf"):
            raise SetupError(f"requests[{at}].at: {request.at} s is before the one ahead of it")
        if request.input < 1 or request.output < 1:
            raise SetupError(f"requests[{at}]: at least one token in and one out")
        if request.input + request.output > MOST_TOKENS:
            raise SetupError(f"requests[{at}]: more than {MOST_TOKENS} tokens")
        before = request.at

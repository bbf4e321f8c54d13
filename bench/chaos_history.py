"""What was said about each request, for the few whose answers turn out wrong."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.messages import AcceptedUnread, Cancel, Failed, HandedOver, Outputs, Submit
from serving.members import Members

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.messages import Output, Wire


@dataclass
class Said:
    """Tokens [first, end) of one choice that a worker gave in one attempt."""

    worker: str
    epoch: int
    choice: int
    first: int
    end: int
    text: str

    def goes_on(self, worker: str, output: Output) -> bool:
        ours = (self.worker, self.epoch, self.choice, self.end)
        return ours == (worker, output.epoch, output.choice, output.position)

    def __str__(self) -> str:
        where = f"{self.worker} → attempt {self.epoch}, choice {self.choice}"
        return f"{where}: tokens {self.first} to {self.end - 1}: {self.text!r}"


class History:
    """Of every request, by the name that its client gave it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: defaultdict[str, list[tuple[float, object]]] = defaultdict(list)

    def of(self, request: str) -> list[str]:
        return [f"{time:10.3f} {entry}" for time, entry in self._entries[request]]

    def posted(self, worker: str, message: Wire) -> None:
        """The router says this to a worker."""
        if isinstance(message, Submit):
            job = message.job
            goes = f", then {message.handoff.name}" if message.handoff else ""
            has = f"{len(job.emitted)} tokens, {job.sent} characters"
            what = f"attempt {job.epoch} of choices {job.choices}{goes}; the client has {has}"
            self._note(job.id, f"to {worker}: {what}")
        elif isinstance(message, Cancel):
            self._note(message.id, f"to {worker}: cancel attempt {message.epoch}")

    def heard(self, worker: str, message: Wire) -> None:
        """A worker says this to the router."""
        if isinstance(message, Outputs):
            for output in message.items:
                self._output(worker, output)
        elif isinstance(message, AcceptedUnread | HandedOver):
            what = type(message).__name__.removesuffix("Unread")
            self._note(message.id, f"{worker} → attempt {message.epoch}: {what}")
        elif isinstance(message, Failed):
            what = f"failed, {message.kind}: {message.message}"
            self._note(message.id, f"{worker} → attempt {message.epoch}: {what}")

    def struck(self, requests: frozenset[str], what: str) -> None:
        for request in requests:
            self._entries[request].append((self._clock(), what))

    def _output(self, worker: str, output: Output) -> None:
        entries = self._entries[request_of(output.id)]
        last = entries[-1][1] if entries else None
        if isinstance(last, Said) and last.goes_on(worker, output):
            last.end += len(output.ids)
            last.text += output.text
        else:
            at, end = output.position, output.position + len(output.ids)
            said = Said(worker, output.epoch, output.choice, at, end, output.text)
            entries.append((self._clock(), said))

    def _note(self, job: str, what: str) -> None:
        self._entries[request_of(job)].append((self._clock(), what))


class WatchedMembers(Members):
    """Members whose words to workers are noted."""

    def __init__(self, history: History) -> None:
        super().__init__()
        self._history = history

    def post(self, worker: str, message: Wire) -> None:
        self._history.posted(worker, message)
        super().post(worker, message)


def request_of(job: str) -> str:
    """The name that a client gave its request, from the id of a job."""
    return job.split("/", 2)[2].removeprefix("cmpl-")

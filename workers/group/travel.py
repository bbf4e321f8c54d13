"""Shards that travel: a rank without the model on its disk gets its part from rank 0.

On a link of its own the rank says which share it wants and hears the manifest; it then asks for the
byte ranges that it lacks, weight by weight, and checks each against its hash. What is there already
(of a transfer that was cut off, or the same bytes in another shard) is not sent again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from kernels.program import PACKING
from scheduler.errors import ProtocolError, SetupError
from workers.group.links import dial
from workers.group.shard_file import (
    DATA,
    DRAFT,
    MANIFEST,
    Manifest,
    finish,
    read_manifest,
)
from workers.group.words import GET, SHIPMENT, Get, Refuse, Shipment, Want

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from scheduler.messages import Address
    from workers.group.links import Link
    from workers.group.partition import Share
    from workers.group.shard_file import Entry
    from workers.group.shard_folder import ShardFolder

logger = logging.getLogger(__name__)

PIECE = 1 << 20
QUIET_S = 1800.0  # while rank 0 writes a shard, or a rank checks what it has
ATTEMPTS = 6  # links in a row that broke, though each goes on where the last one ended
FIRST_PAUSE_S = 0.2
PROGRESS_S = 5.0


class Shelf:
    """Rank 0's side: shards of other ranks, made when they are wanted."""

    def __init__(self, make: Callable[[Share], tuple[Path, Manifest]]) -> None:
        """`make` writes a shard, or finds it; SetupError if it cannot."""
        self._make = make
        self._lock = threading.Lock()  # one at a time: memory

    def serve(self, link: Link, want: Want) -> None:
        """Until the rank closes the link. Raises ConnectionError then, ProtocolError or OSError."""
        link.set_limit(QUIET_S)
        try:
            with self._lock:
                folder, manifest = self._make(want.share)
        except SetupError as error:
            link.say(Refuse(str(error)))
            return
        link.say(Shipment(manifest))
        with (folder / DATA).open("rb", buffering=0) as file:
            while True:
                get = link.hear(GET)
                if not 0 <= get.offset <= get.offset + get.size <= manifest.size:
                    raise ProtocolError(f"no bytes {get.offset} + {get.size} in a shard")
                file.seek(get.offset)
                for piece in _pieces(file, get.size):
                    link.send(piece)


def fetch(
    leader: Address,
    secret: bytes,
    share: Share,
    shards: ShardFolder,
    pause_s: float = FIRST_PAUSE_S,
) -> tuple[Path, Manifest]:
    """This rank's shard in `shards`, from rank 0 as far as it is not there.

    Raises SetupError when it cannot be kept here, ConnectionError or ProtocolError when rank 0 does
    not give it; what has come until then stays for the next time.
    """
    for attempt in range(ATTEMPTS):
        try:
            link = dial(leader.host, leader.port, secret, QUIET_S)
            try:
                return _fetch(link, share, shards)
            finally:
                link.close()
        except (ConnectionError, TimeoutError, ProtocolError) as error:
            if attempt == ATTEMPTS - 1:
                raise
            logger.warning("the shard stopped coming: %s; going on where it ended", error)
            time.sleep(pause_s * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _fetch(link: Link, share: Share, shards: ShardFolder) -> tuple[Path, Manifest]:
    link.say(Want(share))
    word = link.hear(SHIPMENT)
    if isinstance(word, Refuse):
        raise SetupError(f"rank 0 cannot give this rank's weights: {word.reason}")
    manifest = word.manifest
    _check(manifest)
    folder = shards.claim(manifest.source)
    with shards.writing(folder):
        if read_manifest(folder, manifest.source):
            return folder, manifest
        try:
            _receive(link, folder, manifest, _known(shards.path))
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:
            raise SetupError(
                f"cannot keep this rank's weights in {folder}: {error}. Give a folder on a larger "
                "disk with --shards"
            ) from error
    return folder, manifest


def _check(manifest: Manifest) -> None:
    """Raises SetupError for another release's shard, ProtocolError for one that is none."""
    if manifest.packing != PACKING:
        raise SetupError("rank 0 packs weights for another release: run the same one on all ranks")
    end = 0
    for entry in manifest.entries:
        if entry.offset != end or entry.size < 0:
            raise ProtocolError("a manifest whose weights do not follow each other")
        end = entry.offset + entry.padded


def _receive(link: Link, folder: Path, manifest: Manifest, known: Known) -> None:
    """Complete the draft, then make it the shard."""
    draft = folder / DRAFT
    begun_before = draft.exists()
    _check_space(folder, manifest.size - (draft.stat().st_blocks * 512 if begun_before else 0))
    progress = _Progress(manifest.size)
    with draft.open("r+b" if begun_before else "w+b", buffering=0) as file:
        file.truncate(manifest.size)
        for entry in manifest.entries:
            if begun_before and _hash(file, entry.offset, entry.size) == entry.sha256:
                progress.add("was there", entry.size)
            elif _copy(known.get(entry.sha256), file, entry):
                progress.add("copied", entry.size)
            else:
                link.say(Get(entry.offset, entry.size))
                _take(link, file, entry)
                progress.add("fetched", entry.size)
        os.fdatasync(file.fileno())
    finish(folder, manifest)
    progress.log()


def _take(link: Link, file: BinaryIO, entry: Entry) -> None:
    """The weight's bytes into their place. Raises ProtocolError if they are damaged."""
    digest, left = hashlib.sha256(), entry.size
    buffer = memoryview(bytearray(min(PIECE, entry.size)))
    file.seek(entry.offset)
    while left:
        piece = buffer[:left]
        link.receive_into(piece)
        _write(file, piece)
        digest.update(piece)
        left -= len(piece)
    if digest.hexdigest() != entry.sha256:
        raise ProtocolError(f"{entry.name} came damaged")


# ── what is there ───────────────────────────────────────────────────────────────────────────────

Known = dict[str, tuple["Path", int]]  # by hash: a shard's file, and where in it


def _known(shards: Path) -> Known:
    """Weights of whole shards on this disk: a rank that gets a former share again has it all."""
    known: Known = {}
    for notes in shards.glob(f"*/{MANIFEST}"):
        try:
            manifest = msgspec.json.decode(notes.read_bytes(), type=Manifest)
        except (OSError, msgspec.MsgspecError):
            continue
        for entry in manifest.entries:
            known[entry.sha256] = notes.parent / DATA, entry.offset
    return known


def _copy(found: tuple[Path, int] | None, file: BinaryIO, entry: Entry) -> bool:
    """Whether the weight was there, whole, in another shard."""
    if found is None:
        return False
    path, offset = found
    try:
        with path.open("rb", buffering=0) as source:
            if _hash(source, offset, entry.size) != entry.sha256:
                return False
            source.seek(offset)
            file.seek(entry.offset)
            for piece in _pieces(source, entry.size):
                _write(file, memoryview(piece))
    except FileNotFoundError:
        return False
    return True


def _hash(file: BinaryIO, offset: int, size: int) -> str:
    file.seek(offset)
    digest = hashlib.sha256()
    for piece in _pieces(file, size):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes; fewer where the file ends."""
    while size and (piece := file.read(min(PIECE, size))):
        size -= len(piece)
        yield piece


def _write(file: BinaryIO, piece: memoryview) -> None:
    while piece:
        piece = piece[file.write(piece) :]


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f"{folder} has {free >> 20} MiB free, and this rank's weights need {needed >> 20}: "
            "give a folder on a larger disk with --shards"
        )


class _Progress:
    """Says now and then how far a shard has come."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bytes = {"fetched": 0, "copied": 0, "was there": 0}
        self._said = time.monotonic()

    def add(self, how: str, size: int) -> None:
        self._bytes[how] += size
        if time.monotonic() - self._said > PROGRESS_S:
            self.log()

    def log(self) -> None:
        self._said = time.monotonic()
        parts = ", ".join(f"{size >> 20} MiB {how}" for how, size in self._bytes.items() if size)
        logger.info("shard of %d MiB: %s", self._total >> 20, parts or "nothing yet")

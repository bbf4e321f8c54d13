"""Weights and tokenizer of a model on this machine, whatever the file format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from scheduler.errors import SetupError
from workers.weights.gguf_file import GgufFile
from workers.weights.random_model import PREFIX as RANDOM
from workers.weights.random_model import RandomModel
from workers.weights.safetensors_folder import SafetensorsFolder

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    from tokenizers import Tokenizer

    from scheduler.models import ModelShape
    from workers.weights.gguf_header import StoredTensor
    from workers.weights.quantise import Quantize


class Weights(Protocol):
    """A model's weights, or a part of them, named and laid out as Hugging Face does."""

    shape: ModelShape

    @property
    def names(self) -> tuple[str, ...]:
        """Every weight, in execution order; `lm_head.weight` only where it is not tied."""
        ...

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """A contiguous copy of one weight: [outputs, inputs], or [D] for a norm.

        `lm_head.weight` is the embedding where the two are tied. Raises KeyError for a name that
        the model does not have.
        """
        ...

    def stored(self, name: str) -> StoredTensor | None:
        """The same weight row for row in GGUF's blocks, or None if it is not kept in such.

        Dequantised it equals `array(name)`. Raises KeyError like `array`.
        """
        ...


class Checkpoint(Weights, Protocol):
    """A model on disk."""

    quantisation: str  # how its weights are stored and rounded: equal where their numbers may be
    chat_template: str | None  # Jinja source
    eos_ids: frozenset[int]  # any of them ends an answer
    special_tokens: dict[str, str]  # what a template may name: bos_token, eos_token, …

    def tokenizer(self) -> Tokenizer: ...

    def close(self) -> None:
        """Let go of the files. Arrays already given stay."""
        ...


def open_checkpoint(path: Path, quantize: Quantize | None = None) -> Checkpoint:
    """Open a GGUF file, a folder with config.json, *.safetensors and tokenizer.json, or
    `random:SHAPE` (workers.weights.random_model).

    `quantize` rounds a folder's matrices to 4 or 8 bits as they are asked for: `array` and
    `stored` then give the same, rounded model. A GGUF file was quantised when it was made.
    Raises SetupError, naming the file, if it is damaged or its model is not supported.
    """
    if str(path).startswith(RANDOM):
        return RandomModel.named(str(path))
    if path.is_dir():
        return SafetensorsFolder(path, quantize)
    if path.is_file():
        if quantize is not None:
            raise SetupError(
                f"{path} is a GGUF file, which keeps its own quantisation; fetch it in the one "
                f"that you want, or give a folder of safetensors to quantise to {quantize}"
            )
        return GgufFile(path)
    raise SetupError(f"{path} does not exist; give a GGUF file or a folder of safetensors")

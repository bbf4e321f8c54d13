"""A checkpoint as Hugging Face lays it out: config.json, *.safetensors and tokenizer.json."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

import msgspec
from gguf.quants import dequantize
from safetensors import SafetensorError
from tokenizers import Tokenizer

from scheduler.errors import SetupError
from workers.weights import families
from workers.weights.hf_config import Config, Ids, read_shape
from workers.weights.quantise import BLOCK, KINDS, Quantize, quantise, tally
from workers.weights.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from workers.weights.gguf_header import StoredTensor

T = TypeVar("T")

_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class _GenerationConfig(msgspec.Struct):
    """generation_config.json: it may name more tokens that end an answer."""

    eos_token_id: Ids = None


class _AddedToken(msgspec.Struct):
    content: str


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    """tokenizer_config.json: the strings that a chat template may name, and often the template."""

    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None
    unk_token: str | _AddedToken | None = None
    pad_token: str | _AddedToken | None = None


class _Index(msgspec.Struct):
    """model.safetensors.index.json: which file holds which weight."""

    weight_map: dict[str, str]


class SafetensorsFolder:
    """The weights, tokenizer and chat template of one folder."""

    def __init__(self, path: Path, quantize: Quantize | None = None) -> None:
        """Raises SetupError if a file is missing or damaged or the model is not supported."""
        self._path = path
        self._quantize = quantize
        config = _read(path / "config.json", Config)
        try:
            self.shape = read_shape(config)
        except SetupError as error:
            raise SetupError(f"{path}: {error}") from error
        except (ArithmeticError, ValueError) as error:
            raise SetupError(
                f"{path}/config.json cannot be right ({error}); fetch it again"
            ) from error
        families.check_shape(path, self.shape)
        self.eos_ids = self._eos_ids(config)
        tokenizer = self._optional("tokenizer_config.json", _TokenizerConfig)
        self.special_tokens = _special_tokens(tokenizer)
        self.chat_template = self._chat_template(tokenizer)
        # Our name → the open file that holds the weight, and its name there.
        self._weights: dict[str, tuple[SafetensorsFile, str]] = {}
        self._dims: dict[str, tuple[int, ...]] = {}
        with contextlib.ExitStack() as files:
            self._open_weights(files)
            self._files = files.pop_all()
        places = [self._weights[name] for name in self.names]  # an export may hold more
        kinds = tally(file.kinds[name] for file, name in places)
        self.quantisation = f"{quantize} of {kinds}" if quantize else kinds

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(families.model_tensors(self.shape))

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """See Checkpoint."""
        if stored := self.stored(name):
            values: npt.NDArray[np.float32] = dequantize(stored.data, stored.kind)
            return values
        return self._original(name)

    def stored(self, name: str) -> StoredTensor | None:
        """Blocks made on the spot, if they were asked for; see Checkpoint.

        The tables of tokens get int8 in any case: they are read by the row, or decide the token.
        Norms, biases and routers stay as they are, and so do rows that are not whole blocks.
        """
        dims = self._dims[self._source(name)]
        table = name in (families.EMBEDDING, families.LM_HEAD)
        small = len(dims) == 1 or name.endswith(".mlp.gate.weight")
        if self._quantize is None or small or dims[1] % BLOCK:
            return None
        try:
            return quantise(self._original(name), KINDS["int8" if table else self._quantize])
        except ValueError as error:
            raise SetupError(f"{self._path}: {name} cannot be quantised: {error}") from error

    def _source(self, name: str) -> str:
        tied = name == families.LM_HEAD and self.shape.tied_embeddings
        return families.EMBEDDING if tied else name

    def _original(self, name: str) -> npt.NDArray[np.float32]:
        file, stored = self._weights[self._source(name)]
        try:
            return file.read(stored)
        except ValueError as error:
            raise SetupError(f"{self._path}: {name} cannot be read: {error}") from error

    def tokenizer(self) -> Tokenizer:
        path = self._path / "tokenizer.json"
        if not path.is_file():
            raise SetupError(f"{path} is missing; fetch it from where the model came from")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise SetupError(f"{path} is damaged ({error}); fetch it again") from error

    def close(self) -> None:
        """Close the files. Arrays already given stay."""
        self._weights.clear()
        self._files.close()

    def _optional(self, name: str, kind: type[T]) -> T:
        path = self._path / name
        return _read(path, kind) if path.is_file() else kind()

    def _eos_ids(self, config: Config) -> frozenset[int]:
        ids = self._optional("generation_config.json", _GenerationConfig).eos_token_id
        ids = config.eos_token_id if ids is None else ids
        return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])

    def _chat_template(self, config: _TokenizerConfig) -> str | None:
        path = self._path / "chat_template.jinja"
        if path.is_file():
            return _bytes(path).decode(errors="replace")
        if isinstance(config.chat_template, list):
            named = {entry.name: entry.template for entry in config.chat_template}
            return named.get("default")
        return config.chat_template

    def _open_weights(self, files: contextlib.ExitStack) -> None:
        dims = self._dims
        for path in self._weight_files():
            try:
                file = files.enter_context(contextlib.closing(SafetensorsFile(path)))
            except (OSError, SafetensorError) as error:
                raise SetupError(f"{path} is damaged ({error}); fetch it again") from error
            for stored, found in file.dims.items():
                name = _our_name(stored)
                self._weights[name], dims[name] = (file, stored), found
        # Old exports keep two things that the model does not need: the rotary frequencies, which
        # follow from theta, and a copy of tied embeddings.
        derived = [name for name in dims if name.endswith("rotary_emb.inv_freq")]
        for name in [*derived, *([families.LM_HEAD] if self.shape.tied_embeddings else [])]:
            dims.pop(name, None)
        families.check_tensors(self._path, self.shape, dims)

    def _weight_files(self) -> list[Path]:
        index = self._path / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.is_file():
            names = set(_read(index, _Index).weight_map.values())
        paths = [self._path / name for name in sorted(names)]
        for path in paths:
            if path.parent != self._path or not path.is_file():
                raise SetupError(f"{path} is missing; fetch the whole model again")
        return paths


def _our_name(name: str) -> str:
    """Mixtral's names for its router and experts, as Qwen3-MoE spells them; others stay."""
    before, _, after = name.partition(".block_sparse_moe.")
    match after.split("."):
        case ["gate", "weight"]:
            return f"{before}.mlp.gate.weight"
        case ["experts", expert, part, "weight"] if part in _MIXTRAL:
            return f"{before}.mlp.experts.{expert}.{_MIXTRAL[part]}.weight"
    return name


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SetupError(f"{path} cannot be read ({error.strerror}); fetch it again") from error


def _read(path: Path, kind: type[T]) -> T:
    if not path.is_file():
        raise SetupError(f"{path} is missing; {path.parent} is not a whole model")
    try:
        return msgspec.json.decode(_bytes(path), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} is not as it must be: {error}; fetch it again") from error


def _special_tokens(config: _TokenizerConfig) -> dict[str, str]:
    tokens = {
        "bos_token": config.bos_token,
        "eos_token": config.eos_token,
        "unk_token": config.unk_token,
        "pad_token": config.pad_token,
    }
    return {
        name: token.content if isinstance(token, _AddedToken) else token
        for name, token in tokens.items()
        if token is not None
    }

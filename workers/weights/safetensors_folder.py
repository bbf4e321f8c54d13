"""A checkpoint as Hugging Face lays it out: config.json, *.safetensors and tokenizer.json."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from scheduler.errors import SetupError
from scheduler.models import ModelShape
from workers.weights import llama

if TYPE_CHECKING:
    from pathlib import Path

Ids = int | list[int] | None
T = TypeVar("T")


class _Rope(msgspec.Struct):
    """Rotary embeddings; older files say `type`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None


class _Config(msgspec.Struct):
    """config.json: what decides how a Llama computes."""

    architectures: list[str]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rope_theta: float | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None  # newer files: theta and scaling together
    tie_word_embeddings: bool = False
    eos_token_id: Ids = None
    quantization_config: dict[str, Any] | None = None


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

    def __init__(self, path: Path) -> None:
        """Raises SetupError if a file is missing or damaged or the model is not supported."""
        self._path = path
        config = _read(path / "config.json", _Config)
        _check_supported(path, config)
        self.shape = _shape(config)
        llama.check_shape(path, self.shape)
        self.eos_ids = self._eos_ids(config)
        tokenizer = self._optional("tokenizer_config.json", _TokenizerConfig)
        self.special_tokens = _special_tokens(tokenizer)
        self.chat_template = self._chat_template(tokenizer)
        self._weights: dict[str, Any] = {}  # name → the open file that holds it
        with contextlib.ExitStack() as files:
            self._open_weights(files)
            self._files = files.pop_all()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(llama.llama_tensors(self.shape))

    def tensor(self, name: str) -> torch.Tensor:
        """float32 and contiguous; see Checkpoint."""
        if name == llama.LM_HEAD and self.shape.tied_embeddings:
            name = llama.EMBEDDING
        stored: torch.Tensor = self._weights[name].get_tensor(name)
        return stored.to(torch.float32).contiguous()

    def tokenizer(self) -> Tokenizer:
        path = self._path / "tokenizer.json"
        if not path.is_file():
            raise SetupError(f"{path} is missing; fetch it from where the model came from")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise SetupError(f"{path} is damaged ({error}); fetch it again") from error

    def close(self) -> None:
        """Close the files. Tensors already given stay."""
        self._weights.clear()
        self._files.close()

    def _optional(self, name: str, kind: type[T]) -> T:
        path = self._path / name
        return _read(path, kind) if path.is_file() else kind()

    def _eos_ids(self, config: _Config) -> frozenset[int]:
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
        dims: dict[str, tuple[int, ...]] = {}
        for path in self._weight_files():
            try:
                file = files.enter_context(safe_open(path, framework="pt"))
                for name in file.keys():  # noqa: SIM118 - not a mapping, it cannot be iterated
                    self._weights[name] = file
                    dims[name] = tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise SetupError(f"{path} is damaged ({error}); fetch it again") from error
        # Old exports keep two things that the model does not need: the rotary frequencies, which
        # follow from theta, and a copy of tied embeddings.
        derived = [name for name in dims if name.endswith("rotary_emb.inv_freq")]
        for name in [*derived, *([llama.LM_HEAD] if self.shape.tied_embeddings else [])]:
            dims.pop(name, None)
        llama.check_tensors(self._path, self.shape, dims)

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


def _check_supported(path: Path, config: _Config) -> None:
    if config.architectures != ["LlamaForCausalLM"]:
        names = ", ".join(config.architectures) or "unknown"
        raise SetupError(f"{path}: its architecture is {names}; supported is {llama.SUPPORTED}")
    if config.quantization_config is not None:
        raise SetupError(f"{path}: its safetensors are quantised; use a GGUF file of this model")
    if config.hidden_act != "silu":
        raise SetupError(f"{path}: its activation is {config.hidden_act!r}; supported is 'silu'")
    for rope in (config.rope_scaling, config.rope_parameters):
        kind = (rope and (rope.rope_type or rope.type)) or "default"
        if kind != "default":
            raise SetupError(
                f"{path}: it scales its rotary embeddings ({kind}); supported is {llama.SUPPORTED}"
            )


def _shape(config: _Config) -> ModelShape:
    heads = config.num_attention_heads
    newer = config.rope_parameters or _Rope()
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=config.head_dim or config.hidden_size // max(heads, 1),
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        context_length=config.max_position_embeddings,
        rope_theta=config.rope_theta or newer.rope_theta or 10_000.0,
        norm_eps=config.rms_norm_eps,
        tied_embeddings=config.tie_word_embeddings,
    )


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

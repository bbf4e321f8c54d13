"""A tokenizer from a GGUF file's metadata, as llama.cpp's key names describe it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteFallback, Decoder, Fuse, Strip
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Replace as ReplaceDecoder
from tokenizers.decoders import Sequence as Decoders
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Normalizer, Prepend, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Mapping


WORD_START = "\u2581"  # SentencePiece's spelling of a space


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type`: the members that change how text is cut."""

    NORMAL = 1
    UNKNOWN = 2  # like a control token
    CONTROL = 3  # found whole in a prompt, no text in an answer
    USER_DEFINED = 4  # found whole in a prompt, text like any other in an answer


@dataclass(frozen=True, slots=True)
class Family:
    """How a family of vocabularies cuts text before its merges apply."""

    pre_tokenizer: PreTokenizer
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is in the vocabulary is a token whatever the merges
    adds_bos: bool = False  # where the file does not say


def _words(digits: str) -> PreTokenizer:
    """The split of Llama 3 and Qwen 2, which differ only in how many digits stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    return Sequence([Split(Regex(pattern), behavior="isolated"), byte_level])


def _families() -> dict[str, Family]:
    """By `tokenizer.ggml.pre`."""
    return {
        "smollm": Family(
            Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        ),
        "llama-bpe": Family(_words(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True),
        "qwen2": Family(_words(r"\p{N}"), nfc=True),
    }


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes.

    Raises SetupError for a kind of tokenizer that is not built here, and KeyError, TypeError or
    ValueError where the metadata is damaged.
    """
    kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    families = _families()
    if kind[0] == "llama":
        tokenizer, adds_bos = _sentencepiece(metadata), True
    elif kind[0] == "gpt2" and kind[1] in families:
        family = families[str(kind[1])]
        tokenizer, adds_bos = _byte_level(metadata, family), family.adds_bos
    else:
        raise SetupError(
            f"its tokenizer is {kind[0]!r} with pre-tokenizer {kind[1]!r}; of GGUF tokenizers "
            f"only 'llama' and 'gpt2' with {', '.join(sorted(families))} are supported: use the "
            "model's safetensors folder, which carries a tokenizer.json"
        )
    _add_whole_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", []))
    if metadata.get("tokenizer.ggml.add_bos_token", adds_bos):
        bos = int(metadata["tokenizer.ggml.bos_token_id"])
        tokenizer.post_processor = TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], family: Family) -> Tokenizer:
    pairs = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("a merge of the tokenizer is not a pair")
    merges = [(left, right) for left, right in pairs]
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(_merger(tokens, merges, ignore_merges=family.ignore_merges))
    if family.nfc:
        tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = family.pre_tokenizer
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: neighbours merge into the token of the highest score, while they can."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    scores = {
        token: score
        for token, score, kind in zip(tokens, metadata["tokenizer.ggml.scores"], types, strict=True)
        if kind == TokenType.NORMAL
    }
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    merger = _merger(
        tokens,
        _merges_by_score(scores),
        unk_token=None if unknown is None else tokens[int(unknown)],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(merger)
    spaces: list[Normalizer] = [Replace(" ", WORD_START)]
    decoding: list[Decoder] = [ReplaceDecoder(WORD_START, " "), ByteFallback(), Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, Prepend(WORD_START))
        decoding.append(Strip(" ", 1, 0))
    tokenizer.normalizer = Normalizers(spaces)
    tokenizer.decoder = Decoders(decoding)
    return tokenizer


def _merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, tokens of high scores first."""
    return [
        (token[:cut], token[cut:])
        for token in sorted(scores, key=lambda token: -scores[token])
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in scores and token[cut:] in scores
    ]


def _merger(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> BPE:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        return BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"the tokenizer's merges do not fit its tokens: {error}") from error


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    def of(kind: TokenType) -> list[AddedToken]:
        special = kind is not TokenType.USER_DEFINED
        return [
            AddedToken(token, normalized=False, special=special)
            for token, token_type in zip(tokens, types, strict=bool(types))
            if token_type == kind
        ]

    tokenizer.add_special_tokens(of(TokenType.CONTROL) + of(TokenType.UNKNOWN))
    tokenizer.add_tokens(of(TokenType.USER_DEFINED))

"""SentencePiece vocabularies (Llama 2, Mistral, Mixtral) out of a GGUF file's metadata."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import BpeTrainer
from transformers.integrations.gguf import convert_gguf_tokenizer

from workers.vocabulary import Vocabulary
from workers.weights.gguf_tokenizer import build_tokenizer

CORPUS = [
    "the theatre that they thought other mothers gathered there, then they bathed together",
    "lower lowest slow slowly  flows   below the yellow willow",
    "banana bandana cabana; naïve café déjà-vu, straße",
    "1234 5678 one two three\nnew lines\n\nand\ttabs",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "[INST]"]
TYPES = [2, 3, 3, *[6] * 256, 3]
TEXTS = [
    "the other theatre",
    "slowly  the   yellow",
    "naïve déjà-vu — 漢字 🙂 e\u0301",
    "lines\n\n\nand\ttabs 1234567",
    "banananana",
    "trailing ",
    "x",
]


@pytest.fixture(scope="module")
def metadata():
    """A vocabulary learned from CORPUS: a merge that was learned earlier has a higher score."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = Metaspace()
    learner.train_from_iterator(CORPUS, BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    merged = ["".join(pair) for pair in model["merges"]]
    letters = sorted(set(model["vocab"]) - set(merged))
    tokens = [*SPECIAL, *dict.fromkeys(merged), *letters]
    learned = len(tokens) - len(SPECIAL)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*TYPES, *[1] * learned],
        "tokenizer.ggml.scores": [0.0] * len(SPECIAL) + [-float(i) for i in range(learned)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def merge_by_hand(metadata, text):
    """SentencePiece's law: the neighbours of the highest score merge, the leftmost first."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (scores[a + b], -i)
            for i, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in scores
        ]
        if not pairs:
            break
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    known = set(tokens)
    spelled = [
        part
        for piece in pieces
        for part in ([piece] if piece in known else [f"<0x{b:02X}>" for b in piece.encode()])
    ]
    return [tokens.index(piece) for piece in spelled]


@settings(max_examples=150, deadline=None)
@given(text=st.text("thelowrbandisy 1\n漢é", max_size=30))
def test_text_is_merged_by_score(metadata, text):
    tokenizer = build_tokenizer(metadata)
    assert tokenizer.encode(text, add_special_tokens=False).ids == merge_by_hand(metadata, text)


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_reads_the_same_tokens(metadata, text):
    """But where text begins with a space: there its tokenizer adds none, unlike SentencePiece."""
    theirs, _ = convert_gguf_tokenizer(
        "llama",
        {
            "tokenizer_type": "llama",
            "tokens": metadata["tokenizer.ggml.tokens"],
            "scores": metadata["tokenizer.ggml.scores"],
            "token_type": metadata["tokenizer.ggml.token_type"],
        },
    )
    ours = build_tokenizer(metadata)
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == theirs.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_bytes_are_the_text_after_a_space(metadata, text):
    tokenizer = build_tokenizer(metadata)
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(map(vocabulary.token_bytes, ids)).decode() == " " + text


def test_special_tokens_are_found_whole_and_bos_comes_first(metadata):
    tokenizer = build_tokenizer(metadata)
    inst, end = SPECIAL.index("[INST]"), SPECIAL.index("</s>")
    the = tokenizer.encode("the", add_special_tokens=False).ids
    assert tokenizer.encode("[INST]the</s>").ids == [1, inst, *the, end]
    silent = tokenizer.get_added_tokens_decoder()
    assert all(silent[token].special for token in (0, 1, end, inst))
    assert 3 not in silent  # a byte is text


def test_the_file_may_forbid_bos_and_the_first_space(metadata):
    changed = metadata | {
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = build_tokenizer(changed)
    ids = tokenizer.encode("the other").ids
    assert "".join(map(tokenizer.id_to_token, ids)) == "the▁other"
    assert tokenizer.decode(ids) == "the other"


def test_a_vocabulary_whose_lists_do_not_match_is_damaged(metadata):
    with pytest.raises(ValueError, match="zip"):
        build_tokenizer(metadata | {"tokenizer.ggml.scores": [0.0]})

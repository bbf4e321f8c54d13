from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace

from scheduler.request import Prompt
from workers.text import Text

VOCABULARY = 49152
LETTERS = "abAB é👍\n"  # few, so that stop strings are met
few_letters = st.text(LETTERS, max_size=12)
stops = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3).map(tuple)
any_ids = st.lists(st.integers(0, VOCABULARY - 1), max_size=30)
quick = settings(deadline=None, max_examples=200)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2.tokenizer()


def give(stream, ids):
    """All that the stream gives for these tokens, then at its end."""
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.finish()]


def encode(text, words):
    """As the tokenizer cuts each word alone, so that tokens end in odd places."""
    return [token for word in words if word for token in text.encode(Prompt(text=word), 0.0)]


def cut(whole, stop):
    """The law: an answer ends where a stop string is first complete; the longest there is cut."""
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
    return whole[: min(ends)[1]] if ends else whole


def certain(text, stop):
    """The law: text is held back exactly while a stop string may be beginning."""
    held = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return text[: len(text) - max(held, default=0)]


def decoded(text, ids):
    """Without the stream: the bytes that are not special, as UTF-8."""
    return b"".join(text.token_bytes(i) for i in ids if i > 16).decode(errors="replace")


@quick
@given(ids=any_ids)
def test_without_stop_the_pieces_are_what_the_tokenizer_decodes(tokenizer, smollm2_text, ids):
    whole = "".join(give(smollm2_text.stream(()), ids))
    assert whole == tokenizer.decode(ids, skip_special_tokens=True)


@quick
@given(words=st.lists(st.text(), max_size=8))
def test_a_character_is_never_split(smollm2_text, words):
    ids = encode(smollm2_text, [f"x{word}" for word in words])
    pieces = give(smollm2_text.stream(()), ids)
    whole = decoded(smollm2_text, ids)
    assert "".join(pieces) == whole
    assert "".join(pieces).count("\ufffd") == whole.count("\ufffd")


@quick
@given(words=st.lists(few_letters, max_size=6), stop=stops)
def test_an_answer_ends_where_a_stop_string_is_first_complete(smollm2_text, words, stop):
    ids = encode(smollm2_text, words)
    whole = decoded(smollm2_text, ids)
    stream = smollm2_text.stream(stop)
    pieces = give(stream, ids)
    assert "".join(pieces) == cut(whole, stop)
    assert stream.stopped == any(s in whole for s in stop)
    assert stream.sent == len("".join(pieces))


@quick
@given(words=st.lists(few_letters, max_size=6), stop=stops)
def test_no_more_is_held_back_than_must_be(smollm2_text, words, stop):
    ids = encode(smollm2_text, words)
    stream = smollm2_text.stream(stop)
    given_so_far = ""
    for n, token in enumerate(ids, start=1):
        given_so_far += stream.push(token)
        whole = decoded(smollm2_text, ids[:n])
        if stream.stopped:
            assert given_so_far == cut(whole, stop)
            break
        assert given_so_far == certain(whole.rstrip("\ufffd"), stop)


@quick
@given(ids=any_ids, words=st.lists(few_letters, max_size=4), stop=stops, data=st.data())
def test_a_stream_taken_over_goes_on_as_if_unbroken(smollm2_text, ids, words, stop, data):
    ids = [*encode(smollm2_text, words), *ids, *encode(smollm2_text, words)]
    split = data.draw(st.integers(0, len(ids)))
    unbroken = give(smollm2_text.stream(stop), ids)

    first = smollm2_text.stream(stop)
    before = [first.push(token) for token in ids[:split]]
    second = smollm2_text.stream(stop, ids[:split], first.sent)
    assert (second.sent, second.stopped) == (first.sent, first.stopped)
    assert [*before, *give(second, ids[split:])] == unbroken


@quick
@given(words=st.lists(few_letters, max_size=6), stop=stops, data=st.data())
def test_text_that_was_lost_on_the_way_is_given_again(smollm2_text, words, stop, data):
    """The ids arrived and the text with them did not."""
    ids = encode(smollm2_text, words)
    split = data.draw(st.integers(0, len(ids)))
    first = smollm2_text.stream(stop)
    before = "".join(first.push(token) for token in ids[:split])
    arrived = data.draw(st.integers(0, len(before)))
    second = smollm2_text.stream(stop, ids[:split], arrived)
    after = "".join(give(second, ids[split:]))
    assert before[:arrived] + after == cut(decoded(smollm2_text, ids), stop)
    assert second.sent == arrived + len(after)


def spell(text, words):
    """The tokens that stand for exactly these bytes."""
    by_bytes = {text.token_bytes(i): i for i in range(VOCABULARY - 1, 16, -1)}
    return [by_bytes[word] for word in words]


@pytest.mark.parametrize(
    ("tokens", "stop", "pieces"),
    [
        ([b" the", b" end"], (), [" the", " end", ""]),
        ([b"\xf0\x9f", b"\x98", b"\x80", b"!"], (), ["", "", "😀", "!", ""]),
        ([b"a", b"\xf0\x9f"], (), ["a", "", "\ufffd"]),
        ([b"\xf0\x9f", b"a"], (), ["", "\ufffda", ""]),
        ([b" the", b" end", b" of"], (" end",), [" the", "", "", ""]),
        ([b"a", b"b", b"c"], ("abd",), ["", "", "abc", ""]),
        ([b"a", b"b", b"a", b"b", b"c"], ("ababc",), ["", "", "", "", "", ""]),
        ([b"a", b"a", b"a", b"b"], ("aab",), ["", "", "a", "", ""]),
        ([b"a", b"b"], ("abc", "b"), ["", "a", ""]),
        ([b"a", b"b", b"c"], ("abcd", "xbc", "bc"), ["", "", "a", ""]),
        ([b"a", b"b"], ("bx", "abc"), ["", "", "ab"]),
        ([b"a", b"b"], ("",), ["a", "b", ""]),
        ([b"\n", b"\n"], ("\n\n",), ["", "", ""]),
    ],
)
def test_what_each_token_gives(smollm2_text, tokens, stop, pieces):
    assert give(smollm2_text.stream(stop), spell(smollm2_text, tokens)) == pieces


def test_special_tokens_give_no_text_and_end_nothing(smollm2_text):
    (a,) = spell(smollm2_text, [b"a"])
    stream = smollm2_text.stream(("<|im_end|>",))
    assert give(stream, [a, 2, 0, a]) == ["a", "", "", "a", ""]
    assert not stream.stopped


def test_an_end_that_is_no_special_token_gives_no_text_either(smollm2):
    text = Text(
        smollm2.tokenizer(),
        chat_template=None,
        eos_ids=frozenset({100}),
        special_tokens={},
        context_length=10,
    )
    assert text.token_bytes(100) != b""
    assert give(text.stream(()), [100]) == ["", ""]


def sentencepiece(decoder):
    """A vocabulary like Llama 2's: words begin with ▁, bytes stand for what has no token."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab", "ab"]
    tokenizer = Tokenizer(
        BPE(
            {word: i for i, word in enumerate(words)},
            [("▁", "a"), ("a", "b"), ("▁a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("</s>")])
    return tokenizer


LLAMA_2 = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
NEWER = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])


@pytest.mark.parametrize("decoder", [LLAMA_2, NEWER], ids=["Llama 2", "newer"])
@pytest.mark.parametrize("prompt", ["ab.", "b a."])  # a full stop has no merges: cut after it
@pytest.mark.parametrize("answer", ["a", " ab ab", "né 👍🏽 a", "\n日本", "a</s>b"])
def test_with_sentencepiece_an_answer_goes_on_from_the_prompt(decoder, prompt, answer):
    tokenizer = sentencepiece(decoder)
    text = Text(
        tokenizer,
        chat_template=None,
        eos_ids=frozenset(),
        special_tokens={},
        context_length=100,
    )
    before, both = (tokenizer.encode(words).ids for words in (prompt, prompt + answer))
    assert both[: len(before)] == before
    pieces = give(text.stream(()), both[len(before) :])
    assert tokenizer.decode(before) + "".join(pieces) == tokenizer.decode(both)

from __future__ import annotations

import msgspec
import pytest

from loadtest.api import Endpoint
from loadtest.arrivals import Arrivals
from loadtest.errors import OptionError
from loadtest.sizes import Sizes, parse
from loadtest.slo import Slo, SloClass
from loadtest.spec import Spec
from loadtest.text import WORDS, Corpus
from loadtest.traces import Scaling
from loadtest.workload import Workload

SPEC = Spec(
    endpoint=Endpoint("http://127.0.0.1:1", "m"),
    classes=[SloClass("all", Slo())],
    arrivals=Arrivals("poisson", rate=10),
    requests=40,
    input=Sizes(5, 50),
    output=Sizes(1, 20),
)


def with_(**changes) -> Workload:
    return Workload(msgspec.structs.replace(SPEC, **changes))


def bytes_and_times(workload: Workload) -> list[tuple[float, bytes]]:
    return [
        (ask.at, SPEC.endpoint.post(workload.messages(ask), ask.output)) for ask in workload.first()
    ]


def test_same_seed_same_bytes_and_times():
    assert bytes_and_times(with_(seed=7)) == bytes_and_times(with_(seed=7))
    assert bytes_and_times(with_(seed=7)) != bytes_and_times(with_(seed=8))


def test_client_processes_share_one_schedule():
    whole = list(with_().first())
    parts = [ask for part in range(3) for ask in with_().first(part, 3)]
    assert sorted(parts, key=lambda ask: ask.index) == whole


def test_prompts_have_the_asked_size_and_part_at_the_first_word_or_soon():
    workload = with_()
    prompts = [workload.messages(ask)[0]["content"].split() for ask in workload.first()]
    assert [len(words) for words in prompts] == [ask.input for ask in workload.first()]
    assert len({tuple(words[:5]) for words in prompts}) == len(prompts)


def test_a_shared_prefix_opens_every_prompt():
    workload = with_(shared_prefix=30)
    prompts = [workload.messages(ask)[0]["content"].split() for ask in workload.first()]
    assert len({tuple(words[:30]) for words in prompts}) == 1
    assert len({tuple(words[30:35]) for words in prompts}) == len(prompts)


def test_a_turn_holds_all_that_was_said_and_waits_for_the_answer():
    workload = with_(turns=3, think=2.0, requests=6)
    first, second_session = workload.first()
    assert (first.index, second_session.index, second_session.session) == (0, 3, 1)
    second = workload.follow(first, "an answer", 10.0)
    assert (second.at, second.turn, second.index) == (12.0, 1, 1)
    roles = [message["role"] for message in workload.messages(second)]
    assert roles == ["user", "assistant", "user"]
    assert workload.messages(second)[:2] == [
        *workload.messages(first),
        {"role": "assistant", "content": "an answer"},
    ]
    third = workload.follow(second, "more", 20.0)
    assert workload.follow(third, "end", 30.0) is None


def test_a_closed_loop_sends_the_next_when_one_has_ended():
    workload = with_(concurrency=2, requests=5, think=0.5)
    asks = list(workload.first())
    assert [(ask.index, ask.at) for ask in asks] == [(0, 0.0), (1, 0.0)]
    assert [(a.index, a.at) for a in [workload.follow(asks[0], "", 1.0)]] == [(2, 1.5)]
    assert [workload.follow(asks[0], "", 2.0).index for _ in range(2)] == [3, 4]
    assert workload.follow(asks[0], "", 2.0) is None


def test_a_closed_loop_ends_with_its_duration():
    workload = with_(concurrency=1, requests=None, duration=10.0)
    (ask,) = workload.first()
    assert workload.follow(ask, "", 9.0) is not None
    assert workload.follow(ask, "", 10.0) is None


def test_classes_come_by_weight_and_with_their_own_sizes():
    classes = [
        SloClass("chat", Slo(), weight=3),
        SloClass("code", Slo(), weight=1, input="200", output="7"),
    ]
    asks = list(with_(classes=classes, requests=2000).first())
    code = [ask for ask in asks if ask.group == 1]
    assert len(code) == pytest.approx(500, rel=0.15)
    assert {(ask.input, ask.output) for ask in code} == {(200, 7)}


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("64", Sizes(64, 64)),
        ("20-60", Sizes(20, 60)),
        ("lognormal:100:0.5", Sizes(1, 1000, 100.0, 0.5)),
    ],
)
def test_sizes_are_read(text, sizes):
    assert parse(text, "--input") == sizes


@pytest.mark.parametrize("text", ["", "0", "-4", "60-20", "1e3", "lognormal:x:1", "9" * 30])
def test_sizes_that_are_none_name_the_option(text):
    with pytest.raises(OptionError, match="--input"):
        parse(text, "--input")


def test_lognormal_sizes_have_their_mean():
    workload = with_(input=parse("lognormal:100:0.5", "--input"), requests=3000)
    sizes = [ask.input for ask in workload.first()]
    assert sum(sizes) / len(sizes) == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"concurrency": 4, "trace": "azure-conv"},
        {"concurrency": 4, "requests": None},
        {"concurrency": 1, "processes": 2},
    ],
)
def test_a_load_that_contradicts_itself_is_refused(changes):
    with pytest.raises(OptionError, match="--"):
        msgspec.structs.replace(SPEC, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "poisson 10/s"),
        ({"arrivals": Arrivals("gamma", 2, cv=3)}, "gamma 2/s, CV 3"),
        ({"arrivals": Arrivals("on-off", 2, on=3, off=4)}, "on-off 2/s, 3 s on, 4 s off"),
        ({"turns": 3}, "poisson 10/s, sessions of 3 turns"),
        ({"concurrency": 4, "think": 0.5}, "closed loop, 4 users, 0.5 s of thought"),
        (
            {"trace": "/x/t.csv", "scaling": Scaling(2, 0.5, 0.0625, 100, None, 3)},
            "trace t.csv, time × 2, 0.5 of its requests, "
            "lengths × 0.0625 (at most 100 in, ∞ out), ticks of 3 s spread",
        ),
    ],
)
def test_a_report_says_what_the_load_was(changes, words):
    assert msgspec.structs.replace(SPEC, **changes).load() == words


def test_a_trace_is_stretched_to_the_rate_that_a_search_asks_for():
    spec = msgspec.structs.replace(SPEC, trace="azure-conv", requests=None)
    natural = Workload(spec).realised.rate
    faster = Workload(spec.at_rate(20.0, natural, seed=3)).realised
    assert faster.rate == pytest.approx(20)
    assert faster.count == 5985
    assert Workload(SPEC.at_rate(20.0, 0.0, seed=3)).realised.rate == pytest.approx(20, rel=0.5)


def test_text_of_any_length_is_words_alone():
    for count in (1, 11, 12, 13, 100, 40_000, 100_000):
        words = Corpus(0).words("key", count).split(" ")
        assert len(words) == count
        assert set(words) <= set(WORDS)

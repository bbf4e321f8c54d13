"""Speculation changes how fast an answer comes, and nothing else."""

from __future__ import annotations

import pytest
from msgspec import structs

from scheduler.batching import Batcher
from scheduler.blocks import BlockPool
from scheduler.request import Job, Limits, Prompt, Sampling
from workers.engine import Engine
from workers.fake import FakeOptions, FakeRunner, FakeText

SAYING = "the more it snows the more it goes the more "
PARROT = FakeOptions(parrot=True, tokens=200)
HASH = FakeOptions(tokens=60)


class Ticks:
    """A clock on which every step takes the same time, so that drafts pay."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def build(options: FakeOptions, *, speculate: bool, blocks: int = 64) -> Engine:
    runner = FakeRunner(blocks, options)
    batcher = Batcher(BlockPool(blocks))
    return Engine(runner, FakeText(4096), batcher, Ticks(), speculate=speculate)


def job(name: str = "a", *, choices=(0,), seed: int = 1, **limits) -> Job:
    sampling = Sampling(seed=seed, logprobs=2)
    return Job(name, 1, "m", Prompt(text="x"), sampling, Limits(**limits), 0.0, choices=choices)


def answers(engine: Engine, jobs: list[Job]) -> dict[tuple[str, int], list]:
    """Everything that each choice of each job is given, in order."""
    for one in jobs:
        engine.add(one, list((SAYING * 2 + one.id).encode()))
    found: dict[tuple[str, int], list] = {}
    while engine.has_work:
        for o in engine.step().outputs:
            said = found.setdefault((o.id, o.choice), [])
            assert o.position == len(said)
            said.append((o.ids, o.text, o.logprobs, o.finish))
        engine.check_integrity()
    assert engine.batcher.pool.free == engine.batcher.pool.size
    return found


@pytest.mark.parametrize("options", [PARROT, HASH], ids=["drafts are right", "drafts are wrong"])
@pytest.mark.parametrize(
    "jobs",
    [
        [job()],
        [job(max_tokens=7)],
        [job(max_tokens=1)],
        [job(stop=("snows the m",))],
        [job(choices=(0, 1, 2), max_tokens=50)],
        [job(name, seed=seed, max_tokens=40) for seed, name in enumerate("abcdef")],
    ],
    ids=["to its end", "cut", "one token", "stopped", "choices", "in company"],
)
def test_what_is_said_is_the_same_with_and_without(options, jobs):
    plain = answers(build(options, speculate=False), jobs)
    assert answers(build(options, speculate=True), jobs) == plain


def test_right_drafts_save_steps_and_wrong_ones_cost_none():
    steps = {}
    for options in (PARROT, HASH):
        for speculate in (False, True):
            engine = build(options, speculate=speculate)
            answers(engine, [job(max_tokens=60)])
            steps[options, speculate] = engine.steps
    assert steps[PARROT, False] == steps[HASH, False] == 60
    assert steps[PARROT, True] <= 20
    assert steps[HASH, True] <= 60


def test_drafts_preempt_nobody_and_survive_preemption():
    jobs = [job(name, max_tokens=60) for name in "abcd"]
    wide = answers(build(PARROT, speculate=False), jobs)
    tight = build(PARROT, speculate=True, blocks=20)
    assert answers(tight, jobs) == wide
    assert tight.batcher.preempted > 0
    assert tight.speculator.accepted > 0


def test_a_replay_in_the_middle_of_a_saying_goes_on_the_same():
    whole = answers(build(PARROT, speculate=True), [job()])["a", 0]
    emitted = [token for ids, *_ in whole[:33] for token in ids]
    sent = sum(len(text) for _, text, *_ in whole[:33])
    engine = build(PARROT, speculate=True)
    base = job()
    replayed = Job(
        "a", 2, "m", base.prompt, base.sampling, base.limits, 0.0, emitted=emitted, sent=sent
    )
    engine.add(replayed, list((SAYING * 2 + "a").encode()))
    rest = []
    while engine.has_work:
        rest += [(o.ids, o.text, o.logprobs, o.finish) for o in engine.step().outputs]
    assert rest == whole[33:]


def test_accepted_tokens_are_found_in_the_prefix_cache():
    engine = build(PARROT, speculate=True)
    said = answers(engine, [job(max_tokens=60)])["a", 0]
    prompt = list((SAYING * 2 + "a").encode()) + [token for ids, *_ in said for token in ids]
    engine.add(job("again", max_tokens=1), prompt)
    (output,) = engine.step().outputs
    assert output.cached == (len(prompt) - 1) // 16 * 16


ONE_LEFT = list(b"the more it snows the more it goes the")  # and a draft is known: " more"


def lonely(options: FakeOptions, *, speculate: bool) -> Engine:
    """Its chunks leave one token of the prompt, in a step of its own, and drafts pay already."""
    engine = Engine(
        FakeRunner(64, options),
        FakeText(4096),
        Batcher(BlockPool(64), max_step_tokens=len(ONE_LEFT) - 1),
        Ticks(),
        speculate=speculate,
    )
    engine.add(job("warm", max_tokens=3), list(b"warm"))
    while engine.has_work:
        engine.step()
    return engine


@pytest.mark.parametrize(
    ("choices", "emitted"),
    [((0,), []), ((0, 1, 2), []), ((0,), ONE_LEFT[-1:])],
    ids=["fresh", "choices", "replayed"],
)
@pytest.mark.parametrize("options", [PARROT, HASH], ids=["drafts are right", "drafts are wrong"])
def test_the_last_token_of_a_prompt_alone_gives_first_tokens_only(options, choices, emitted):
    """A hand-over would go on after them: nothing may have come in between."""
    held = {}
    for speculate in (False, True):
        engine = lonely(options, speculate=speculate)
        one = structs.replace(job(choices=choices), emitted=emitted, sent=len(emitted))
        engine.add(one, ONE_LEFT[: len(ONE_LEFT) - len(emitted)], hold=True)
        steps = [engine.step() for _ in range(2)]
        held[speculate] = steps[1].held["a", 1]
        assert [len(step.outputs) for step in steps] == [0, len(choices)]
        assert held[speculate].tokens == len(ONE_LEFT)
    assert held[True].firsts == held[False].firsts


@pytest.mark.parametrize("choices", [(0,), (0, 1, 2)])
def test_choices_begin_together_though_a_draft_might_follow(choices):
    said = []
    for speculate in (False, True):
        engine = lonely(HASH, speculate=speculate)
        engine.add(job(choices=choices, max_tokens=20), ONE_LEFT)
        found: dict[int, list] = {}
        while engine.has_work:
            for output in engine.step().outputs:
                found.setdefault(output.choice, []).extend(output.ids)
        said.append(found)
    assert said[0] == said[1]

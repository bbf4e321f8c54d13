from __future__ import annotations

import pytest
import torch

from scheduler.batching import Sequence, Slice
from scheduler.request import Job, Limits, Prompt, Sampling
from workers.layout import lay_out, make_draws
from workers.native import GROUP_BLOCKS, NativeRunner, make_batch


def sequence(tokens, blocks=(), *, prompt_len=None, choice=0, forks=(), sampling=None):
    job = Job(
        id="a",
        epoch=0,
        model="",
        prompt=Prompt(ids=list(tokens)),
        sampling=sampling or Sampling(seed=0, temperature=0.0),
        limits=Limits(),
        created=0.0,
        prompt_index=6,
    )
    return Sequence(
        job=job,
        choice=choice,
        tokens=list(tokens),
        prompt_len=prompt_len or len(tokens),
        max_tokens=9,
        blocks=list(blocks),
        forks=forks,
    )


def new_decode(length, first_block=0):
    """The slice of the newest token of a sequence of `length` tokens."""
    blocks = range(first_block, first_block + -(-length // 16) + 1)
    return Slice(sequence(range(length), blocks), length - 1, length)


# ── from slices to tensors ──────────────────────────────────────────────────────────────────────


def test_slices_are_laid_out_one_after_another():
    slices = [
        Slice(sequence(range(100, 118), [5, 2, 9]), 17, 18),
        Slice(sequence(range(200, 240), [7, 1, 3]), 14, 18),
        Slice(sequence(range(300, 303), [4]), 0, 3),
        Slice(sequence([400], [8]), 0, 1),
    ]
    batch = make_batch(lay_out(slices))
    assert batch.tokens.tolist() == [117, 214, 215, 216, 217, 300, 301, 302, 400]
    assert batch.positions.tolist() == [17, 14, 15, 16, 17, 0, 1, 2, 0]
    assert batch.slots.tolist() == [33, 126, 127, 16, 17, 64, 65, 66, 128]
    assert [(p.first, p.last, p.start, p.table.tolist()) for p in batch.prefills] == [
        (1, 5, 14, [7, 1]),
        (5, 8, 0, [4]),
    ]
    (decode,) = batch.decodes
    assert decode.rows.tolist() == [8, 0]
    assert decode.tables.tolist() == [[8, 0], [5, 2]]
    assert decode.lengths.tolist() == [1, 18]
    assert batch.drawn.tolist() == [0, 7, 8]  # the second prompt is unfinished


LONG = GROUP_BLOCKS * 16


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([16], [[16]]),
        ([40, 16, 32], [[16, 32], [40]]),  # 3 blocks are more than twice 1
        ([33, 96], [[33, 96]]),
        ([33, 97], [[33], [97]]),
        ([LONG // 2, LONG // 2], [[LONG // 2, LONG // 2]]),
        ([LONG // 2, LONG // 2 + 1], [[LONG // 2], [LONG // 2 + 1]]),
        ([LONG * 3, LONG * 3], [[LONG * 3], [LONG * 3]]),
    ],
)
def test_decodes_are_grouped_by_length_and_by_what_they_read_together(lengths, groups):
    batch = make_batch(lay_out([new_decode(length) for length in lengths]))
    assert [decode.lengths.tolist() for decode in batch.decodes] == groups
    rows = [row for decode in batch.decodes for row in decode.rows.tolist()]
    assert sorted(rows) == list(range(len(lengths)))


def test_each_choice_of_a_finished_prompt_draws_from_the_same_row():
    sampling = Sampling(seed=8)
    draws = make_draws(
        [
            Slice(sequence(range(9), [0]), 0, 5),
            Slice(sequence(range(9), [0], forks=(1, 2), sampling=sampling), 0, 9),
            Slice(sequence(range(9), [0], prompt_len=7, choice=3), 8, 9),
        ]
    )
    told = [(d.row, d.prompt_index, d.choice, d.position, d.sampling.seed) for d in draws]
    assert told == [(0, 6, 0, 0, 8), (0, 6, 1, 0, 8), (0, 6, 2, 0, 8), (1, 6, 3, 2, 0)]


# ── tiny models with random weights ─────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(4)
    lengths = (1, 2, 15, 16, 17, 33, 50, 100)
    return [torch.randint(300, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize(
    ("max_sequences", "max_step_tokens", "blocks"),
    [
        (1, 512, 16),  # alone and whole
        (8, 512, 64),
        (8, 9, 64),  # a budget of one token beside the decodes
        (3, 20, 64),
        (8, 64, 12),  # too few blocks for all: sequences are preempted and computed anew
    ],
)
def test_greedy_tokens_are_those_of_transformers_however_they_are_scheduled(
    bench, tiny, prompts, max_sequences, max_step_tokens, blocks
):
    exact, oracle = bench
    hf, checkpoint = tiny
    runner = NativeRunner(checkpoint, blocks, threads=1)
    ours = exact.complete(
        runner,
        prompts,
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        new_tokens=20,
    )
    for prompt, tokens in zip(prompts, ours, strict=True):
        case = oracle.continue_prompt(hf, prompt, 20)
        assert exact.compare_tokens(case, "", tokens).holds


def test_drawn_tokens_do_not_depend_on_how_they_are_scheduled(bench, tiny, prompts):
    exact, _ = bench
    _, checkpoint = tiny
    sampling = Sampling(seed=5, temperature=1.5, top_p=0.95, frequency_penalty=0.5)

    def run(blocks, **limits):
        runner = NativeRunner(checkpoint, blocks, threads=1)
        return exact.complete(runner, prompts, new_tokens=20, sampling=sampling, **limits)

    alone = run(64, max_sequences=1, max_step_tokens=512)
    assert alone == run(64, max_sequences=8, max_step_tokens=9)
    assert alone == run(12, max_sequences=8, max_step_tokens=64)
    assert len({tuple(tokens) for tokens in alone}) == len(prompts)


def test_forks_draw_with_the_noise_of_their_own_choice(tiny):
    _, checkpoint = tiny
    runner = NativeRunner(checkpoint, 4, threads=1)
    sampling = Sampling(seed=5, temperature=3.0)
    forked = sequence(range(20), [0, 1], forks=(1, 2, 3), sampling=sampling)
    together = runner.run([Slice(forked, 0, 20)])
    apart = [
        runner.run([Slice(sequence(range(20), [2, 3], choice=c, sampling=sampling), 0, 20)])[0]
        for c in range(4)
    ]
    assert together == apart
    assert len({s.token for s in together}) > 1


def test_an_unfinished_prompt_draws_nothing_and_leaves_its_kv_in_the_cache(tiny):
    _, checkpoint = tiny
    runner = NativeRunner(checkpoint, 4, threads=1)
    assert runner.run([Slice(sequence(range(20), [3, 1]), 0, 18)]) == []
    written = runner.cache.data.any(axis=(0, 1, 4, 5))  # [blocks, 16]
    assert written.sum(axis=1).tolist() == [0, 2, 0, 16]


# ── the real model ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def smollm2_runner(smollm2):
    # One thread: two that share a core with another process wait for each other most of the time.
    return NativeRunner(smollm2, 1024, threads=1)


@pytest.mark.model
def test_the_kept_answers_are_what_promise_and_prompts_ask_for(bench, smollm2):
    _, oracle = bench
    cases = oracle.load_cases()
    assert [case.prompt for case in cases] == oracle.make_prompts(smollm2.tokenizer())
    lengths = [len(case.prompt) for case in cases]
    assert len(cases) >= 20
    assert (min(lengths), max(lengths)) == (1, 2000)
    assert all(len(case.tokens) == 64 for case in cases)


@pytest.mark.model
def test_the_kept_answers_are_still_those_of_transformers(bench):
    _, oracle = bench
    model = oracle.load_transformers()
    for case in [c for c in oracle.load_cases() if len(c.prompt) in (1, 16)][:2]:
        assert oracle.continue_prompt(model, case.prompt, 24).tokens == case.tokens[:24]


@pytest.mark.model
@pytest.mark.timeout(300)  # 25 s on an idle core
@pytest.mark.parametrize(
    ("mode", "lengths"),
    [
        ("batch 16", {*range(700), 2000}),  # bench/exact.py runs all of them in every mode
        ("alone", {1, 2, 16, 17}),
        ("chunks of 33", {31, 33, 200, 257}),
    ],
)
def test_smollm2_says_what_transformers_says(bench, smollm2_runner, mode, lengths):
    exact, oracle = bench
    cases = [case for case in oracle.load_cases() if len(case.prompt) in lengths]
    verdicts = exact.compare(smollm2_runner, cases, mode)
    assert [verdict for verdict in verdicts if not verdict.holds] == []

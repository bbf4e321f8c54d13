"""`fast` mode behind the engine: nothing about scheduling, threads or drafts changes a number.

Answers are compared with their logprobs, which are equal only if the logits are, to the last bit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from kernels import dispatch
from scheduler.batching import Batcher
from scheduler.blocks import BlockPool
from scheduler.errors import SetupError
from scheduler.messages import Address, Rates, Role
from scheduler.request import Grammar
from scheduler.transport import listen
from serving.members import Members
from workers.build import EngineOptions, Model, build
from workers.engine import Engine
from workers.fast import FastRunner
from workers.native import NativeRunner
from workers.service import WorkerConfig, WorkerService
from workers.speculate import MOST_ROWS
from workers.text import Text
from workers.weights.checkpoint import open_checkpoint

kernels = pytest.mark.skipif(
    not dispatch.instruction_sets(),
    reason="the kernels' library is not built: there was no C++ compiler",
)

REPOSITORY = Path(__file__).parents[2]
SAYING = list(b"the more it snows the more it goes the more it goes on snowing. ")
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 24}
PROMPTS = [
    SAYING * 2 + list(b"the more"),
    SAYING[:1],
    SAYING[:16],
    SAYING[:33],
    list(range(100)),
    list(range(200, 30, -1)),
]


class Ticks:
    """A clock on which every step takes the same time, so that drafts pay."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture(scope="module")
def folder(tiny_model):
    """Makes a model's folder that a worker can serve: family, configuration → its path."""

    def make(family, **config):
        path = tiny_model(family, **config)[1]
        words = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
        tokenizer = Tokenizer(BPE(words, []))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.decoder = ByteLevelDecoder()
        tokenizer.save(str(path / "tokenizer.json"))
        return path

    return make


@pytest.fixture(scope="module", params=["Qwen3", "Qwen3Moe"])
def tiny(folder, request):
    config = MOE if request.param == "Qwen3Moe" else {"head_dim": 24}
    return open_checkpoint(folder(request.param, vocab_size=256, **config))


@pytest.fixture
def kv_dtype():
    return "float16"


@pytest.fixture
def engine(tiny, kv_dtype):
    """Makes engines of the tiny model."""

    def make(blocks=80, threads=1, budget=512, sequences=16, *, speculate=False, runner=FastRunner):
        options = (budget + MOST_ROWS, kv_dtype) if runner is FastRunner else ()
        batcher = Batcher(BlockPool(blocks), max_step_tokens=budget, max_sequences=sequences)
        made = runner(tiny, blocks, threads, *options)
        return Engine(made, Text.from_checkpoint(tiny), batcher, Ticks(), speculate=speculate)

    return make


def finish(engine, found):
    """Run to the end; appends what each choice is given."""
    while engine.has_work:
        for output in engine.step().outputs:
            found.setdefault((output.id, output.choice), []).append(
                (output.ids, output.logprobs, output.finish)
            )
        engine.check_integrity()
    assert engine.batcher.pool.free == engine.batcher.pool.size
    return found


@pytest.fixture
def jobs(make_job):
    """One job a prompt: the even ones greedy, the odd ones drawn, some with two choices."""
    return [
        make_job(
            id=str(number),
            choices=(0, 1) if number % 3 == 2 else (0,),
            temperature=0.0 if number % 2 == 0 else 1.0,
            logprobs=3,
            max_tokens=24,
            ignore_eos=True,
        )
        for number in range(len(PROMPTS))
    ]


def together(engine, jobs):
    for job, prompt in zip(jobs, PROMPTS, strict=True):
        engine.add(job, prompt)
    return finish(engine, {})


def alone(engine, jobs):
    found = {}
    for job, prompt in zip(jobs, PROMPTS, strict=True):
        made = engine()
        made.add(job, prompt)
        finish(made, found)
    return found


# ── the same numbers ────────────────────────────────────────────────────────────────────────────


@kernels
@pytest.mark.parametrize(
    "scheduling",
    [
        {},
        {"budget": 1},  # token by token
        {"budget": 7},
        {"budget": 65},
        {"sequences": 2},
        {"threads": 2},
        {"threads": 3, "budget": 40},
        {"blocks": 18},  # too few for all: sequences are preempted and computed anew
    ],
    ids=str,
)
def test_batch_mates_chunks_threads_and_preemption_change_no_bit(engine, jobs, scheduling):
    made = engine(**scheduling)
    assert together(made, jobs) == alone(engine, jobs)
    assert ("blocks" in scheduling) == (made.batcher.preempted > 0)


@kernels
@pytest.mark.parametrize("kv_dtype", ["int8"])
def test_an_int8_cache_gives_the_same_bits_under_all_of_that_at_once(engine, jobs):
    made = engine(blocks=18, budget=23, threads=2, speculate=True)
    assert together(made, jobs) == alone(engine, jobs)
    assert made.batcher.preempted > 0
    assert made.speculator.drafted > 0


@kernels
def test_drafts_change_no_bit(engine, jobs):
    made = engine(speculate=True)
    assert together(made, jobs) == alone(engine, jobs)
    assert made.speculator.drafted > 0


@kernels
@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
def test_a_cached_prefix_changes_no_bit(engine, make_job):
    made, cold = engine(), None
    for name, cached in (("cold", 0), ("warm", 128)):
        job = make_job(id=name, logprobs=3, max_tokens=20, ignore_eos=True)
        made.add(job, PROMPTS[0])
        first = made.step().outputs
        assert first[0].cached == cached
        found = [(o.ids, o.logprobs) for o in first]
        found += [given[:2] for given in finish(made, {})[name, 0]]
        cold = cold or found
        assert found == cold


@kernels
@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
@pytest.mark.parametrize("choices", [(0,), (0, 1, 2)])
def test_a_cache_handed_to_another_engine_changes_no_bit(engine, make_job, move_kv, choices):
    job = make_job(choices=choices, logprobs=3, max_tokens=20, ignore_eos=True)
    whole = engine()
    whole.add(job, PROMPTS[4])
    expected = finish(whole, {})
    prefill, decode = engine(budget=30), engine(threads=2)
    decode.reserve(job, PROMPTS[4])
    (sequence,) = decode.step().granted.values()
    prefill.add(job, PROMPTS[4], hold=True)
    found, result = {}, prefill.step()
    while not result.held:
        result = prefill.step()
    for output in result.outputs:
        found[output.id, output.choice] = [(output.ids, output.logprobs, output.finish)]
    ((key, held),) = result.held.items()
    move_kv(held, prefill, sequence, decode)
    prefill.cancel(key)
    assert decode.resume(key, held.firsts)
    assert finish(decode, found) == expected


@kernels
def test_a_prompt_is_read_alike_in_any_pieces(engine, make_job):
    """170 tokens: more than the rows whose logits exist at a time."""

    def echo(made):
        job = make_job(echo=True, logprobs=4, max_tokens=0)
        made.add(job, PROMPTS[5])
        outputs = []
        while made.has_work:
            outputs += made.step().outputs
        return outputs[0].echo.tokens

    whole = echo(engine())
    assert len(whole) == len(PROMPTS[5]) - 1
    assert all(echo(engine(budget=budget)) == whole for budget in (1, 50, 64, 100))
    exact = echo(engine(runner=NativeRunner))
    errors = [abs(a.logprob - b.logprob) for a, b in zip(whole, exact, strict=True)]
    assert 0 < sum(errors) / len(errors) < 0.3, "near, but not the same mode"


# ── which mode runs ─────────────────────────────────────────────────────────────────────────────


def built(path, **options):
    return build(Model("m", str(path)), EngineOptions(kv_tokens=256, threads=1, **options))[0]


@kernels
@pytest.mark.parametrize(
    ("family", "config", "why"),
    [
        ("Llama", {}, None),
        ("Mixtral", {"num_local_experts": 4}, None),
        ("Qwen3Moe", {**MOE, "intermediate_size": 100}, None),  # no layer has this width
        ("Qwen3Moe", {**MOE, "intermediate_size": 100, "mlp_only_layers": [1]}, "multiples of 32"),
        ("Qwen3Moe", {**MOE, "moe_intermediate_size": 40}, "multiples of 32"),
        ("Llama", {"intermediate_size": 100}, "multiples of 32"),
        ("Qwen3", {"head_dim": 20}, "multiples of 32"),
    ],
)
def test_a_model_that_the_kernels_cannot_run_runs_exactly_and_that_is_said(
    folder, caplog, family, config, why
):
    with caplog.at_level(logging.WARNING):
        engine = built(folder(family, **config))
    assert type(engine.runner) is (NativeRunner if why else FastRunner)
    assert [why in record.getMessage() for record in caplog.records] == [True] * bool(why)


@kernels
def test_exact_is_what_is_asked_for(folder):
    assert type(built(folder("Llama"), mode="exact").runner) is NativeRunner


@kernels
def test_an_int8_cache_is_fast_modes_alone(folder):
    path = folder("Llama")
    cache = built(path, kv_dtype="int8").runner.cache
    assert (cache.dtype, cache.data.shape[-1]) == ("int8", cache.head_dim + 2)
    with pytest.raises(SetupError, match="leave out --kv-dtype"):
        built(path, mode="exact", kv_dtype="int8")


@kernels
def test_torch_stays_out_of_a_fast_worker(folder, make_job):
    """It takes 190 MB and a second: whatever a job wants is done without it."""
    jobs = [
        make_job(id="scored", echo=True, logprobs=2, max_tokens=3),
        make_job(id="embedded", embed=True, max_tokens=0),
        make_job(id="structured", grammar=Grammar("regex", "a+", "f"), max_tokens=2),
    ]
    program = (
        "import sys, msgspec, motley, workers.service; from workers.build import *; "
        "from scheduler.request import Job; "
        "engine, _ = build(Model('m', sys.argv[1]), EngineOptions(kv_tokens=256, threads=1))\n"
        "for job in msgspec.json.decode(sys.argv[2], type=list[Job]): engine.add(job, [65] * 20)\n"
        "while engine.has_work: engine.step()\n"
        "print(type(engine.runner).__name__, engine.tokens, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder("Llama"), msgspec.json.encode(jobs)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "FastRunner 5 False\n", done.stderr  # an embedding is no token


def test_without_torch_exact_mode_says_what_to_install(folder):
    program = (
        "import sys; sys.modules['torch'] = None; from workers.build import *; "
        "build(Model('m', sys.argv[1]), EngineOptions(kv_tokens=256, threads=1, mode='exact'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder("Llama")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr.endswith("pip install '.[engine,exact]'\n")


def test_without_the_library_a_worker_runs_exactly_and_says_so_once(folder, tmp_path):
    """An installation that had no compiler: the package without its library."""
    for package in ("kernels", "scheduler", "workers"):
        shutil.copytree(
            REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "*.pyc")
        )
    program = (
        "import sys; from workers.build import *; "
        "engine, _ = build(Model('m', sys.argv[1]), EngineOptions(kv_tokens=256, threads=1)); "
        "print(type(engine.runner).__name__, engine.runner.cache.dtype)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder("Llama")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "NativeRunner float32\n", done.stderr
    assert done.stderr.count("install a C++ compiler") == 1


@kernels
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mode": "exact", "quantize": "int4"}, "in exact mode, .* differs from a's fast mode"),
        ({"quantize": "int8"}, "int8 of 29 F32, .* differs from a's fast mode, weights int4"),
        ({}, "weights 29 F32, .* differs from a's"),
    ],
)
@pytest.mark.asyncio
async def test_workers_whose_numbers_differ_do_not_join_one_pool(folder, until, options, why):
    members, secret, path = Members(), b"of this test", folder("Llama")

    async with listen("127.0.0.1", 0, secret, members.serve) as bound:

        def start(name, **options):
            config = WorkerConfig(name, "m", Role.MIXED, (Address(*bound),), secret, "127.0.0.1")
            service = WorkerService(config, built(path, **options), Rates(1.0, 1.0))
            return asyncio.create_task(service.run())

        first = start("a", quantize="int4")
        second, stranger = None, None
        try:
            await until(lambda: members.get("a"))
            second, stranger = start("b", quantize="int4"), start("c", **options)
            await until(lambda: members.get("b"))
            with pytest.raises(SetupError, match=why):
                await asyncio.wait_for(stranger, 10)
            assert not members.get("c")
        finally:
            tasks = [task for task in (first, second, stranger) if task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

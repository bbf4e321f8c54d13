"""What transformers says: greedy continuations of fixed prompts, in fp32, kept in a file for tests.

    python bench/oracle.py --write    recompute tests/workers/oracle_smollm2.json (minutes)

The model is read by transformers' own GGUF loader, so nothing of ours has touched its weights.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from workers.weights.catalogue import resolve
from workers.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from scheduler.request import TokenIds

MODEL = "smollm2-135m-instruct"
FILE = Path(__file__).parents[1] / "tests" / "workers" / "oracle_smollm2.json"
NEW_TOKENS = 64
NEAR_TIE = 1e-3  # closer top two logits are a tie to fp32 sums in another order
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a Python function that reverses a list.",
)
# Around one block, one step's budget, and up to the longest promised.
LENGTHS = (
    1,
    2,
    3,
    7,
    15,
    16,
    17,
    31,
    33,
    50,
    64,
    100,
    129,
    200,
    255,
    257,
    333,
    512,
    777,
    1200,
    2000,
)


class Case(msgspec.Struct, frozen=True):
    """A prompt, what transformers makes of it, and how sure it was."""

    prompt: list[int]
    tokens: list[int]
    smallest_gap: float  # between the top two logits, over all of `tokens`
    near_ties: dict[int, float]  # position → gap, below NEAR_TIE


def load_cases() -> list[Case]:
    return msgspec.json.decode(FILE.read_bytes(), type=list[Case])


def load_transformers() -> Any:
    """The model as transformers dequantises it: LlamaForCausalLM, fp32."""
    from transformers import AutoModelForCausalLM

    path = resolve(MODEL).path
    return AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()


def continue_prompt(model: Any, prompt: TokenIds, new_tokens: int = NEW_TOKENS) -> Case:
    """Greedy, past any end-of-text token."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    gaps = []
    for logits in out.logits:
        best, second = logits[0].topk(2).values.tolist()
        gaps.append(round(best - second, 6))
    return Case(
        prompt=prompt,
        tokens=out.sequences[0, len(prompt) :].tolist(),
        smallest_gap=min(gaps),
        near_ties={i: gap for i, gap in enumerate(gaps) if gap < NEAR_TIE},
    )


def make_prompts(tokenizer: Tokenizer) -> list[TokenIds]:
    """Three chats, then prose cut to LENGTHS."""
    chats = [
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS
    ]
    prompts = [tokenizer.encode(chat, add_special_tokens=False).ids for chat in chats]
    for length in LENGTHS:
        ids = tokenizer.encode(_prose(length), add_special_tokens=False).ids
        prompts.append(ids[:length])
    return prompts


def _prose(seed: int) -> str:
    """Some 3,000 words of diary, other ones for each seed."""
    rng = random.Random(seed)
    sentences = [
        f"On {rng.choice(('Monday', 'Tuesday', 'Friday', 'Sunday'))} the "
        f"{rng.choice(('baker', 'captain', 'teacher', 'gardener', 'judge'))} "
        f"{rng.choice(('sold', 'found', 'repaired', 'described', 'lost'))} "
        f"{rng.randrange(2, 90)} {rng.choice(('lamps', 'maps', 'loaves', 'clocks', 'letters'))} "
        f"{rng.choice(('near the harbour', 'behind the library', 'in the old mill'))}, "
        f"{rng.choice(('although it rained', 'and nobody asked why', 'as planned'))}."
        for _ in range(200)
    ]
    return " ".join(sentences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = open_checkpoint(resolve(MODEL).path)
    model = load_transformers()
    cases = []
    for prompt in make_prompts(checkpoint.tokenizer()):
        case = continue_prompt(model, prompt)
        print(f"{len(prompt):5} tokens: smallest gap {case.smallest_gap:.6f}", flush=True)
        cases.append(case)
    if args.write:
        lines = (msgspec.json.encode(case).decode() for case in cases)
        FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()

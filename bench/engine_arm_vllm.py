"""vLLM's CPU build as bench/engine.py runs it: its engine in this process, stepped by hand.

In one process and with OpenMP unbound, because on two cores its default (three processes, one of
them busy-waiting on the core of a bound worker) is many times slower. Prefix caching is off: no two
prompts are alike.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import vllm
from engine_process import Emitted, Facts, Setup, Tokens, serve
from vllm import LLM, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator


class Vllm:
    """Variants: compiled fp32 (the default, as vLLM's own), eager (fp32), bfloat16 (compiled)."""

    def __init__(self, setup: Setup) -> None:
        dtype = "bfloat16" if setup.variant == "bfloat16" else "float32"
        width = 2 if dtype == "bfloat16" else 4
        self.llm = LLM(
            setup.folder,
            dtype=dtype,
            enforce_eager=setup.variant == "eager",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=setup.context,
            max_num_seqs=setup.sequences,
            disable_log_stats=True,
            kv_cache_memory_bytes=1 << 30,
        )
        config = self.llm.llm_engine.model_config.hf_config
        per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        folder = os.scandir(setup.folder)
        stored = sum(file.stat().st_size for file in folder if file.name.endswith(".safetensors"))
        self.facts = Facts(
            version=vllm.__version__,
            weight_bytes=stored * width // 4,
            kv_bytes=setup.kv_tokens * per_token * width,
        )
        self.runs = 0

    def run(self, prompts: list[Tokens], new_tokens: int) -> Iterator[Emitted]:
        self.runs += 1
        params = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        return self._steps(prompts, params)

    def processes(self) -> list[int]:
        return [os.getpid()]

    def _steps(self, prompts: list[Tokens], params: SamplingParams) -> Iterator[Emitted]:
        engine = self.llm.llm_engine
        for index, prompt in enumerate(prompts):
            engine.add_request(f"{self.runs}-{index}", {"prompt_token_ids": prompt}, params)
        seen = [0] * len(prompts)
        while engine.has_unfinished_requests():
            emitted = []
            for output in engine.step():
                request = int(output.request_id.split("-")[1])
                tokens = output.outputs[0].token_ids
                emitted += [(request, token) for token in tokens[seen[request] :]]
                seen[request] = len(tokens)
            if emitted:
                yield emitted


if __name__ == "__main__":
    serve(Vllm)

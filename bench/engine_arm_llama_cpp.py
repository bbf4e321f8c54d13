"""llama.cpp as bench/engine.py runs it: its C interface, one `llama_batch` over all sequences.

The wheel's own HTTP server takes one request at a time, so requests at once go to the library as
llama.cpp's C++ server would put them: every sequence in one batch a step. Without HTTP, JSON and
sampler chain this is more than any server of it can reach.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
from engine_process import Emitted, Facts, Setup, Tokens, serve

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH = 2048  # tokens of one llama_decode, its default
F16_BYTES = 2


class LlamaCpp:
    def __init__(self, setup: Setup) -> None:
        llama_cpp.llama_backend_init()
        self.setup = setup
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(setup.model.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot read {setup.model}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.context: Any = None
        heads = llama_cpp.llama_model_n_head_kv(self.model)
        width = llama_cpp.llama_model_n_embd(self.model) // llama_cpp.llama_model_n_head(self.model)
        layers = llama_cpp.llama_model_n_layer(self.model)
        self.facts = Facts(
            version=llama_cpp.__version__,
            weight_bytes=llama_cpp.llama_model_size(self.model),
            kv_bytes=setup.kv_tokens * layers * 2 * heads * width * F16_BYTES,
        )

    def run(self, prompts: list[Tokens], new_tokens: int) -> Iterator[Emitted]:
        self._make_context(len(prompts))
        return self._steps(prompts, new_tokens)

    def processes(self) -> list[int]:
        return [os.getpid()]

    def _make_context(self, sequences: int) -> None:
        """A context of as many sequences as there are requests: each has its own part of the KV."""
        if self.context:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.setup.context * sequences
        params.n_batch = BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.setup.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no memory for {params.n_ctx} tokens of KV cache")

    def _steps(self, prompts: list[Tokens], new_tokens: int) -> Iterator[Emitted]:
        """Prompts in batches as full as they get, then one token of each sequence a step."""
        feed = [
            (sequence, position, token, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        newest: list[tuple[int, int]] = []
        for start in range(0, len(feed), BATCH):
            drawn = self._decode(feed[start : start + BATCH])
            newest += drawn
            if drawn:
                yield drawn
        for step in range(new_tokens - 1):
            rows = [(s, len(prompts[s]) + step, token, True) for s, token in newest]
            newest = self._decode(rows)
            yield newest

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> Emitted:
        """One llama_decode of (sequence, position, token, draws?) rows; greedy."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (sequence, position, token, draws) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, draws
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if code := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {code}")
        return [(row[0], self._draw(i)) for i, row in enumerate(rows) if row[3]]

    def _draw(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())


if __name__ == "__main__":
    serve(LlamaCpp)

"""transformers as bench/engine.py runs it: one padless static batch, greedy, without `generate`.

`generate` adds checks and copies to every step; this loop is what the model itself can do.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import transformers
from engine_process import Emitted, Facts, Setup, Tokens, serve

if TYPE_CHECKING:
    from collections.abc import Iterator


class Transformers:
    """Variants: float32 (the default), bfloat16."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        dtype = getattr(torch, setup.variant or "float32")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            setup.folder, dtype=dtype, local_files_only=True
        ).eval()
        config = self.model.config
        per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        self.facts = Facts(
            version=transformers.__version__,
            weight_bytes=sum(p.numel() * p.element_size() for p in self.model.parameters()),
            kv_bytes=setup.kv_tokens * per_token * dtype.itemsize,
        )

    @torch.inference_mode()
    def run(self, prompts: list[Tokens], new_tokens: int) -> Iterator[Emitted]:
        tokens, past = torch.tensor(prompts), None
        for _ in range(new_tokens):
            out = self.model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            yield list(enumerate(tokens[:, 0].tolist()))

    def processes(self) -> list[int]:
        return [os.getpid()]


if __name__ == "__main__":
    serve(Transformers)

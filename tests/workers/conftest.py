"""What the workers' tests share: the real model, read once."""

from __future__ import annotations

import pytest

from workers.weights.catalogue import resolve
from workers.weights.checkpoint import open_checkpoint


@pytest.fixture(scope="session")
def smollm2_path():
    """The GGUF file of SmolLM2-135M-Instruct; the catalogue fetches it if it is not here yet."""
    return resolve("smollm2-135m-instruct").path


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """The same, opened: reading its vocabulary takes seconds."""
    checkpoint = open_checkpoint(smollm2_path)
    yield checkpoint
    checkpoint.close()

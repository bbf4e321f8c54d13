"""Write a GGUF model as fp32 safetensors, for the engines that cannot read it quantised.

    python bench/engine_checkpoint.py MODEL.gguf FOLDER

The weights are those of the file, dequantised by transformers; nothing of ours touches them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def write(model: Path, folder: Path) -> None:
    """The folder appears whole or not at all."""
    loaded = AutoModelForCausalLM.from_pretrained(
        str(model.parent), gguf_file=model.name, dtype=torch.float32
    )
    # A model that came from GGUF refuses to be saved: move its weights into a plain one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        plain.save_pretrained(Path(scratch) / folder.name)
        (Path(scratch) / folder.name).rename(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))

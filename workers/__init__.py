"""The compute edge: text to tokens and back, the engine step, the model, its KV cache."""

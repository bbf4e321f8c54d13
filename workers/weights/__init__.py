"""Where a model comes from, and how its tensors get into memory."""

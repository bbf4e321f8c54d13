"""The core: pure decisions. Events in, instructions out."""

"""One operation per file, with a plain-torch reference that defines it."""

"""Prompts of a wished size, and really shared where a trace says that they were.

The words are common enough to be one token each in the usual vocabularies, so a prompt of n words
has some n tokens; reports state what the endpoint counted.
"""

from __future__ import annotations

import hashlib
import random

_WORDS = """
the of and to in is was he for it with as his on be at by had not are but from or have an they
which one you were all her she there would their we him been has when who will no more if out so
said what up its about than into them can only other time new some could these two may first then
do any like my now over such our man me even most made after also did many off before must well
back through years much where your way down should because long each just state those people too
how good world year still see own work men life great between under last part day being place
house home old came water room night school small give head right side find fact high hand point
set eyes turn face best tell light place door line done city young open feet car white full force
hope story public field court money woman ground words love class air road level read seen body
sound south hard music table game power north plan free need form human tree book land king
"""
WORDS = tuple(dict.fromkeys(_WORDS.split()))

_CORPUS_WORDS = 32_768


class Corpus:
    """Endless text by name: the same seed and key give the same words, other keys others."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        words = random.Random(f"{seed}:corpus").choices(WORDS, k=_CORPUS_WORDS)
        self._words = words + words  # so that a slice never needs to wrap

    def words(self, key: str, count: int) -> str:
        """`count` words. The first are a function of the key alone, so that prompts under
        different keys part at once and a prefix cache finds nothing that was not meant."""
        digest = hashlib.blake2b(f"{self._seed}:{key}".encode(), digest_size=16).digest()
        lead = [WORDS[byte % len(WORDS)] for byte in digest[:12]]
        parts = [" ".join(lead[:count])]
        left = count - len(lead)
        offset = int.from_bytes(digest[12:], "big") % _CORPUS_WORDS
        while left > 0:
            parts.append(" ".join(self._words[offset : offset + min(left, _CORPUS_WORDS)]))
            left -= _CORPUS_WORDS
        return " ".join(parts)

    def blocks(self, ids: tuple[int, ...], block: int, count: int) -> str:
        """A prompt of `count` words made of blocks of `block`; equal ids give equal text."""
        parts = []
        for at, name in enumerate(ids):
            left = count - at * block
            if left <= 0:
                break
            parts.append(self.words(f"block {name}", min(block, left)))
        missing = count - block * len(ids)
        if missing > 0:
            parts.append(self.words(f"tail {ids}", missing))
        return " ".join(parts)

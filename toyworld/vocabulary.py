"""The byte-pair vocabulary of toy CLIP and ViCLIP: what the world's sentences need of CLIP's 48,894 merges.

With a row of embeddings for each of them these small networks would be little else. Sentences of the world are cut
into the same tokens as by CLIP's own vocabulary, other texts into more and shorter ones.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

from open_clip import SimpleTokenizer

from storymem.scorers.clip import VOCABULARY_FILE
from toyworld.damage import DAMAGES
from toyworld.text import world_sentences

COMMON = 1000  # CLIP's first merges, of which ordinary words are made
STORIES = 300  # enough that every word occurs
VOCABULARY = 1949  # tokens: 512 for bytes, one a merge, start and end of text

Merge = tuple[str, str]


@cache
def merges() -> tuple[Merge, ...]:
    """The merges kept, in CLIP's order: its first ones, and all that make a part of one of the world's words."""
    clip = SimpleTokenizer()
    texts = " ".join([*world_sentences(STORIES), *DAMAGES]).lower()
    words = {f"{word}</w>" for word in clip.pat.findall(texts)}
    ranked = sorted(clip.bpe_ranks, key=clip.bpe_ranks.__getitem__)
    every_word = " ".join(words)
    return tuple(pair for rank, pair in enumerate(ranked) if rank < COMMON or "".join(pair) in every_word)


def write_vocabulary(folder: Path) -> Path:
    """Write the vocabulary beside a model's weights, as open_clip's `SimpleTokenizer` and our scorers read it."""
    path = folder / VOCABULARY_FILE
    lines = ["merges of CLIP's vocabulary", *(" ".join(pair) for pair in merges())]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return path

"""The small vocabulary of toy CLIP and ViCLIP."""

from __future__ import annotations

from pathlib import Path

from storymem.scorers.clip import ClipTokenizer
from toyworld.vocabulary import VOCABULARY, merges, write_vocabulary
from toyworld.world import HELD_OUT, story


def pieces(tokenizer: ClipTokenizer, text: str) -> list[str]:
    inner = tokenizer._tokenizer
    return [inner.decoder[i] for i in inner.encode(text)]


def test_it_has_as_many_tokens_as_the_networks_have_rows(tmp_path: Path) -> None:
    tokenizer = ClipTokenizer(77, write_vocabulary(tmp_path))
    assert len(merges()) + 514 == tokenizer.vocab_size == VOCABULARY


def test_unseen_sentences_of_the_world_are_cut_as_by_clip(tmp_path: Path) -> None:
    small, clip = ClipTokenizer(77, write_vocabulary(tmp_path)), ClipTokenizer(77)
    for seed in range(HELD_OUT, HELD_OUT + 40):
        for text in [shot.prompt for shot in story(seed, looks=True).shots]:
            assert pieces(small, text) == pieces(clip, text)


def test_other_texts_are_read_whole_in_smaller_pieces(tmp_path: Path) -> None:
    small, clip = ClipTokenizer(77, write_vocabulary(tmp_path)), ClipTokenizer(77)
    text = "a tired astronaut repairs the antenna under a violet sky"
    assert "".join(pieces(small, text)).replace("</w>", " ").strip() == text
    assert clip.token_counts([text])[0] < small.token_counts([text])[0] < 30

"""Hours of a film on named cards: operations of the denoiser by a rate, published or calculated."""

from __future__ import annotations

from typing import NamedTuple

# Operations of a shot of Wan2.2-A14B without memory: 480p, 81 frames, 1.68 PFLOP a forward.
_FORWARD = 1.68
# Of a card's dense bfloat16 TFLOP/s by its vendor: by the published time the H100 reaches 41 % of its 989.
_SHARE = 0.4


class Card(NamedTuple):
    """A card and what the denoiser reaches on it.

    Args:
        name: with its VRAM.
        tflops: a second.
        source: of the rate.
    """

    name: str
    tflops: float
    source: str


#: Nothing here was measured by this project. Published times are of the official code on 480p and 81 frames without
#: memory: the two are of different reports, the first with offloading.
CARDS = (
    Card("H100 80 GB", 80 * _FORWARD / 327.8 * 1e3, "published: 327.8 s for 40 steps with guidance, official code"),
    Card("H200 141 GB", 80 * _FORWARD / 366 * 1e3, "published: 366 s for 40 steps with guidance, official code"),
    Card("A100 80 GB", _SHARE * 312, "calculated: 40 % of 312 TFLOP/s"),
    Card("RTX 4090 24 GB", _SHARE * 165, "calculated: 40 % of 165 TFLOP/s"),
    Card("RTX 3090 24 GB", _SHARE * 71, "calculated: 40 % of 71 TFLOP/s"),
)


def hours_on_cards(pflop: float) -> list[str]:
    """A line for each card; none for models so small that loading takes longer than work.

    Args:
        pflop: of all forwards of a film.
    """
    if pflop < 10:
        return []
    return [f"time     {_time(pflop * 1e3 / card.tflops)} on {card.name} ({card.source})" for card in CARDS]


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"

"""Rows that others published, to print beside ours where the definitions allow it."""

from __future__ import annotations

from dataclasses import dataclass

PUBLISHED_COLUMNS = (
    "aesthetic_quality",
    "prompt_following_global",
    "prompt_following_shot",
    "consistency_overall",
    "consistency_top10",
)
PUBLISHED: dict[str, tuple[float, ...]] = {
    "Wan2.2, independent shots": (0.6097, 0.2114, 0.2335, 0.3934, 0.4357),
    "StoryDiffusion + Wan2.2": (0.6053, 0.2223, 0.2294, 0.4485, 0.4902),
    "IC-LoRA + Wan2.2": (0.6001, 0.2198, 0.2251, 0.4571, 0.5015),
    "HoloCine": (0.5471, 0.2104, 0.2155, 0.4631, 0.5122),
    "StoryMem": (0.6133, 0.2289, 0.2313, 0.5065, 0.5337),
    "StoryMem without semantic selection": (0.6076, 0.2257, 0.2295, 0.4878, 0.5287),
    "StoryMem without aesthetic filter": (0.6018, 0.2251, 0.2313, 0.4844, 0.5330),
    "StoryMem without sink": (0.6093, 0.2277, 0.2330, 0.4891, 0.5241),
}
"""Rows of the paper's tables 1 and 2 (arXiv 2512.19539), in the order of `PUBLISHED_COLUMNS`."""


@dataclass(frozen=True, kw_only=True)
class OtherTable:
    """A published table whose columns are not those of ST-Bench.

    Args:
        source: of the numbers.
        note: why they do not compare with ours.
        columns: headings.
        rows: system -> a value for each column; None if it was not published.
    """

    source: str
    note: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]


OTHERS = (
    OtherTable(
        source="Memento (arXiv 2606.14667)",
        note="its own stories, ViCLIP-B/16 and (s - 1) / 9 of a LAION MLP; its intervals and inter-shot rule are not "
        "published",
        columns=("Aesthetic", "Story", "Shot", "Background", "Inter-shot", "Intra-shot", "Inter-scene"),
        rows={
            "StoryDiffusion + Wan2.2": (0.5310, 0.2671, 0.2689, 0.9767, 0.5525, 0.8448, 0.6732),
            "StoryMem": (0.4937, 0.2793, 0.2681, 0.9732, 0.6606, 0.8146, 0.6692),
            "HoloCine": (0.4568, 0.2720, 0.2854, 0.9770, 0.5791, 0.8128, 0.6594),
            "Memento": (0.4977, 0.3063, 0.2893, 0.9805, 0.7338, 0.8578, 0.7268),
        },
    ),
    OtherTable(
        source="HoloCine (arXiv 2510.20822)",
        note="its own hundred prompts; the penalty in its SCA is not published",
        columns=("SCA", "Inter-shot", "Subject", "Background", "Aesthetic", "Prompt, global", "Prompt, shot"),
        rows={
            "Wan2.2": (0.4843, 0.6772, 0.9054, 0.9014, 0.5568, 0.1652, 0.1364),
            "StoryDiffusion + Wan2.2": (None, 0.7364, 0.8487, 0.8927, 0.5773, 0.1453, 0.1644),
            "IC-LoRA + Wan2.2": (None, 0.7096, 0.9421, 0.9303, 0.5246, 0.1808, 0.1692),
            "HoloCine": (0.9837, 0.7509, 0.9448, 0.9352, 0.5598, 0.1856, 0.1837),
        },
    ),
)
"""Tables that stand apart from ours, beside results of the published weights only."""

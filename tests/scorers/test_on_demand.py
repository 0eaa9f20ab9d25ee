"""A quality filter that is in memory only while it scores."""

from __future__ import annotations

import torch

from storymem.scorers.on_demand import OnDemand
from tests.scorers import tiny


def test_it_is_loaded_to_score_and_freed_after() -> None:
    built = []

    def build() -> object:
        built.append(tiny.aesthetic())
        return built[-1]

    lazy, frames = OnDemand(build), torch.rand(2, 3, 40, 60)
    assert len(built) == 1, "a filter that does not load is reported at the start"
    assert lazy.threshold == built[0].threshold
    for times in (2, 3):
        assert torch.equal(lazy.to("cpu").score(frames), built[0].score(frames))
        lazy.score(frames)
        assert len(built) == times, "once for all frames of a shot"

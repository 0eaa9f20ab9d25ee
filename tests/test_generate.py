"""What a film records of the configuration it was made with."""

from __future__ import annotations

from typing import Any

import pytest

from storymem.generate import _recorded
from tests.composing import composed


def recorded(*overrides: str) -> dict[str, Any]:
    return _recorded(composed("story=s.yaml", *overrides))


def test_where_a_film_is_computed_is_not_recorded() -> None:
    made = recorded()
    assert made == recorded("runtime.device=cpu", "runtime.threads=3", "runtime.compile=blocks", "output=elsewhere")
    assert "runtime" not in made
    assert made["model"]["name"] == "toy"


@pytest.mark.parametrize(
    "override", ["runtime.precision=int8", "runtime.cache=taylor", "runtime.attention=sage", "sampler.steps=3"]
)
def test_what_changes_the_picture_is_recorded(override: str) -> None:
    assert recorded(override) != recorded()

"""What films cost: systems that denoise all shots at once grow with the square, StoryMem with the number of shots."""

from __future__ import annotations

from benchmarks.methods_cost import SYSTEMS, measure, operations, settings_of
from storymem.wan.loading import load_pipeline
from tests.wan.tiny import CPU, settings


def test_operations_of_a_film_twice_as_long() -> None:
    model = settings_of("wan2.2-a14b")
    ratios = {one.name: operations(one, 32, model) / operations(one, 16, model) for one in SYSTEMS}
    assert ratios["independent shots"] == 2
    assert 2 < ratios["StoryMem, cached"] < ratios["StoryMem, joint"] < 2.1
    assert 2.5 < ratios["HoloCine sparse"] < 2.7
    assert 3.8 < ratios["HoloCine full, LCT"] < 4


def test_every_system_can_be_measured() -> None:
    for system in SYSTEMS:
        model = settings(memory_attention=system.memory)
        pipe = load_pipeline(model, runtime=CPU, text_encoder=False)
        pipe.set_progress_bar_config(disable=True)
        assert measure(system, 2, pipe, model, steps=1).seconds > 0

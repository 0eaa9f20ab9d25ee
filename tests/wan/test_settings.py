"""Settings beyond sense are refused where they are written, with the key and its range; before torch is loaded."""

from __future__ import annotations

import pytest

from storymem.config import ConfigError
from tests.composing import generate_settings

BEYOND = {
    "model.video.height=100000": "height must be 8192 or less, not 100000",
    "model.video.height=-16": "height must be 16 or more, not -16",
    "model.video.height=40": r"height must be a positive multiple of 16 for Wan2\.2-I2V-A14B, not 40",
    "model.video.width=8192 model.video.height=8192 model.video.frames=81": "pixels; a shot has at most 2,000,000,000",
    "model.video.frames=100001": "frames must be 4093 or less",
    "model.video.frames=-3": "frames must be 5 or more, not -3",
    "model.video.frames=6": r"a shot has 4n \+ 1 frames, not 6: the nearest are 5 and 9",
    "model.video.fps=1000000": "fps must be 240 or less, not 1000000",
    "model.network.text_tokens=0": "text_tokens must be 1 or more",
    "model.network.transformer.num_layers=-1": "transformer.num_layers must be a whole number from 1 to",
    "~model.network.transformer.freq_dim": "transformer.freq_dim must be a whole number.*not None",
    "model.rope_stride=5000": "rope_stride must be 1023 or less",
    "model.boundary=nan": "model.boundary.*finite",
    "model.seed=-1": "seed must be 0 or more",
    "model.adapter.weight=1e30": "weight must be 10 or less",
    "sampler.steps=1001": "steps must be 1000 or less, not 1001",
    "sampler.guidance=nan": "sampler.guidance.*finite",
    "sampler.guidance=inf": "sampler.guidance.*finite",
    "sampler.guidance_low=0.5": "guidance_low must be 1 or more",
    "sampler.shift=nan": "sampler.shift.*finite",
    "runtime.threads=0": "threads must be 1 or more",
    "runtime.cache=first_block runtime.cache_threshold=nan": "runtime.cache_threshold.*finite",
    "runtime.processes_per_film=-2": "processes_per_film must be 1 or more",
    "memory.recall.capacity=1000": "memory.recall.capacity=1000.*at most",
}


@pytest.mark.parametrize("overrides", BEYOND)
def test_settings_beyond_sense_are_refused(overrides: str) -> None:
    with pytest.raises(ConfigError, match=BEYOND[overrides]) as error:
        generate_settings(*overrides.split())
    assert len(str(error.value)) < 400


def test_the_ends_of_the_ranges_are_allowed() -> None:
    settings = generate_settings(
        *("model.video.height=16", "model.video.width=16", "model.video.frames=4093", "model.video.fps=240"),
        *("sampler.steps=1000", "sampler.guidance=100", "sampler.shift=100", "memory.recall.capacity=204"),
    )
    assert (settings.model.video.frames, settings.sampler.steps) == (4093, 1000)
    with pytest.raises(ConfigError, match="can recall at most 204 frames"):
        generate_settings("memory.recall.capacity=205")
    assert generate_settings("memory.recall.capacity=205", "model.rope_stride=4").model.rope_stride == 4

"""From a request to frames: each text encoded once, and the same shot from the same request."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from storymem.io import NotFiniteError
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import ModelSettings, SamplerSettings
from storymem.wan.shots import ShotRequest, WanShotGenerator
from tests.wan.test_step_adapter import write_adapter
from tests.wan.tiny import CPU, FRAMES, HEIGHT, WIDTH, generate, images, settings

SAMPLER = SamplerSettings(steps=3, guidance=3.0, negative_prompt="blurred")


def generator(model: ModelSettings, **changes: Any) -> WanShotGenerator:
    arguments = {"model": model, "sampler": SAMPLER, "runtime": CPU} | changes
    return WanShotGenerator(**arguments)


def request(**changes: Any) -> ShotRequest:
    empty = np.empty((0, HEIGHT, WIDTH, 3), dtype=np.uint8)
    shot = ShotRequest(prompt="a fox", negative_prompt=None, frames=FRAMES, seed=0, memory=[], given=empty)
    return replace(shot, **changes)


@pytest.fixture(scope="module")
def ready(tiny_model: ModelSettings) -> WanShotGenerator:
    made = generator(tiny_model)
    made.prepare(["a fox", "an owl"], [None, "fog", ""])
    return made


def given(count: int) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images(count, seed=7)])


def test_a_shot_is_what_the_pipeline_makes(ready: WanShotGenerator, pipe: WanMemoryToVideoPipeline) -> None:
    memory = ready.encode_keyframes([np.asarray(image) for image in images(2)])
    frames = ready.generate(request(memory=memory, given=given(1), seed=5))
    expected = generate(
        pipe,
        prompt="a fox",
        negative_prompt="blurred",
        guidance_scale=3.0,
        num_inference_steps=3,
        memory=images(2),
        first_frame=images(1, seed=7)[0],
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    )
    assert frames.dtype == np.uint8
    np.testing.assert_allclose(frames, expected[0] * 255, atol=0.51)


def test_motion_frames_are_five_given_frames(ready: WanShotGenerator, pipe: WanMemoryToVideoPipeline) -> None:
    frames = ready.generate(request(given=given(5)))
    expected = generate(
        pipe,
        negative_prompt="blurred",
        guidance_scale=3.0,
        num_inference_steps=3,
        motion_frames=images(5, seed=7),
        output_type="np",
    )
    np.testing.assert_allclose(frames, expected[0] * 255, atol=0.51)


def test_the_sampler_sets_whether_guidance_strengthens_memory(
    tiny_model: ModelSettings, pipe: WanMemoryToVideoPipeline
) -> None:
    made = generator(tiny_model, sampler=replace(SAMPLER, negative_sees_memory=False))
    made.prepare(["a fox"], [None])
    memory = images(2)
    frames = made.generate(request(memory=made.encode_keyframes([np.asarray(image) for image in memory])))
    given = {"negative_prompt": "blurred", "guidance_scale": 3.0, "num_inference_steps": 3, "memory": memory}
    expected = generate(pipe, **given, negative_sees_memory=False, output_type="np")
    np.testing.assert_allclose(frames, expected[0] * 255, atol=0.51)


# Numbers that are none


def broken(model: ModelSettings, part: str, weight: str, **changes: Any) -> WanShotGenerator:
    """A generator with infinity in one weight of one of its networks."""

    class Broken(WanShotGenerator):
        def _load(self, **parts: bool) -> WanMemoryToVideoPipeline:
            pipe = super()._load(**parts)
            if (network := getattr(pipe, part)) is not None:
                network.get_parameter(weight).data.view(-1)[0] = float("inf")
            return pipe

    return Broken(**{"model": model, "sampler": SAMPLER, "runtime": CPU} | changes)


@pytest.mark.parametrize(
    ("part", "weight", "message"),
    [
        ("transformer", "blocks.0.ffn.net.2.weight", r"the latents of the shot: NaN.*sampler\.guidance=3"),
        ("transformer_2", "proj_out.bias", r"the latents of the shot: NaN.*the weights of tiny"),
        ("vae", "post_quant_conv.bias", r"the frames of the shot: NaN.*VAE"),
    ],
)
def test_a_shot_of_numbers_that_are_none_is_refused(
    tiny_model: ModelSettings, part: str, weight: str, message: str
) -> None:
    made = broken(tiny_model, part, weight)
    made.prepare(["a fox"], [None])
    with pytest.raises(NotFiniteError, match=message):
        made.generate(request())


def test_an_adapter_in_use_is_named_first(tiny_model: ModelSettings, tmp_path: Any) -> None:
    adapter = {"weights": {"name": "my steps", "source": str(write_adapter(tiny_model, tmp_path, "storymem", seed=1))}}
    made = broken(tiny_model, "transformer", "proj_out.bias", sampler=replace(SAMPLER, adapter=adapter))
    made.prepare(["a fox"], [None])
    with pytest.raises(NotFiniteError, match=r"likely causes: the adapter my steps \(sampler\.adapter\), sampler"):
        made.generate(request())


def test_what_goes_into_a_shot_is_checked_too(ready: WanShotGenerator, tiny_model: ModelSettings) -> None:
    latents = ready.encode_keyframes([np.asarray(image) for image in images(2)])
    latents[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="the latents of memory frame 2"):
        ready.generate(request(memory=latents))
    made = broken(tiny_model, "vae", "quant_conv.bias")
    with pytest.raises(NotFiniteError, match=r"the latents of a keyframe: NaN.*VAE"):
        made.encode_keyframes([np.asarray(images(1)[0])])


def test_embeddings_that_are_none_are_refused_with_their_prompt(tiny_model: ModelSettings) -> None:
    made = broken(tiny_model, "text_encoder", "encoder.final_layer_norm.weight")
    with pytest.raises(NotFiniteError, match=r"the embeddings of 'a fox': NaN.*text encoder"):
        made.prepare(["a fox"], ["a fox"])


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"prompt": "an owl"}, {"negative_prompt": "fog"}, {"negative_prompt": ""}],
    ids=str,
)
def test_everything_in_a_request_matters(ready: WanShotGenerator, changes: dict[str, Any]) -> None:
    frames = ready.generate(request())
    assert not np.array_equal(ready.generate(request(**changes)), frames)
    np.testing.assert_array_equal(ready.generate(request()), frames)


def test_the_first_shot_has_networks_of_its_own(ready: WanShotGenerator) -> None:
    assert not np.array_equal(ready.first(request()), ready.generate(request()))
    np.testing.assert_array_equal(ready.first(request()), ready.first(request()))


def test_without_text_to_video_the_memory_networks_make_the_first_shot() -> None:
    alone = generator(settings(has_text_to_video=False))
    alone.prepare(["a fox"], [None])
    np.testing.assert_array_equal(alone.first(request()), alone.generate(request()))


def test_steps_are_reported(ready: WanShotGenerator) -> None:
    for make in (ready.first, ready.generate):
        steps: list[tuple[int, int]] = []
        make(request(), lambda step, total, steps=steps: steps.append((step, total)))
        assert steps == [(1, 3), (2, 3), (3, 3)]


class Watched(WanShotGenerator):
    """Counts VAEs and memory-to-video experts that are loaded, and notes the text encoder without keeping it alive."""

    experts = vaes = 0

    def _load(self, **parts: bool) -> WanMemoryToVideoPipeline:
        pipe = super()._load(**parts)
        self.experts += bool(pipe.experts)
        self.vaes += pipe.vae is not None
        if pipe.text_encoder is not None:
            self.encoder = weakref.ref(pipe.text_encoder.shared.weight)
        return pipe


def test_a_pair_of_experts_is_loaded_once_and_freed_for_the_other(tiny_model: ModelSettings) -> None:
    made = Watched(model=tiny_model, sampler=SAMPLER, runtime=CPU)
    made.prepare(["a fox"], [None])
    made.first(request())
    from_text = made._text_pipe
    assert from_text is not None
    weight = weakref.ref(from_text.transformer.proj_out.weight)
    made.first(request(seed=1))
    assert made._text_pipe is from_text, "reused for other shots from text alone"
    assert made.experts == 0
    del from_text
    made.generate(request())
    gc.collect()
    assert weight() is None, "freed before the others are loaded"
    made.generate(request(seed=1))
    made.encode_keyframes(list(given(1)))
    assert made.experts == 1


def test_the_text_encoder_is_loaded_alone_and_freed(tiny_model: ModelSettings) -> None:
    made = Watched(model=tiny_model, sampler=SAMPLER, runtime=CPU)
    made.prepare(["a"], [None])
    gc.collect()
    assert made.encoder() is None
    assert made.vaes == 0


def test_without_guidance_no_negative_prompt_is_encoded(tiny_model: ModelSettings) -> None:
    made = generator(tiny_model, sampler=SamplerSettings(steps=2, guidance=1.0, negative_prompt="blurred"))
    made.prepare(["a fox"], ["fog"])
    assert made.generate(request(negative_prompt="fog")).shape[0] == FRAMES

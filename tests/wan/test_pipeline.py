"""The public call: what it accepts, what it refuses, and that it agrees with diffusers where diffusers can do it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image
from torch import Tensor

from storymem.wan.loading import load_pipeline
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.schedule import WanUniPCScheduler
from storymem.wan.settings import ModelSettings, SamplerSettings
from tests.wan.tiny import (
    CPU,
    FRAMES,
    HEIGHT,
    LATENT,
    SLOTS,
    STEPS,
    WIDTH,
    counting,
    generate,
    images,
    settings,
)

SHOT = (1, 16, SLOTS, *LATENT)


def stock(pipe: WanMemoryToVideoPipeline, kind: type = WanImageToVideoPipeline) -> WanImageToVideoPipeline:
    """diffusers' own pipeline around the same networks."""
    plain = kind(**pipe.components, boundary_ratio=pipe.config.boundary_ratio)
    plain.set_progress_bar_config(disable=True)
    return plain


def stock_latents(pipe: WanImageToVideoPipeline, image: Image.Image) -> Tensor:
    return pipe(
        image=image,
        prompt="a fox",
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        max_sequence_length=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames


def networks(pipe: WanMemoryToVideoPipeline) -> list[torch.nn.Module]:
    return [pipe.transformer, pipe.transformer_2, pipe.text_encoder, pipe.vae.encoder, pipe.vae.decoder]


# Agreement with diffusers


def test_a_first_frame_without_memory_is_diffusers_image_to_video(pipe: WanMemoryToVideoPipeline) -> None:
    (frame,) = images(1)
    theirs = stock_latents(stock(pipe), frame)
    ours = generate(pipe, first_frame=frame)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_without_memory_and_frames_it_is_a_blank_video_with_mask_0(
    pipe: WanMemoryToVideoPipeline,
) -> None:
    class Blank(WanImageToVideoPipeline):
        def prepare_latents(self, image: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            latents, condition = super().prepare_latents(torch.zeros_like(image), *args, **kwargs)
            condition[:, :4] = 0
            return latents, condition

    theirs = stock_latents(stock(pipe, Blank), images(1)[0])
    torch.testing.assert_close(generate(pipe), theirs, rtol=1e-5, atol=1e-5)


def test_videos_are_decoded_as_by_diffusers(pipe: WanMemoryToVideoPipeline) -> None:
    latents = generate(pipe)
    video = pipe.vae.decode(
        latents * torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
        + torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    ).sample
    expected = (video.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 1, 3, 4)
    torch.testing.assert_close(generate(pipe, output_type="pt"), expected, rtol=1e-4, atol=1e-5)


# Saving and loading


def test_a_saved_pipeline_comes_back_the_same(tmp_path: Path) -> None:
    pipe = load_pipeline(settings(rope_stride=3, boundary=0.7), runtime=CPU, sampler=SamplerSettings(shift=6.0))
    pipe.save_pretrained(tmp_path)
    again = WanMemoryToVideoPipeline.from_pretrained(tmp_path)

    assert again.config.rope_stride == 3
    assert again.config.boundary_ratio == 0.7
    assert type(again.scheduler) is WanUniPCScheduler
    assert again.scheduler.config.flow_shift == 6.0
    memory = images(2)
    ours, theirs = (generate(p, memory=memory, output_type="np") for p in (pipe, again))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # memory-mapped weights may round otherwise


def test_the_saved_index_names_our_scheduler(pipe: WanMemoryToVideoPipeline, tmp_path: Path) -> None:
    pipe.save_config(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["storymem", "WanUniPCScheduler"]
    assert index["_class_name"] == "WanMemoryToVideoPipeline"


def test_a_stock_image_to_video_folder_loads(pipe: WanMemoryToVideoPipeline, tmp_path: Path) -> None:
    plain = stock(pipe)
    plain.register_modules(scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=4.0))
    plain.save_pretrained(tmp_path)
    loaded = WanMemoryToVideoPipeline.from_pretrained(tmp_path, scheduler=pipe.scheduler, rope_stride=2)
    memory = images(2)
    ours, theirs = generate(loaded, memory=memory), generate(pipe, memory=memory, rope_stride=2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_network_of_another_task_is_refused(pipe: WanMemoryToVideoPipeline) -> None:
    from diffusers import WanTransformer3DModel

    config = dict(pipe.transformer.config)
    for channels, message in (
        (16, r"transformer_2 has 16 input channels, .*Wan2.2-I2V-A14B, with 36"),
        (20, "no known base model"),
    ):
        other = WanTransformer3DModel.from_config(config | {"in_channels": channels})
        with pytest.raises(ValueError, match=message):
            WanMemoryToVideoPipeline(**pipe.components | {"transformer_2": other})


def test_it_is_made_from_a_stock_pipeline_and_back(pipe: WanMemoryToVideoPipeline) -> None:
    (frame,) = images(1)
    ours = WanMemoryToVideoPipeline.from_pipe(stock(pipe))
    ours.set_progress_bar_config(disable=True)
    assert torch.equal(generate(ours, memory=images(2)), generate(pipe, memory=images(2)))
    ours.memory_cache = "cpu"
    again = WanMemoryToVideoPipeline.from_pipe(ours)
    assert again.memory_cache == "cpu"
    theirs = WanImageToVideoPipeline.from_pipe(pipe)
    theirs.set_progress_bar_config(disable=True)
    torch.testing.assert_close(stock_latents(theirs, frame), generate(pipe, first_frame=frame), rtol=1e-5, atol=1e-5)


# Every bad argument is reported before any network runs

FRAME = images(1)[0]
OTHER_SIZE = images(1, size=(64, 32))[0]
ONE = torch.zeros(16, 1, *LATENT)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "memory of another size": ({"memory": [FRAME, OTHER_SIZE]}, r"memory\[1\] is 64x32 pixels.*48x32"),
    "memory that is no image": ({"memory": [np.zeros((32, 48, 3), np.uint8)]}, r"memory\[0\].*ndarray"),
    "memory as paths": ({"memory": ["a.png"]}, r"memory\[0\] must be a PIL image, not str"),
    "one image as memory": ({"memory": FRAME}, "memory must be a list"),
    "an array as memory": ({"memory": np.zeros((2, 32, 48, 3), np.uint8)}, "memory must be a list"),
    "memory of both kinds": ({"memory": [FRAME, ONE]}, "not a mixture"),
    "latents of another size": ({"memory": [ONE[..., 1:]]}, r"memory\[0\].*\[16, 1, 4, 6\]"),
    "latents of two frames": ({"memory": [ONE.expand(16, 2, 4, 6)]}, r"memory\[0\].*latents of shape"),
    "one frame's latents": ({"memory": ONE}, r"memory\[0\] must be latents of shape"),
    "4n + 2 frames": ({"num_frames": 10}, "nearest are 9 and 13"),
    "no frames": ({"num_frames": 0}, r"4n \+ 1 frames, not 0"),
    "fewer than no frames": ({"num_frames": -3}, r"4n \+ 1 frames, not -3"),
    "two kinds of given frames": ({"first_frame": FRAME, "motion_frames": images(5)}, "exclude each other"),
    "4 motion frames": ({"motion_frames": images(4)}, "exactly 5 images, not 4"),
    "6 motion frames": ({"motion_frames": images(6)}, "exactly 5 images, not 6"),
    "0 motion frames": ({"motion_frames": []}, "exactly 5 images, not 0"),
    "motion frames as an array": (
        {"motion_frames": np.zeros((5, 32, 48, 3), np.uint8)},
        r"motion_frames\[0\] must be a PIL image",
    ),
    "one motion frame of another size": ({"motion_frames": [*images(4), OTHER_SIZE]}, r"motion_frames\[4\]"),
    "first frame of another size": ({"first_frame": OTHER_SIZE}, "first_frame is 64x32 pixels"),
    "first frame as an array": ({"first_frame": np.zeros((32, 48, 3), np.uint8)}, "first_frame.*ndarray"),
    "no room after the given frames": ({"motion_frames": images(5), "num_frames": 5}, "no room after 5"),
    "no room after the first frame": ({"first_frame": FRAME, "num_frames": 1}, "no room after 1"),
    "a height of 40": ({"height": 40}, "height must be a positive multiple of 16 for .*, not 40"),
    "a width of 0": ({"width": 0}, "width must be a positive multiple of 16"),
    "a negative height": ({"height": -16}, "positive multiple of 16"),
    "noise without the memory's slots": (
        {"memory": [FRAME], "latents": torch.zeros(1, 16, SLOTS, *LATENT)},
        r"\[1, 16, 4, 4, 6\] \(memory slots first\), not \[1, 16, 3, 4, 6\]",
    ),
    "noise of another batch": ({"latents": torch.zeros(2, 16, SLOTS, *LATENT)}, r"\[1, 16, 3, 4, 6\]"),
    "too many generators": ({"generator": [torch.Generator()] * 2}, "2 generators for a batch of 1"),
    "more frames than positions": ({"num_frames": 4097}, "4093 frames at most, not 4097"),
    "no step": ({"num_inference_steps": 0}, "num_inference_steps must be 1 to 1000, not 0"),
    "1001 steps": ({"num_inference_steps": 1001}, "num_inference_steps must be 1 to 1000, not 1001"),
    "guidance that is no number": ({"guidance_scale": float("nan")}, "guidance_scale.*finite"),
    "guidance of the second expert alone": ({"guidance_scale": 1.0, "guidance_scale_2": 5.0}, "needs guidance_scale"),
    "a broken stride": ({"memory": [FRAME], "rope_stride": 2.5}, "whole number, 1 or more, not 2.5"),
    "infinite guidance": ({"guidance_scale_2": float("inf")}, "guidance_scale_2.*finite"),
    "a stride of 0": ({"memory": [FRAME], "rope_stride": 0}, "stride.*1 or more, not 0"),
    "a stride beyond the table": ({"memory": [FRAME] * 2, "rope_stride": 512}, "reach position -1024"),
    "a tensor that callbacks cannot see": ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    "two prompts at once": ({"prompt_embeds": torch.zeros(1, 16, 32), "prompt": "a"}, "prompt_embeds"),
    "no prompt": ({"prompt": None}, "prompt"),
    "an unknown output": ({"output_type": "mp4"}, "latent, np, pt or pil, not 'mp4'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_before_anything_is_computed(pipe: WanMemoryToVideoPipeline, name: str) -> None:
    arguments, message = REFUSED[name]
    call = {"prompt": "a fox", "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES} | arguments
    with counting(*networks(pipe)) as calls, pytest.raises(ValueError, match=message):
        pipe(**call)
    assert not any(calls.values()), f"computed before the error: {calls}"


def test_all_networks_are_counted_in_a_call_that_is_accepted(tiny_model: ModelSettings) -> None:
    pipe = load_pipeline(tiny_model, runtime=CPU)
    with counting(*networks(pipe)) as calls:
        generate(pipe, output_type="np")
    assert all(calls.values()), calls


# Memory


def test_images_and_their_latents_are_the_same_memory(pipe: WanMemoryToVideoPipeline) -> None:
    memory = images(3)
    latents = pipe.encode_memory(memory)
    assert latents.shape == (3, 16, 1, *LATENT)
    expected = generate(pipe, memory=memory)
    assert torch.equal(generate(pipe, memory=latents), expected)
    assert torch.equal(generate(pipe, memory=list(latents)), expected)


def test_content_order_and_number_of_memory_frames_matter(pipe: WanMemoryToVideoPipeline) -> None:
    one, two, three = images(3)
    shots = [generate(pipe, memory=memory) for memory in ([one, two], [two, one], [one, three], [one], [one, one])]
    for number, shot in enumerate(shots):
        for other in shots[:number]:
            assert (shot - other).norm() / other.norm() > 1e-4


def test_an_empty_memory_is_no_memory(pipe: WanMemoryToVideoPipeline) -> None:
    assert torch.equal(generate(pipe, memory=[]), generate(pipe))


def test_the_stride_of_a_call_and_of_the_pipeline(tiny_model: ModelSettings) -> None:
    memory = images(2)
    pipes = [load_pipeline(settings(rope_stride=stride), runtime=CPU) for stride in (5, 1)]
    five, one = (generate(pipe, memory=memory) for pipe in pipes)
    assert (five - one).norm() / one.norm() > 1e-4
    assert torch.equal(generate(pipes[0], memory=memory, rope_stride=1), one)
    assert torch.equal(generate(pipes[0], memory=memory), five), "a call's stride must not stay"


def test_memory_slots_are_never_decoded(pipe: WanMemoryToVideoPipeline) -> None:
    decoded = []
    handle = pipe.vae.decoder.register_forward_hook(lambda _m, _i, out: decoded.append(out.shape[2]))
    try:
        video = generate(pipe, memory=images(4), output_type="np")
    finally:
        handle.remove()
    assert sum(decoded) == FRAMES
    assert video.shape == (1, FRAMES, HEIGHT, WIDTH, 3)


def test_the_blank_video_is_encoded_once_per_size_if_it_may_be_cached(tiny_model: ModelSettings) -> None:
    pipe = load_pipeline(tiny_model, runtime=CPU)
    pipe.blank_latents = {}
    frames: list[int] = []
    pipe.vae.encoder.register_forward_pre_hook(lambda _m, inputs: frames.append(inputs[0].shape[2]))

    def encoded(**changes: Any) -> int:
        frames.clear()
        generate(pipe, **changes)
        return sum(frames)

    latents = torch.zeros(2, 16, 1, *LATENT)
    assert encoded() == FRAMES
    assert encoded(prompt="another") == 0
    assert encoded(memory=latents) == 0
    assert encoded(memory=images(3)) == 3
    assert encoded(num_frames=5) == 5
    assert encoded(num_frames=5, width=32) == 5
    assert encoded() == 0
    assert encoded(first_frame=FRAME) == FRAMES


def _another_vae(pipe: WanMemoryToVideoPipeline) -> None:
    pipe.vae = load_pipeline(settings(seed=1), runtime=CPU, experts=False, text_encoder=False).vae


def _other_weights(pipe: WanMemoryToVideoPipeline) -> None:
    pipe.vae.load_state_dict({name: 1.1 * weight for name, weight in pipe.vae.state_dict().items()})


def _another_dtype(pipe: WanMemoryToVideoPipeline) -> None:
    pipe.vae.to(torch.bfloat16)


def _weights_in_place(pipe: WanMemoryToVideoPipeline) -> None:
    for weight in pipe.vae.encoder.parameters():
        weight.data.mul_(1.1)


@pytest.mark.parametrize("change", [_another_vae, _other_weights, _another_dtype, _weights_in_place])
def test_the_blank_video_is_that_of_the_vae_as_it_is(tiny_model: ModelSettings, change: Callable[..., None]) -> None:
    used, fresh = load_pipeline(tiny_model, runtime=CPU), load_pipeline(tiny_model, runtime=CPU)
    before = generate(used)
    for pipe in (used, fresh):
        change(pipe)
    after = generate(used)
    assert not torch.equal(after, before), "the change is seen"
    assert torch.equal(after, generate(fresh))


# Inherited behaviour


def test_output_types_show_the_same_frames(pipe: WanMemoryToVideoPipeline) -> None:
    tensor = generate(pipe, output_type="pt")
    array = generate(pipe, output_type="np")
    (images,) = generate(pipe, output_type="pil")
    assert tensor.shape == (1, FRAMES, 3, HEIGHT, WIDTH)
    np.testing.assert_array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    assert [image.size for image in images] == [(WIDTH, HEIGHT)] * FRAMES
    np.testing.assert_array_equal(np.stack(images), (array[0] * 255).round().astype(np.uint8))


def test_a_tuple_is_returned_if_asked(pipe: WanMemoryToVideoPipeline) -> None:
    result = pipe(
        prompt_embeds=torch.zeros(1, 16, 32),
        height=HEIGHT,
        width=WIDTH,
        num_frames=1,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
        return_dict=False,
    )
    assert isinstance(result, tuple)
    assert result[0].shape == (1, 16, 1, *LATENT)


def test_prompts_of_a_batch_are_made_as_alone(pipe: WanMemoryToVideoPipeline) -> None:
    memory, prompts = images(2), ["a fox", "two owls"]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = generate(pipe, prompt=prompts, memory=memory, generator=generators)
    for seed, prompt, shot in zip((3, 4), prompts, both, strict=True):
        alone = generate(pipe, prompt=prompt, memory=memory, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(shot, alone[0], rtol=1e-4, atol=1e-4)


def test_given_noise_is_what_the_generator_would_draw(pipe: WanMemoryToVideoPipeline) -> None:
    memory = images(2)
    noise = torch.randn(1, 16, 2 + SLOTS, *LATENT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generate(pipe, memory=memory, latents=noise), generate(pipe, memory=memory))


def latents_of_steps(pipe: WanMemoryToVideoPipeline, **changes: Any) -> tuple[list[float], list[Tensor]]:
    timesteps: list[float] = []
    latents: list[Tensor] = []

    def watch(_pipe: object, _step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        timesteps.append(float(timestep))
        latents.append(tensors["latents"])
        return {}

    generate(pipe, callback_on_step_end=watch, **changes)
    return timesteps, latents


def test_the_second_guidance_is_that_of_the_low_noise_expert(pipe: WanMemoryToVideoPipeline) -> None:
    timesteps, same = latents_of_steps(pipe, guidance_scale=3.0)
    _, other = latents_of_steps(pipe, guidance_scale=3.0, guidance_scale_2=6.0)
    low = [timestep < 900 for timestep in timesteps]
    assert low == [False, False, True, True]
    assert [not torch.equal(a, b) for a, b in zip(same, other, strict=True)] == low


def test_callbacks_can_change_the_latents(pipe: WanMemoryToVideoPipeline) -> None:
    def clear(_pipe: object, step: int, _timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else {}

    assert not generate(pipe, memory=images(1), callback_on_step_end=clear).any()


def test_one_embedding_serves_all_videos_of_its_prompt(tiny_model: ModelSettings) -> None:
    pipe = load_pipeline(tiny_model, runtime=CPU)
    embeds = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(2))
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds * 0, "guidance_scale": 3.0}
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = generate(pipe, num_videos_per_prompt=2, generator=generators, **given)
    for seed, shot in zip((3, 4), both, strict=True):
        alone = generate(pipe, generator=torch.Generator().manual_seed(seed), **given)
        torch.testing.assert_close(shot, alone[0], rtol=1e-4, atol=1e-4)


def test_a_missing_expert_is_reported_before_anything_is_computed(tiny_model: ModelSettings) -> None:
    pipe = load_pipeline(tiny_model, runtime=CPU)
    pipe.transformer_2 = None
    with counting(pipe.transformer) as calls, pytest.raises(ValueError, match="no transformer_2: load both experts"):
        generate(pipe)
    assert not any(calls.values())


def test_a_callback_can_change_the_condition_of_several_videos(pipe: WanMemoryToVideoPipeline) -> None:
    def blank(_pipe: object, _step: int, _timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        assert tensors["condition"].shape[0] == 2
        return {"condition": torch.zeros_like(tensors["condition"])}

    given = {"first_frame": FRAME, "num_videos_per_prompt": 2, "generator": torch.Generator().manual_seed(1)}
    watched = {"callback_on_step_end": blank, "callback_on_step_end_tensor_inputs": ["condition"]}
    shots = generate(pipe, guidance_scale=3.0, **watched, **given)
    given["generator"] = torch.Generator().manual_seed(1)
    assert not torch.equal(shots, generate(pipe, guidance_scale=3.0, **given))

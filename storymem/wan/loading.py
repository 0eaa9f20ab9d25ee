"""Settings in, ready pipelines out: published weights, the small trained models and networks with random weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from storymem.wan.folders import check_text_to_video, load_tokenizer, weights_file
from storymem.wan.gguf import load_experts
from storymem.wan.lora import load_memory_lora
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.placement import settle
from storymem.wan.runtime import accelerate, check_machine, place
from storymem.wan.schedule import wan_scheduler
from storymem.wan.settings import Continuity, ModelSettings, RuntimeSettings, SamplerSettings, check_combinations
from storymem.wan.sources import adapter_weights, check_weights, step_weights_for_text
from storymem.wan.spec import COMPONENTS, Expert
from storymem.weights import check_values, locate

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=torch.nn.Module)

#: The name of a step-distilled adapter beside that of the memory adapter, "memory".
STEP_ADAPTER = "steps"


def load_pipeline(
    model: ModelSettings,
    *,
    runtime: RuntimeSettings | None = None,
    continuity: Continuity = "none",
    sampler: SamplerSettings | None = None,
    text_encoder: bool = True,
    experts: bool | Collection[Expert] = True,
) -> WanMemoryToVideoPipeline:
    """A ready memory-to-video pipeline.

    Args:
        model: which networks.
        runtime: where they run; None: on the best device, without offloading.
        continuity: selects the adapter, where there is one for each kind.
        sampler: how shots will be sampled; None: as published.
        text_encoder: whether to load the text encoder; without it, pass ``prompt_embeds``.
        experts: whether to load the transformers and their adapters, or which of the two. With none the pipeline can
            only encode, and with one of two it makes no shot.

    Raises:
        MissingWeights: before anything is loaded.
        ValueError: for weights or a machine that do not fit the settings.
    """
    sampler, runtime = sampler or SamplerSettings(), runtime or RuntimeSettings()
    wanted: Collection[Expert] = (model.spec.experts if experts else ()) if isinstance(experts, bool) else experts
    names = [COMPONENTS[expert] for expert in wanted]
    check_weights(
        model,
        text_to_video=False,
        continuity=continuity,
        sampler=sampler if names else None,
        text_encoder=text_encoder,
        experts=wanted,
    )
    if names:
        runtime = _settled(model, runtime, sampler)
    elif runtime.offload == "auto":  # text encoder and VAE have room wherever experts could work
        runtime = replace(runtime, offload="none")
    parts: dict[str, Any] = {name: None for name in COMPONENTS.values() if name not in names}
    if not text_encoder:
        parts |= {"text_encoder": None, "tokenizer": None}
    parts["scheduler"] = wan_scheduler(sampler.shift, sampler.scheduler)
    pipe = (_random_pipeline if model.weights is None else _saved_pipeline)(model, parts)
    if names:
        _load_adapters(pipe, model, sampler, continuity=continuity)
        accelerate(pipe, model, runtime)
    place(pipe, runtime)
    return pipe


def load_text_to_video(
    model: ModelSettings,
    *,
    vae: AutoencoderKLWan,
    runtime: RuntimeSettings | None = None,
    sampler: SamplerSettings | None = None,
) -> WanMemoryToVideoPipeline:
    """The text-to-video pipeline of the first shot, without a text encoder; it shares ``vae``."""
    sampler = sampler or SamplerSettings()
    runtime = _settled(model, runtime or RuntimeSettings(), sampler)
    if model.weights is None:
        channels = model.text_spec.in_channels
        experts = [_random_expert(model, model.seed + 10 + k, channels) for k in range(len(COMPONENTS))]
    else:
        assert model.text_to_video is not None
        folder = locate(model.text_to_video)
        check_text_to_video(folder)
        experts, options = [], {"dtype": getattr(torch, model.dtype), "use_safetensors": True}
        for name in COMPONENTS.values():
            experts.append(WanTransformer3DModel.from_pretrained(folder / name, **options))
            check_values(experts[-1].named_parameters(), weights_file(folder, name))
    pipe = WanMemoryToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=wan_scheduler(sampler.text_to_video_shift, sampler.scheduler),
        transformer=experts[0],
        transformer_2=experts[1],
        boundary_ratio=model.text_to_video_boundary,
    )
    _load_adapters(pipe, model, sampler, continuity=None)
    accelerate(pipe, model, runtime)
    place(pipe, runtime)
    return pipe


def _settled(model: ModelSettings, runtime: RuntimeSettings, sampler: SamplerSettings) -> RuntimeSettings:
    """Check everything that can be checked before loading, and settle ``offload: auto``."""
    alone = runtime.spread and not dist.is_initialized()
    check_combinations(model, sampler, runtime, processes=1 if alone else None)
    check_machine(model, runtime)
    return settle(model, runtime, sampler=sampler) if runtime.offload == "auto" else runtime


# Networks


def _saved_pipeline(model: ModelSettings, parts: dict[str, Any]) -> WanMemoryToVideoPipeline:
    """The pipeline in the folder of ``model.weights``, with ``parts`` in place of its own."""
    assert model.weights is not None
    folder = locate(model.weights)
    if "tokenizer" not in parts:
        parts["tokenizer"] = load_tokenizer(folder)
    if model.gguf is not None:
        parts |= load_experts(model, [name for name in COMPONENTS.values() if name not in parts])
    with _without_progress_bars():
        pipe = WanMemoryToVideoPipeline.from_pretrained(
            folder,
            dtype={"default": getattr(torch, model.dtype), "vae": getattr(torch, model.vae_dtype)},
            use_safetensors=True,
            rope_stride=model.rope_stride,
            memory_attention=model.memory_attention,
            boundary_ratio=model.boundary,
            **parts,
        )
    for name in ("text_encoder", "vae", *COMPONENTS.values()):
        if name not in parts:
            check_values(getattr(pipe, name).named_parameters(), weights_file(folder, name))
    return pipe


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Without a bar for every component; commands report their own progress."""
    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def _random_pipeline(model: ModelSettings, parts: dict[str, Any]) -> WanMemoryToVideoPipeline:
    """Networks with random weights; each part has its own seed, so that leaving one out does not change the others."""
    from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

    network, seed = model.network, model.seed
    builders: dict[str, Callable[[], Any]] = {
        "transformer": lambda: _random_expert(model, seed, model.spec.in_channels),
        "transformer_2": lambda: _random_expert(model, seed + 1, model.spec.in_channels),
        "vae": lambda: _seeded(seed + 2, model.vae_dtype, lambda: AutoencoderKLWan(**network.vae)),
        "text_encoder": lambda: _seeded(
            seed + 3, model.dtype, lambda: UMT5EncoderModel(UMT5Config(**network.text_encoder))
        ),
        "tokenizer": ByT5Tokenizer,  # the one tokenizer that needs no vocabulary file
    }
    return WanMemoryToVideoPipeline(
        **{name: build() for name, build in builders.items() if name not in parts},
        **parts,
        boundary_ratio=model.boundary,
        expand_timesteps=model.spec.clean_frames,  # by which the stock pipelines know this kind of base
        rope_stride=model.rope_stride,
        memory_attention=model.memory_attention,
    )


def _random_expert(model: ModelSettings, seed: int, in_channels: int) -> WanTransformer3DModel:
    shape = model.network.transformer
    return _seeded(seed, model.dtype, lambda: WanTransformer3DModel(**shape, in_channels=in_channels))


def _seeded(seed: int, dtype: str, build: Callable[[], T]) -> T:
    """A network with random weights; what diffusers keeps in float32 when loading stays in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build().eval()
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, weight in network.named_parameters():  # buffers hold tables, such as those of RoPE
        if not kept & set(name.split(".")):
            weight.data = weight.data.to(getattr(torch, dtype))
    return network


def _load_adapters(
    pipe: WanMemoryToVideoPipeline, model: ModelSettings, sampler: SamplerSettings, *, continuity: Continuity | None
) -> None:
    """Load the memory adapter and those beside it.

    Args:
        continuity: selects the memory adapter; None: the pipeline is text-to-video, which has none.
    """
    if continuity is not None and (memory := model.adapter) is not None:
        folder = locate(adapter_weights(memory, continuity))
        info = load_memory_lora(pipe, folder, alpha=memory.alpha, use_rslora=memory.use_rslora, weight=memory.weight)
        if info.rope_stride != model.rope_stride:
            message = "the adapter in %s was trained with RoPE stride %d and is used with %d (model.rope_stride)"
            logger.warning(message, folder, info.rope_stride, model.rope_stride)
    for number, extra in enumerate(model.adapters, start=1):
        load_memory_lora(
            pipe,
            locate(extra.weights),
            adapter_name=f"extra_{number}",
            weight=extra.weight,
            strict=False,
            experts=None if extra.expert == "both" else [extra.expert],
        )
    if (steps := sampler.adapter) is not None:
        weights = step_weights_for_text(sampler) if continuity is None else steps.weights
        low = steps.weight if steps.weight_low is None else steps.weight_low
        strength: dict[Expert, float] = {"high_noise": steps.weight, "low_noise": low}
        load_memory_lora(pipe, locate(weights), adapter_name=STEP_ADAPTER, weight=strength, strict=False)

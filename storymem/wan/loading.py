"""The one door through which Wan enters: settings in, ready pipelines out.

Published weights, the small trained models and networks with random weights all come this way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from storymem.wan.acceleration import accelerate, check_acceleration
from storymem.wan.folders import check_text_to_video, load_tokenizer, weights_file
from storymem.wan.gguf import load_experts
from storymem.wan.lora import load_memory_lora
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.precision import check_precision, lower_precision
from storymem.wan.presets import settle
from storymem.wan.runtime import place, resolve_device
from storymem.wan.schedule import wan_scheduler
from storymem.wan.settings import Continuity, ModelSettings, RuntimeSettings, SamplerSettings, StepAdapterSettings
from storymem.wan.sources import adapter_weights, check_weights, step_weights_for_text
from storymem.wan.spec import COMPONENTS, Expert
from storymem.weights import Weights, check_values, locate

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
        continuity: which adapter is loaded, where there is one for each kind.
        sampler: how shots will be sampled; None: as published.
        text_encoder: whether to load the text encoder; without it, pass ``prompt_embeds``.
        experts: whether to load the transformers and their adapter, or which of the two; without them the pipeline can
            only encode, and with one it makes no shot.

    Raises:
        MissingWeights: before anything is loaded.
        ValueError: for weights or a machine that do not fit the settings.
    """
    sampler = sampler or SamplerSettings()
    names = _names(model, experts)
    check_weights(
        model,
        text_to_video=False,
        continuity=continuity,
        sampler=sampler if names else None,
        text_encoder=text_encoder,
        experts=[expert for expert, name in COMPONENTS.items() if name in names],
    )
    runtime = settle(model, runtime or RuntimeSettings(), sampler=sampler, experts=bool(names))
    if names:
        check_precision(model, runtime, resolve_device(runtime.device))
        check_acceleration(model, sampler, runtime)
    scheduler = wan_scheduler(sampler.shift, sampler.scheduler)
    if model.weights is None:
        pipe = _random_pipeline(model, scheduler, text_encoder=text_encoder, names=names)
    else:
        left_out: dict[str, Any] = {} if text_encoder else {"text_encoder": None, "tokenizer": None}
        left_out |= {name: None for name in COMPONENTS.values() if name not in names}
        folder = locate(model.weights)
        if text_encoder:
            left_out["tokenizer"] = load_tokenizer(folder)
        if names and model.gguf is not None:
            left_out |= load_experts(model, names)
        pipe = WanMemoryToVideoPipeline.from_pretrained(
            folder,
            scheduler=scheduler,
            torch_dtype=_dtypes(model),
            use_safetensors=True,
            rope_stride=model.rope_stride,
            memory_attention=model.memory_attention,
            boundary_ratio=model.boundary,
            **left_out,
        )
        for name in ("text_encoder", "vae", *(COMPONENTS.values() if model.gguf is None else [])):
            if (network := getattr(pipe, name)) is not None:
                check_values(network.named_parameters(), weights_file(folder, name))
    if names and model.adapter is not None:
        _load_adapter(pipe, model, continuity)
    if names:
        _load_extra_adapters(pipe, model)
    if names and sampler.adapter is not None:
        _load_step_adapter(pipe, sampler.adapter, sampler.adapter.weights)
    if names:
        lower_precision(pipe.experts.values(), model, runtime)
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
    assert model.has_text_to_video
    sampler = sampler or SamplerSettings()
    runtime = settle(model, runtime or RuntimeSettings(), sampler=sampler)
    check_precision(model, runtime, resolve_device(runtime.device))
    check_acceleration(model, sampler, runtime)
    if model.weights is None:
        experts = [
            _seeded(
                model.seed + 10 + k,
                model.dtype,
                lambda: WanTransformer3DModel(**model.network.transformer, in_channels=model.text_spec.in_channels),
            )
            for k in range(2)
        ]
    else:
        assert model.text_to_video is not None
        folder = locate(model.text_to_video)
        check_text_to_video(folder)
        experts = []
        for name in COMPONENTS.values():
            dtype = getattr(torch, model.dtype)
            expert = WanTransformer3DModel.from_pretrained(folder / name, torch_dtype=dtype, use_safetensors=True)
            check_values(expert.named_parameters(), weights_file(folder, name))
            experts.append(expert)
    pipe = WanMemoryToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=wan_scheduler(sampler.text_to_video_shift, sampler.scheduler),
        transformer=experts[0],
        transformer_2=experts[1],
        boundary_ratio=model.text_to_video_boundary,
    )
    _load_extra_adapters(pipe, model)
    if sampler.adapter is not None:
        _load_step_adapter(pipe, sampler.adapter, step_weights_for_text(sampler))
    lower_precision(experts, model, runtime)
    accelerate(pipe, model, runtime)
    place(pipe, runtime)
    return pipe


def _load_adapter(pipe: WanMemoryToVideoPipeline, model: ModelSettings, continuity: Continuity) -> None:
    """Load the memory adapter, which was checked before."""
    assert model.adapter is not None
    folder = locate(adapter_weights(model.adapter, continuity))
    info = load_memory_lora(
        pipe,
        folder,
        alpha=model.adapter.alpha,
        use_rslora=model.adapter.use_rslora,
        weight=model.adapter.weight,
    )
    if info.rope_stride != model.rope_stride:
        logger.warning(
            "the adapter in %s was trained with RoPE stride %d and is used with %d (model.rope_stride)",
            folder,
            info.rope_stride,
            model.rope_stride,
        )


def _load_extra_adapters(pipe: Any, model: ModelSettings) -> None:
    """Load the adapters beside the memory adapter, named extra_1, extra_2, ..."""
    for number, extra in enumerate(model.adapters, start=1):
        load_memory_lora(
            pipe,
            locate(extra.weights),
            adapter_name=f"extra_{number}",
            weight=extra.weight,
            strict=False,
            experts=None if extra.expert == "both" else [extra.expert],
        )


def _load_step_adapter(pipe: Any, adapter: StepAdapterSettings, weights: Weights) -> None:
    """Stack a step-distilled LoRA on what is loaded, each expert's half with its own weight."""
    low = adapter.weight if adapter.weight_low is None else adapter.weight_low
    strength: dict[Expert, float] = {"high_noise": adapter.weight, "low_noise": low}
    load_memory_lora(pipe, locate(weights), adapter_name=STEP_ADAPTER, weight=strength, strict=False)


def _names(model: ModelSettings, experts: bool | Collection[Expert]) -> frozenset[str]:
    """The pipeline's names of the transformers to load."""
    wanted: Collection[Expert] = (model.spec.experts if experts else ()) if isinstance(experts, bool) else experts
    return frozenset(COMPONENTS[expert] for expert in wanted)


def _dtypes(model: ModelSettings) -> dict[str, torch.dtype]:
    return {"default": getattr(torch, model.dtype), "vae": getattr(torch, model.vae_dtype)}


def _random_pipeline(
    model: ModelSettings, scheduler: Any, *, text_encoder: bool, names: Collection[str]
) -> WanMemoryToVideoPipeline:
    """Networks of the configured shape with random weights; each part has its own seed, so parts can be left out."""
    from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

    network, seed = model.network, model.seed

    def expert(k: int, name: str) -> WanTransformer3DModel | None:
        if name not in names:
            return None
        return _seeded(
            seed + k,
            model.dtype,
            lambda: WanTransformer3DModel(**network.transformer, in_channels=model.spec.in_channels),
        )

    def text() -> UMT5EncoderModel:
        return _seeded(seed + 3, model.dtype, lambda: UMT5EncoderModel(UMT5Config(**network.text_encoder)))

    return WanMemoryToVideoPipeline(
        tokenizer=ByT5Tokenizer() if text_encoder else None,  # the one tokenizer that needs no vocabulary file
        text_encoder=text() if text_encoder else None,
        vae=_seeded(seed + 2, model.vae_dtype, lambda: AutoencoderKLWan(**network.vae)),
        scheduler=scheduler,
        transformer=expert(0, "transformer"),
        transformer_2=expert(1, "transformer_2"),
        boundary_ratio=model.boundary,
        expand_timesteps=model.spec.clean_frames,  # how the stock pipelines know this kind of base
        rope_stride=model.rope_stride,
        memory_attention=model.memory_attention,
    )


def _seeded(seed: int, dtype: str, build: Callable[[], T]) -> T:
    """A network with random weights; what diffusers would keep in float32 when loading stays in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build().eval()
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, weight in network.named_parameters():  # buffers hold tables, such as those of RoPE
        if not kept & set(name.split(".")):
            weight.data = weight.data.to(getattr(torch, dtype))
    return network

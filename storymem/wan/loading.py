"""Settings in, ready pipelines out: published weights, the small trained models and networks with random weights."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from transformers import ByT5Tokenizer

from storymem.wan.combinations import check_combinations
from storymem.wan.components import config_of, load_component
from storymem.wan.folders import CLASSES, build
from storymem.wan.lora import load_memory_lora
from storymem.wan.pipeline import Turns, WanMemoryToVideoPipeline
from storymem.wan.placement import settle
from storymem.wan.runtime import accelerate, check_machine, place
from storymem.wan.schedule import wan_scheduler
from storymem.wan.settings import Continuity, ModelSettings, RuntimeSettings, SamplerSettings
from storymem.wan.sources import Adapter, adapters_of, check_weights
from storymem.wan.spec import COMPONENTS, Expert
from storymem.weights import locate

logger = logging.getLogger(__name__)
#: The one tokenizer that needs no vocabulary file; making it takes a third of loading the smallest model.
_bytes_tokenizer = cache(ByT5Tokenizer)


def load_pipeline(
    model: ModelSettings,
    *,
    runtime: RuntimeSettings | None = None,
    continuity: Continuity = "none",
    sampler: SamplerSettings | None = None,
    text_encoder: bool = True,
    vae: bool | AutoencoderKLWan = True,
    experts: bool | Collection[Expert] = True,
) -> WanMemoryToVideoPipeline:
    """A ready memory-to-video pipeline.

    Args:
        model: which networks.
        runtime: where they run; None: on the best device, without offloading.
        continuity: selects the adapter, where there is one for each kind.
        sampler: how shots will be sampled; None: as published.
        text_encoder: whether to load the text encoder; without it, pass ``prompt_embeds``.
        vae: whether to load the VAE; without it, the pipeline can only encode texts. Or one that is loaded, for
            ``model.text_model``, which has none of its own.
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
        vae=isinstance(vae, bool),
        text_encoder=text_encoder,
        experts=wanted,
    )
    if names:
        runtime = _settled(model, runtime, sampler)
    elif runtime.offload == "auto":  # text encoder and VAE have room wherever experts could work
        runtime = replace(runtime, offload="none")
    shared = {"vae": None if isinstance(vae, bool) else vae, "tokenizer": None, "text_encoder": None}
    for name in [*(["vae"] if vae is True else []), *(["tokenizer", "text_encoder"] if text_encoder else [])]:
        shared[name] = _component(model, name, runtime)
    return _assembled(model, shared, names, runtime, sampler, continuity)


def _assembled(
    model: ModelSettings,
    shared: Mapping[str, Any],
    names: Sequence[str],
    runtime: RuntimeSettings,
    sampler: SamplerSettings,
    continuity: Continuity,
) -> WanMemoryToVideoPipeline:
    """A pipeline with its experts adapted, accelerated and placed; where they take turns, each when it is needed.

    Args:
        shared: the other networks, and the tokenizer.
        names: of the experts.
        continuity: selects the memory adapter.
    """
    turns = runtime.experts == "in_turn" and len(names) > 1

    def load(name: str) -> Any:
        return _component(model, name, runtime)

    def prepare(pipe: Any) -> None:
        if pipe.experts:
            for adapter in adapters_of(model, sampler, continuity):
                _load_adapter(pipe, adapter)
            accelerate(pipe, model, runtime)
        place(pipe, runtime)

    pipe = WanMemoryToVideoPipeline(
        **shared,
        **{name: load(name) if name in names and not turns else None for name in COMPONENTS.values()},
        scheduler=wan_scheduler(sampler.shift, sampler.scheduler),
        boundary_ratio=model.boundary,
        expand_timesteps=model.spec.clean_frames,  # by which the stock pipelines know this kind of base
        rope_stride=model.rope_stride,
        memory_attention=model.memory_attention,
    )
    if turns:
        pipe.turns = Turns(load=load, prepare=prepare, spec=model.spec)
    prepare(pipe)
    return pipe


def _settled(model: ModelSettings, runtime: RuntimeSettings, sampler: SamplerSettings) -> RuntimeSettings:
    """Check everything that can be checked before loading, and settle ``offload: auto``."""
    alone = runtime.spread and not dist.is_initialized()
    check_combinations(model, sampler, runtime, processes=1 if alone else None)
    check_machine(model, runtime)
    return settle(model, runtime, sampler=sampler) if runtime.offload == "auto" else runtime


# Networks


def _component(model: ModelSettings, name: str, runtime: RuntimeSettings) -> Any:
    """A network or the tokenizer, from its files or with random weights from its own seed."""
    if model.weights is not None:
        return load_component(model, name, eight_bits=runtime.precision == "fp8_storage")
    if name == "tokenizer":
        return _bytes_tokenizer()
    config = config_of(model, name)
    with torch.random.fork_rng():
        torch.manual_seed(model.seed + list(CLASSES).index(name))
        network = build(CLASSES[name], config).eval()
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())  # by diffusers, when it loads a network
    dtype = getattr(torch, model.vae_dtype if name == "vae" else model.dtype)
    for key, weight in network.named_parameters():  # buffers hold tables, such as those of RoPE
        if not kept & set(key.split(".")):
            weight.data = weight.data.to(dtype)
    return network


def _load_adapter(pipe: WanMemoryToVideoPipeline, adapter: Adapter) -> None:
    folder = locate(adapter.weights)
    info = load_memory_lora(pipe, folder, adapter_name=adapter.name, weight=adapter.weight, **adapter.reading)
    stride = pipe.config.rope_stride
    if adapter.memory is not None and info.rope_stride != stride:
        message = "the adapter in %s was trained with RoPE stride %d and is used with %d (model.rope_stride)"
        logger.warning(message, folder, info.rope_stride, stride)

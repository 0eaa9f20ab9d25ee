"""Which published files a model needs, whether they are here, and whether they fit; no weight is read.

Loads no torch until there is a file to hold against a network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from storymem.io import FileError
from storymem.wan.settings import AdapterSettings, Continuity, ModelSettings, SamplerSettings
from storymem.wan.spec import COMPONENTS, T2V_A14B, Expert, ModelSpec
from storymem.weights import MissingWeights, Weights, locate

_ORIGINAL_REPOSITORY = re.compile(r"Wan-AI/Wan2\.\d-.+(?<!-Diffusers)")

Networks = dict[str, Any]  # component -> network on the meta device


@dataclass(frozen=True, kw_only=True)
class Source:
    """One set of weights that a film needs, looked at.

    Attributes:
        weights: what was looked for.
        path: where it lies; None if it is not on this machine.
        problem: why it cannot be used; empty if it can.
        notes: what is not as usual and will be used all the same, such as keys of an adapter that are not read.
    """

    weights: Weights
    path: Path | None
    problem: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.path is None:
            return f"MISSING {self.problem}"
        said = [f"UNFIT: {self.problem}"] if self.problem else self.notes
        return "\n  ".join([f"{self.weights.name}: {self.path}", *"\n".join(said).splitlines()])


def required_weights(
    model: ModelSettings, *, text_to_video: bool, continuity: Continuity, sampler: SamplerSettings | None = None
) -> list[Weights]:
    """All that ``model`` and ``sampler`` load for one film; empty for networks built from their configuration."""
    wanted = [model.weights]
    if model.gguf is not None:
        wanted += [model.gguf.high_noise, model.gguf.low_noise]
    if text_to_video and model.has_text_to_video:
        wanted.append(model.text_to_video)
    if model.adapter is not None:
        wanted.append(adapter_weights(model.adapter, continuity))
    wanted += [extra.weights for extra in model.adapters]
    if sampler is not None and sampler.adapter is not None:
        wanted.append(sampler.adapter.weights)
        if text_to_video and model.has_text_to_video:
            wanted.append(step_weights_for_text(sampler))
    return [weights for weights in wanted if weights is not None]


def check_weights(
    model: ModelSettings,
    *,
    text_to_video: bool,
    continuity: Continuity = "none",
    sampler: SamplerSettings | None = None,
    text_encoder: bool = True,
    experts: Collection[Expert] = tuple(COMPONENTS),
) -> None:
    """Raise one error that lists all that is not on this machine or does not fit; see :func:`look_at_weights`.

    Raises:
        MissingWeights: if anything is missing.
        FileError: if all is there, and something does not fit.
    """
    found = look_at_weights(
        model,
        text_to_video=text_to_video,
        continuity=continuity,
        sampler=sampler,
        text_encoder=text_encoder,
        experts=experts,
    )
    problems = "\n".join(dict.fromkeys(source.problem for source in found if source.problem))
    if problems:
        raise (MissingWeights if any(source.path is None for source in found) else FileError)(problems)


def look_at_weights(
    model: ModelSettings,
    *,
    text_to_video: bool,
    continuity: Continuity = "none",
    sampler: SamplerSettings | None = None,
    text_encoder: bool = True,
    experts: Collection[Expert] = tuple(COMPONENTS),
) -> list[Source]:
    """Every set of weights that a film needs, held against its networks by header.

    Adapters of a base that is missing or does not fit are only looked for.

    Args:
        model, continuity, sampler: of the film.
        text_to_video: whether its first shot is made from text.
        text_encoder: whether texts are encoded.
        experts: which of the transformers are loaded, with their adapters.

    Raises:
        ValueError: if the settings name no weights for what they ask.
    """
    names = [COMPONENTS[expert] for expert in model.spec.experts if expert in experts]
    by_text = text_to_video and model.has_text_to_video
    networks: Networks = {}
    networks_by_text: Networks = {}
    found: list[Source] = []

    def look(weights: Weights, check: Callable[[Path], list[str]]) -> None:
        path: Path | None = None
        try:
            if _ORIGINAL_REPOSITORY.fullmatch(weights.source) and not weights.is_local:
                right = f"{weights.source}-Diffusers"
                raise FileError(f"{weights.source} is in the original Wan layout, which is not read: use {right}")
            path = locate(weights)
            found.append(Source(weights=weights, path=path, notes=tuple(check(path))))
        except (ValueError, FileNotFoundError) as error:
            missing = isinstance(error, MissingWeights)
            found.append(Source(weights=weights, path=None if missing else path or weights.path, problem=str(error)))

    if model.weights is not None:
        parts = ["vae", "text_encoder", "tokenizer"] if text_encoder else ["vae"]
        parts += names if model.gguf is None else []
        look(model.weights, partial(_check_base, components=parts, networks=networks, spec=model.spec))
    if names and (model.gguf is not None or (model.weights is None and _adapters(model, sampler))):
        networks |= _from_settings(model, names, in_channels=model.spec.in_channels)
    if model.gguf is not None:
        for name, weights in zip(COMPONENTS.values(), (model.gguf.high_noise, model.gguf.low_noise), strict=True):
            look(weights, partial(_check_expert, network=networks.get(name)))
    if by_text and model.text_to_video is not None:
        look(model.text_to_video, partial(_check_by_text, networks=networks_by_text))
    elif by_text and _adapters(model, sampler):
        networks_by_text |= _from_settings(model, list(COMPONENTS.values()), in_channels=model.text_spec.in_channels)
    if names and model.adapter is not None:
        look(adapter_weights(model.adapter, continuity), partial(_check_memory, networks=networks, model=model))
    for extra in model.adapters if names else ():
        of = {COMPONENTS[expert] for expert in COMPONENTS if extra.expert in ("both", expert)}
        look(extra.weights, partial(_check_steps, networks={name: it for name, it in networks.items() if name in of}))
    if names and sampler is not None and sampler.adapter is not None:
        look(sampler.adapter.weights, partial(_check_steps, networks=networks))
        if by_text:
            look(step_weights_for_text(sampler), partial(_check_steps, networks=networks_by_text))
    return found


def _adapters(model: ModelSettings, sampler: SamplerSettings | None) -> bool:
    return model.adapter is not None or bool(model.adapters) or (sampler is not None and sampler.adapter is not None)


def _from_settings(model: ModelSettings, names: Collection[str], *, in_channels: int) -> Networks:
    from storymem.wan.folders import on_meta

    shape = {**model.network.transformer, "in_channels": in_channels}
    return dict.fromkeys(names, on_meta("WanTransformer3DModel", shape, "model.network.transformer"))


def _check_base(path: Path, components: Collection[str], networks: Networks, spec: ModelSpec) -> list[str]:
    from storymem.wan.folders import check_channels, check_model

    built = check_model(path, components, repository=spec.repository, setting="model.weights")
    check_channels(path, built, spec, setting="model.weights")
    networks |= built
    return []


def check_text_to_video(folder: Path) -> Networks:
    """The transformers of the first shot's model, by header; FileError if they are incomplete or of another task."""
    from storymem.wan.folders import check_channels, check_component

    built = {name: check_component(folder, name) for name in COMPONENTS.values()}
    check_channels(folder, built, T2V_A14B, setting="model.text_to_video")
    return built


def _check_by_text(path: Path, networks: Networks) -> list[str]:
    networks |= check_text_to_video(path)
    return []


def _check_expert(path: Path, network: Any) -> list[str]:
    from storymem.wan.gguf import check_expert_file

    if network is not None:
        check_expert_file(path, network)
    return []


def _check_memory(path: Path, networks: Networks, model: ModelSettings) -> list[str]:
    from storymem.wan.lora import read_memory_lora

    assert model.adapter is not None
    transformers = _transformers(networks)
    if not transformers:
        return []
    adapters = read_memory_lora(transformers, path, alpha=model.adapter.alpha, use_rslora=model.adapter.use_rslora)
    info = next(iter(adapters.values())).info
    if info.memory_attention != model.memory_attention:
        raise FileError(
            f"the adapter in {path} was trained for {info.memory_attention} memory attention, not "
            f"{model.memory_attention}: set model.memory_attention={info.memory_attention}, or use another adapter"
        )
    notes = [adapter.report for adapter in adapters.values() if not adapter.as_usual]
    if info.rope_stride != model.rope_stride:
        notes.append(f"trained with RoPE stride {info.rope_stride}, used with {model.rope_stride} (model.rope_stride)")
    return notes


def _check_steps(path: Path, networks: Networks) -> list[str]:
    from storymem.wan.lora import read_memory_lora

    transformers = _transformers(networks)
    if not transformers:
        return []
    return [adapter.report for adapter in read_memory_lora(transformers, path, strict=False).values()]


def _transformers(networks: Networks) -> dict[Expert, Any]:
    return {expert: networks[name] for expert, name in COMPONENTS.items() if name in networks}


def step_weights_for_text(sampler: SamplerSettings) -> Weights:
    """The step-distilled adapter of a first shot by text-to-video; a ``ValueError`` if the sampler names none."""
    assert sampler.adapter is not None
    if sampler.adapter.text_to_video is None:
        raise ValueError(
            f"sampler.adapter names no weights for text-to-video, which needs more than {sampler.steps} steps without "
            "them: give sampler.adapter.text_to_video, or make the first shot from reference pictures (first_shot=m2v)"
        )
    return sampler.adapter.text_to_video


def adapter_weights(adapter: AdapterSettings, continuity: Continuity) -> Weights:
    """The adapter's files for one kind of continuity: its own sub-folder where there is one for each."""
    folder = adapter.folders.get(continuity)
    if folder is None:
        return adapter.weights
    found = adapter.weights
    if found.is_local:
        here = found.path.absolute()
        # An adapter of one's own is one folder, or file, for all kinds of continuity.
        own = here.is_file() or any(any(here.glob(f"*{suffix}")) for suffix in (".safetensors", ".pth"))
        inside = here / folder if (here / folder).is_dir() or not own else here
        return Weights(name=found.name, source=str(inside), licence=found.licence)
    return Weights(
        name=f"{found.name} ({folder})",
        source=found.source,
        file=f"{folder}/*",
        size_gb=found.size_gb,
        licence=found.licence,
    )

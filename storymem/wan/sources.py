"""Which published files a model needs; loads none of them, and no torch."""

from __future__ import annotations

from storymem.wan.settings import AdapterSettings, Continuity, ModelSettings, SamplerSettings
from storymem.weights import MissingWeights, Weights, locate


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
) -> None:
    """Raise one :class:`MissingWeights` that lists all that ``model`` and ``sampler`` need and this machine lacks."""
    missing = []
    for weights in required_weights(model, text_to_video=text_to_video, continuity=continuity, sampler=sampler):
        try:
            locate(weights)
        except MissingWeights as error:
            missing.append(str(error))
    if missing:
        raise MissingWeights("\n".join(missing))


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
        # An adapter of one's own is one folder for all kinds of continuity.
        inside = here / folder if (here / folder).is_dir() or not any(here.glob("*.safetensors")) else here
        return Weights(name=found.name, source=str(inside), licence=found.licence)
    return Weights(
        name=f"{found.name} ({folder})",
        source=found.source,
        file=f"{folder}/*",
        size_gb=found.size_gb,
        licence=found.licence,
    )

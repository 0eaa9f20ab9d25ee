"""Which weights a model needs, whether they are on this machine, and whether they fit; tensors are not read.

Imports no torch until there is a file to compare with a network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypedDict, Unpack

from storymem.io import FileError, check_regular
from storymem.wan.settings import AdapterSettings, Continuity, ModelSettings, SamplerSettings
from storymem.wan.spec import COMPONENTS, Expert
from storymem.weights import MissingWeights, Weights, locate

if TYPE_CHECKING:
    from storymem.wan.lora import ExpertAdapter

#: The name of a step-distilled adapter beside that of the memory adapter, "memory".
STEP_ADAPTER = "steps"
_DOWNLOAD = (
    "All at once, with the weights of the scorers: storymem download with the same model=... lists them with their "
    "sizes and licences, and with --yes fetches them."
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One set of weights that a film needs, after it was checked.

    Attributes:
        path: where it is; None if it is not on this machine.
        problem: why it cannot be used; empty if it can.
        notes: what is unusual and does not prevent its use, such as keys of an adapter that are not used.
    """

    weights: Weights
    path: Path | None
    problem: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.path is None:
            return f"MISSING {self.problem}"
        lines = [f"UNFIT: {self.problem}"] if self.problem else self.notes
        return "\n  ".join([f"{self.weights.name}: {self.path}", *"\n".join(lines).splitlines()])


class Needs(TypedDict, total=False):
    """What is made with a model, and so which of its weights are needed.

    Args:
        text_to_video: whether a first shot is generated from text, by ``model.text_model``.
        continuity: selects the adapter, where there is one for each kind; "none" by default.
        sampler: whose adapter is needed, too; None: none.
        vae: true by default; false for a ``text_model``, which uses the VAE of the model that it belongs to.
        text_encoder: whether texts are encoded; true by default.
        experts: which of the transformers are loaded, with their adapters; all by default.
    """

    text_to_video: Required[bool]
    continuity: Continuity
    sampler: SamplerSettings | None
    vae: bool
    text_encoder: bool
    experts: Collection[Expert]


def required_weights(model: ModelSettings, **needs: Unpack[Needs]) -> list[Weights]:
    """All weights that are loaded; networks with random weights need none."""
    return [weights for weights, _ in _required(model, **needs)]


def inspect_weights(model: ModelSettings, **needs: Unpack[Needs]) -> list[Source]:
    """Find all weights and compare their headers with the networks.

    Adapters of a base that is missing or does not fit are only searched for. ``ValueError`` if a setting that names
    weights is missing.
    """
    found = [_inspect(*needed) for needed in _required(model, **needs)]
    return list(dict.fromkeys(found))  # an adapter may be both for the model and for text-to-video


def check_weights(model: ModelSettings, **needs: Unpack[Needs]) -> None:
    """Raise one error for all weights that are missing or do not fit.

    Raises:
        MissingWeights: if any are missing.
        FileError: if all are there, and some do not fit.
    """
    found = inspect_weights(model, **needs)
    problems = list(dict.fromkeys(source.problem for source in found if source.problem))
    missing = [source.weights for source in found if source.path is None]
    if any(not weights.is_local for weights in missing):
        problems.append(_DOWNLOAD)
    if problems:
        raise (MissingWeights if missing else FileError)("\n".join(problems))


def _required(model: ModelSettings, **needs: Unpack[Needs]) -> Iterator[tuple[Weights, Check]]:
    """All weights, each with its check; adapters after the networks that they are compared with."""
    sampler, vae = needs.get("sampler"), needs.get("vae", True)
    experts = [COMPONENTS[expert] for expert in model.spec.experts if expert in needs.get("experts", COMPONENTS)]
    texts = ["text_encoder", "tokenizer"] if needs.get("text_encoder", True) else []
    components = [*(["vae"] if vae else []), *texts, *experts]
    inspection = _Inspection(model, components, "model.weights" if vae else "model.text_to_video")
    yield from inspection.required()
    for adapter in adapters_of(model, sampler, needs.get("continuity", "none")) if experts else ():
        yield adapter.weights, partial(inspection.adapter, adapter=adapter)
    if needs["text_to_video"] and model.has_text_to_video:
        own = sampler and sampler.text_sampler
        yield from _required(model.text_model, text_to_video=False, sampler=own, vae=False, text_encoder=False)


Check = Callable[[Path], list[str]]  # raises ValueError or FileNotFoundError; returns notes


def _inspect(weights: Weights, check: Check) -> Source:
    path: Path | None = None
    try:
        path = locate(weights)
        return Source(weights=weights, path=path, notes=tuple(check(path)))
    except MissingWeights as error:
        return Source(weights=weights, path=None, problem=str(error))
    except (ValueError, FileNotFoundError) as error:
        return Source(weights=weights, path=path or weights.path, problem=str(error))


class _Inspection:
    """The weights of components of a model, each with its check, which gives what adapters are compared with.

    Args:
        components: as ``model_index.json`` names them.
        setting: that names the folder with most of them, for messages.
    """

    def __init__(self, model: ModelSettings, components: Sequence[str], setting: str) -> None:
        self.model, self.components, self.setting = model, components, setting
        self.networks: dict[str, Any] = {}  # on the meta device

    def required(self) -> Iterator[tuple[Weights, Check]]:
        """The folder, and single files."""
        files = {name: file for name in self.components if (file := self.model.file_of(name)) is not None}
        if (folder := self.model.folder_of(*self.components)) is not None:
            yield folder, partial(self.folder, names=[name for name in self.components if name not in files])
        for name, weights in files.items():
            yield weights, partial(self.single_file, name=name)

    def folder(self, path: Path, names: list[str]) -> list[str]:
        from storymem.wan.components import check_folder, load_component

        if names == ["tokenizer"]:
            load_component(self.model, "tokenizer")
        else:
            self.networks |= check_folder(path, names, self.model, self.setting)
        return []

    def single_file(self, path: Path, name: str) -> list[str]:
        from storymem.wan.components import check_component
        from storymem.wan.lora_files import expert_named

        self.networks[name] = check_component(check_regular(path), name, self.model)
        named = expert_named(path.stem)
        if name not in COMPONENTS.values() or named is None or COMPONENTS[named] == name:
            return []
        expert = next(expert for expert, component in COMPONENTS.items() if component == name)
        return [f"its name is that of the {named} expert, and it is used as {expert}"]

    def adapter(self, path: Path, adapter: Adapter) -> list[str]:
        from storymem.wan.lora import read_memory_lora

        networks = {expert: network for expert, network in self.adapted().items() if expert in adapter.weight}
        if not networks:  # those of the base did not fit
            return []
        found = list(read_memory_lora(networks, path, **adapter.reading).values())
        if adapter.memory is not None:
            return self.memory_notes(path, adapter.memory, found)
        return [one.report for one in found]

    def memory_notes(self, path: Path, settings: AdapterSettings, found: Sequence[ExpertAdapter]) -> list[str]:
        """What is unusual about the memory adapter; ``FileError`` if it is for other settings."""
        model, info = self.model, found[0].info
        if info.objective != settings.objective:
            raise FileError(
                f"the adapter in {path} was trained for another system, objective={info.objective}, not "
                f"{settings.objective}: use it with method={info.objective}, or use another adapter"
            )
        if settings.query and (without := [one.file.path for one in found if not one.file.query]):
            raise FileError(
                f"{without[0]} holds no KeyframeQuery, with which keyframes are recalled: use an adapter that was "
                "trained with objective=memento, or another memory"
            )
        notes = [adapter.report for adapter in found if not adapter.as_usual]
        if info.objective != "memory":  # the others have layouts of their own
            return notes
        if info.memory_attention != model.memory_attention:
            raise FileError(
                f"the adapter in {path} was trained for {info.memory_attention} memory attention, not "
                f"{model.memory_attention}: set model.memory_attention={info.memory_attention}, or use another adapter"
            )
        if (stride := model.rope_stride) != info.rope_stride:
            notes.append(f"trained with RoPE stride {info.rope_stride}, used with {stride} (model.rope_stride)")
        return notes

    def adapted(self) -> dict[Expert, Any]:
        """The transformers that adapters are for; none where they did not fit."""
        from storymem.wan.components import random_on_meta

        names = {expert: name for expert, name in COMPONENTS.items() if name in self.components}
        if self.model.weights is None:
            return {expert: random_on_meta(self.model, name) for expert, name in names.items()}
        return {expert: self.networks[name] for expert, name in names.items() if name in self.networks}


# Adapters


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter of a pipeline.

    Args:
        name: in the networks.
        weights: its files.
        weight: strength in each expert that it is for; 1.0 as trained.
        memory: settings of the memory adapter; None: it is another, which may cover any part of the networks.
    """

    name: str
    weights: Weights
    weight: Mapping[Expert, float]
    memory: AdapterSettings | None = None

    @property
    def reading(self) -> dict[str, Any]:
        """How it is read: options of :func:`storymem.wan.lora.read_memory_lora`."""
        if self.memory is None:
            return {"strict": False}
        return {"strict": True, "alpha": self.memory.alpha, "use_rslora": self.memory.use_rslora}


def adapters_of(model: ModelSettings, sampler: SamplerSettings | None, continuity: Continuity) -> Iterator[Adapter]:
    """All adapters of a pipeline, in the order in which they are loaded; ``continuity`` selects the memory adapter."""
    if (memory := model.adapter) is not None:
        weights, strength = adapter_weights(memory, continuity), dict.fromkeys(COMPONENTS, memory.weight)
        yield Adapter(name="memory", weights=weights, weight=strength, memory=memory)
    for number, extra in enumerate(model.adapters, start=1):
        experts = [expert for expert in COMPONENTS if extra.expert in ("both", expert)]
        yield Adapter(name=f"extra_{number}", weights=extra.weights, weight=dict.fromkeys(experts, extra.weight))
    if sampler is not None and (steps := sampler.adapter) is not None:
        low = steps.weight if steps.weight_low is None else steps.weight_low
        strength = {"high_noise": steps.weight, "low_noise": low}
        yield Adapter(name=STEP_ADAPTER, weights=steps.weights, weight=strength)


def adapter_weights(adapter: AdapterSettings, continuity: Continuity) -> Weights:
    """The adapter's files for one kind of continuity: its own sub-folder where there is one for each."""
    found, folder = adapter.weights, adapter.folders.get(continuity)
    if folder is None:
        return found
    if not found.is_local:
        return replace(found, name=f"{found.name} ({folder})", file=f"{folder}/*")
    here = found.path.absolute()
    # A user's own adapter is one folder, or file, for all kinds of continuity.
    own = here.is_file() or any(any(here.glob(f"*{suffix}")) for suffix in (".safetensors", ".pth"))
    inside = here / folder if (here / folder).is_dir() or not own else here
    return Weights(name=found.name, source=str(inside), licence=found.licence)

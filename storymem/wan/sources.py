"""Which weights a model needs, whether they are on this machine, and whether they fit; tensors are not read.

Imports no torch until there is a file to compare with a network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
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
        text_to_video: whether a first shot is generated from text.
        continuity: selects the adapter, where there is one for each kind; "none" by default.
        sampler: whose adapter is needed, too; None: none.
        text_encoder: whether texts are encoded; true by default.
        experts: which of the transformers are loaded, with their adapters; all by default.
    """

    text_to_video: Required[bool]
    continuity: Continuity
    sampler: SamplerSettings | None
    text_encoder: bool
    experts: Collection[Expert]


def required_weights(model: ModelSettings, **needs: Unpack[Needs]) -> list[Weights]:
    """All weights that are loaded; networks with random weights need none."""
    return [weights for weights, _ in _Inspection(model, **needs).required()]


def inspect_weights(model: ModelSettings, **needs: Unpack[Needs]) -> list[Source]:
    """Find all weights and compare their headers with the networks.

    Adapters of a base that is missing or does not fit are only searched for. ``ValueError`` if a setting that names
    weights is missing.
    """
    return [_inspect(*needed) for needed in _Inspection(model, **needs).required()]


def check_weights(model: ModelSettings, **needs: Unpack[Needs]) -> None:
    """Raise one error for all weights that are missing or do not fit.

    Raises:
        MissingWeights: if any are missing.
        FileError: if all are there, and some do not fit.
    """
    _raise_for(inspect_weights(model, **needs))


def check_text_weights(model: ModelSettings) -> None:
    """As :func:`check_weights`, for the transformers that generate a first shot from text alone."""
    _raise_for([_inspect(*needed) for needed in _Inspection(model, text_to_video=True).text_experts()])


def _raise_for(found: list[Source]) -> None:
    problems = list(dict.fromkeys(source.problem for source in found if source.problem))
    missing = [source.weights for source in found if source.path is None]
    if any(not weights.is_local for weights in missing):
        problems.append(_DOWNLOAD)
    if problems:
        raise (MissingWeights if missing else FileError)("\n".join(problems))


#: Component -> where it is in Wan's original release, as a pattern; an expert that is alone is in the folder itself.
ORIGINAL_FILES = {
    "vae": "Wan*_VAE.*",
    "text_encoder": "models_t5_umt5-xxl-enc-*",
    "tokenizer": "google/umt5-xxl",
    "transformer": "high_noise_model",
    "transformer_2": "low_noise_model",
}
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def original_parts(folder: Path) -> dict[str, Path]:
    """Component -> its file, index or folder, in a folder in Wan's original layout; empty for any other."""
    if not folder.is_dir() or (folder / "model_index.json").exists():
        return {}
    ways = {name: [pattern] for name, pattern in ORIGINAL_FILES.items()}
    for name in COMPONENTS.values():
        stems = [f"{ORIGINAL_FILES[name]}/{_WEIGHTS}", *([_WEIGHTS] if name == "transformer" else [])]
        ways[name] = [f"{stem}{suffix}" for stem in stems for suffix in (".index.json", "")]
    found = {name: [path for each in patterns for path in sorted(folder.glob(each))] for name, patterns in ways.items()}
    return {name: paths[0] for name, paths in found.items() if paths}


def component_path(model: ModelSettings, name: str, *, by_text: bool = False) -> Path:
    """The file, index or folder of one component (as ``model_index.json`` names it); MissingWeights if not here."""
    if (weights := model.file_of(name, by_text=by_text)) is not None:
        return locate(weights)
    experts = [COMPONENTS[expert] for expert in model.spec.experts]
    names = ["vae", "text_encoder", name, *experts] if name == "tokenizer" else [name]
    folder = model.folder_of(*names, by_text=by_text)
    assert folder is not None, f"{model.name} has no weights of {name}"
    found = locate(folder)
    return original_parts(found).get(name) or (found if found.name == "tokenizer" else found / name)


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
    """The weights of one model, each with its check; those of networks give what adapters are compared with."""

    def __init__(
        self,
        model: ModelSettings,
        *,
        text_to_video: bool,
        continuity: Continuity = "none",
        sampler: SamplerSettings | None = None,
        text_encoder: bool = True,
        experts: Collection[Expert] = tuple(COMPONENTS),
    ) -> None:
        self.model, self.sampler, self.continuity = model, sampler, continuity
        self.by_text = text_to_video and model.has_text_to_video
        self.texts = ["text_encoder", "tokenizer"] if text_encoder else []
        self.experts = [expert for expert in model.spec.experts if expert in experts]
        # On the meta device: those of the model, and of the text-to-video model.
        self.networks: dict[bool, dict[Expert, Any]] = {False: {}, True: {}}

    def required(self) -> Iterator[tuple[Weights, Check]]:
        """All weights, adapters after the networks that they are compared with."""
        model = self.model
        if (folder := model.folder_of(*self.components)) is not None:
            yield folder, self.folder
        for name in self.components:
            if (weights := model.file_of(name)) is not None:
                yield weights, partial(self.single_file, name=name)
        if self.by_text:
            yield from self.text_experts()
        if not self.experts:
            return
        if model.adapter is not None:
            yield adapter_weights(model.adapter, self.continuity), self.memory_adapter
        for extra in model.adapters:
            chosen = [expert for expert in COMPONENTS if extra.expert in ("both", expert)]
            yield extra.weights, partial(self.adapter, experts=chosen)
        if self.sampler is not None and self.sampler.adapter is not None:
            yield self.sampler.adapter.weights, self.adapter
            if self.by_text:
                yield step_weights_for_text(self.sampler), partial(self.adapter, by_text=True)

    @property
    def components(self) -> list[str]:
        """Those that are loaded, as ``model_index.json`` names them."""
        return ["vae", *self.texts, *(COMPONENTS[expert] for expert in self.experts)]

    def text_experts(self) -> Iterator[tuple[Weights, Check]]:
        """The transformers of the text-to-video model."""
        if self.model.text_to_video_gguf is not None:
            for name, weights in zip(COMPONENTS.values(), self.model.text_to_video_gguf.all, strict=False):
                yield weights, partial(self.single_file, name=name, by_text=True)
        elif (folder := self.model.folder_of(*COMPONENTS.values(), by_text=True)) is not None:
            yield folder, partial(self.folder, by_text=True)

    def folder(self, path: Path, by_text: bool = False) -> list[str]:
        from storymem.wan.components import check_folder, load_component

        model, names = self.model, list(COMPONENTS.values())
        if not by_text:
            names = [name for name in self.components if model.file_of(name) is None]
        if names == ["tokenizer"]:
            load_component(model, "tokenizer")
            return []
        spec, setting = (model.text_spec, "model.text_to_video") if by_text else (model.spec, "model.weights")
        built = check_folder(path, names, model, spec, setting)
        self.networks[by_text] |= {expert: built[name] for expert, name in COMPONENTS.items() if name in built}
        return []

    def single_file(self, path: Path, name: str, by_text: bool = False) -> list[str]:
        from storymem.wan.components import check_component
        from storymem.wan.lora_files import expert_named

        spec = self.model.text_spec if by_text else self.model.spec
        network = check_component(check_regular(path), name, self.model, spec)
        expert = next((it for it, component in COMPONENTS.items() if component == name), None)
        if expert is None:
            return []
        self.networks[by_text][expert] = network
        named = expert_named(path.stem)
        swapped = named not in (None, expert)
        return [f"its name is that of the {named} expert, and it is used as {expert}"] if swapped else []

    def memory_adapter(self, path: Path) -> list[str]:
        model = self.model
        assert model.adapter is not None
        own = {"alpha": model.adapter.alpha, "use_rslora": model.adapter.use_rslora}
        adapters = _adapters(path, self.adapted(), strict=True, **own)
        if not adapters:
            return []
        info = adapters[0].info
        if info.objective != model.adapter.objective:
            raise FileError(
                f"the adapter in {path} was trained for another system, objective={info.objective}, not "
                f"{model.adapter.objective}: use it with method={info.objective}, or use another adapter"
            )
        if model.adapter.query and (without := [one.file.path for one in adapters if not one.file.query]):
            raise FileError(
                f"{without[0]} holds no KeyframeQuery, with which keyframes are recalled: use an adapter that was "
                "trained with objective=memento, or another memory"
            )
        notes = [adapter.report for adapter in adapters if not adapter.as_usual]
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

    def adapter(self, path: Path, experts: Collection[Expert] = tuple(COMPONENTS), by_text: bool = False) -> list[str]:
        networks = {expert: network for expert, network in self.adapted(by_text).items() if expert in experts}
        return [adapter.report for adapter in _adapters(path, networks, strict=False)]

    def adapted(self, by_text: bool = False) -> dict[Expert, Any]:
        """The transformers that adapters are for; none where they did not fit."""
        if self.model.weights is not None:
            return self.networks[by_text]
        from storymem.wan.components import config_of
        from storymem.wan.folders import on_meta

        spec = self.model.text_spec if by_text else self.model.spec
        config = config_of(self.model, "transformer", spec)
        network = on_meta("WanTransformer3DModel", config, "model.network.transformer")
        return dict.fromkeys(spec.experts if by_text else self.experts, network)


def _adapters(path: Path, networks: dict[Expert, Any], **options: Any) -> list[ExpertAdapter]:
    """An adapter of each network; none where the networks themselves did not fit."""
    from storymem.wan.lora import read_memory_lora

    return list(read_memory_lora(networks, path, **options).values()) if networks else []


def step_weights_for_text(sampler: SamplerSettings) -> Weights:
    """The step-distilled adapter of a first shot by text-to-video; a ``ValueError`` if the sampler names none."""
    assert sampler.adapter is not None
    if sampler.adapter.text_to_video is None:
        raise ValueError(
            f"sampler.adapter names no weights for text-to-video, which needs more than {sampler.steps} steps without "
            "them: set sampler.adapter.text_to_video, or generate the first shot from reference images (first_shot=m2v)"
        )
    return sampler.adapter.text_to_video


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

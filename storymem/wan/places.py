"""Where the components of a model are: in diffusers' layout, in Wan's original one, or each in a file of its own.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from storymem.wan.settings import ModelSettings
from storymem.wan.spec import COMPONENTS
from storymem.weights import locate

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


def component_path(model: ModelSettings, name: str) -> Path:
    """The file, index or folder of one component (as ``model_index.json`` names it); MissingWeights if not here."""
    if (weights := model.file_of(name)) is not None:
        return locate(weights)
    experts = [COMPONENTS[expert] for expert in model.spec.experts]
    names = ["vae", "text_encoder", name, *experts] if name == "tokenizer" else [name]
    folder = model.folder_of(*names)
    assert folder is not None, f"{model.name} has no weights of {name}"
    found = locate(folder)
    return original_parts(found).get(name) or (found if found.name == "tokenizer" else found / name)

"""CLIP by open_clip: image and text embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import open_clip
import torch
from accelerate import init_empty_weights
from open_clip.factory import load_state_dict
from torch import Tensor

from storymem.scorers.checkpoint import load_strictly
from storymem.scorers.inputs import check_frames, check_texts
from storymem.scorers.preprocessing import CLIP_MEAN, CLIP_PREPROCESSINGS, CLIP_STD, normalise
from storymem.scorers.scorer import Scorer, unit
from storymem.scorers.texts import ClipTokenizer
from storymem.weights import Weights, locate

_WEIGHTS_FILE = "open_clip_model.safetensors"
_CONFIG_FILE = "open_clip_config.json"
_SIZES_GB = {"ViT-B-32": 0.6, "ViT-B-16": 0.6, "ViT-L-14": 1.7}


class ClipScorer(Scorer[open_clip.CLIP]):
    """Image and text embeddings of a CLIP model.

    Args:
        network: an open_clip model.
        preprocessing: ``"published_selector"`` (squash to the input size, bilinear, no antialias, no crop) or
            ``"published_aesthetic"`` (8-bit bicubic of the short side without antialias, centre crop).
        mean: normalisation the weights were trained with.
        std: the same.
        tokenizer: CLIP's own by default.
        device, dtype, batch_size: see `Scorer`.
    """

    def __init__(
        self,
        network: open_clip.CLIP,
        *,
        tokenizer: ClipTokenizer | None = None,
        preprocessing: str = "published_selector",
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        if preprocessing not in CLIP_PREPROCESSINGS:
            names = ", ".join(CLIP_PREPROCESSINGS)
            raise ValueError(f"unknown preprocessing {preprocessing!r}; write one of {names}")
        super().__init__(network, device=device, dtype=dtype, batch_size=batch_size)
        self.preprocessing = preprocessing
        self.mean, self.std = tuple(mean), tuple(std)
        self.image_size: tuple[int, int] = tuple(network.visual.image_size)
        self.dim: int = network.visual.output_dim
        self.tokenizer = tokenizer or ClipTokenizer(network.context_length)

    @staticmethod
    def required_weights(
        model: str = "ViT-B-32-quickgelu", pretrained: str = "openai", source: str | None = None, **_: Any
    ) -> list[Weights]:
        """What :meth:`from_pretrained` loads."""
        _, tag = _model_and_tag(model, pretrained)
        owner, name, *file = tag["hf_hub"].strip("/").split("/")
        weights = Weights(
            name=f"CLIP {model} ({pretrained})",
            source=source or f"{owner}/{name}",
            file=file[0] if file else _WEIGHTS_FILE,
            size_gb=_SIZES_GB.get(model.removesuffix("-quickgelu"), 0.0),
            licence="MIT (OpenAI CLIP)" if pretrained == "openai" else "see the model card",
        )
        return [weights]

    @classmethod
    def from_pretrained(
        cls,
        model: str = "ViT-B-32-quickgelu",
        pretrained: str = "openai",
        source: str | None = None,
        *,
        preprocessing: str = "published_selector",
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> Self:
        """Load published weights.

        Args:
            model: open_clip's name of the architecture.
            pretrained: open_clip's tag for who trained the weights; it decides activation and normalisation.
            source: a local file or folder, or a hub id; by default the repository the tag stands for.
            preprocessing, device, dtype, batch_size: see the class.

        Raises:
            ValueError: for unknown names, and for a model whose activation is not the one the weights were
                trained with: OpenAI's load into the plain ``ViT-...`` names and are silently wrong there.
            MissingWeights: if the weights are not on this machine.
            CheckpointError: if the file holds another model.
        """
        config, tag = _model_and_tag(model, pretrained)
        (weights,) = cls.required_weights(model, pretrained, source)
        path = locate(weights)
        beside = path.parent / _CONFIG_FILE
        if beside.is_file():
            _check_activation(model, config, json.loads(beside.read_text())["model_cfg"], str(beside))
        return cls(
            _load(config, path),
            preprocessing=preprocessing,
            mean=tag.get("mean") or CLIP_MEAN,
            std=tag.get("std") or CLIP_STD,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        preprocessing: str = "published_selector",
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> Self:
        """Load a model of any size from a folder in open_clip's own layout.

        It holds ``open_clip_config.json``, that is ``{"model_cfg": ..., "preprocess_cfg": ...}``, and the
        state dict in ``open_clip_model.safetensors``; for a smaller vocabulary than CLIP's also
        ``bpe_vocabulary.txt.gz``, as open_clip's ``SimpleTokenizer`` reads it.

        Raises:
            MissingWeights: if the folder lacks one of the first two files.
            CheckpointError: if they do not fit each other.
        """
        name = f"CLIP model in {folder}"
        config = json.loads(locate(Weights(name=name, source=str(folder), file=_CONFIG_FILE)).read_text())
        path = locate(Weights(name=name, source=str(folder), file=_WEIGHTS_FILE))
        published = config.get("preprocess_cfg", {})
        network = _load(config["model_cfg"], path)
        return cls(
            network,
            tokenizer=ClipTokenizer.from_folder(path.parent, network.context_length, network.vocab_size),
            preprocessing=preprocessing,
            mean=published.get("mean", CLIP_MEAN),
            std=published.get("std", CLIP_STD),
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        seed: int = 0,
        preprocessing: str = "published_selector",
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> Self:
        """An untrained model of any size, the same for the same ``seed``; for tests and trials only.

        Args:
            config: of the model, as open_clip writes it: ``embed_dim``, ``quick_gelu``, ``vision_cfg``,
                ``text_cfg``.
            seed: of the random weights; the global random state is left as it was.
            preprocessing, device, dtype, batch_size: see the class.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _build(config)
        return cls(network, preprocessing=preprocessing, device=device, dtype=dtype, batch_size=batch_size)

    def embed_images(self, frames: Tensor) -> Tensor:
        """Embeddings of pictures.

        Args:
            frames: [N, 3, H, W], float in 0..1, RGB, of any size.

        Returns:
            [N, D] float32 on the CPU, of unit length.

        Raises:
            ValueError: for anything else; see `check_frames`.
        """
        return self._in_batches(check_frames(frames), self._encode_images, self.dim)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, [N, D] float32 on the CPU, of unit length; long texts are cut."""
        ids = self.tokenizer(check_texts(texts))
        return self._in_batches(ids, lambda batch: unit(self.network.encode_text(batch)), self.dim)

    def _encode_images(self, frames: Tensor) -> Tensor:
        pixels = CLIP_PREPROCESSINGS[self.preprocessing](frames, self.image_size)
        pixels = normalise(pixels, self.mean, self.std).to(self.dtype)
        return unit(self.network.encode_image(pixels))


def _build(config: Mapping[str, Any]) -> open_clip.CLIP:
    plain = json.loads(json.dumps(config, default=dict))  # open_clip changes what it is given
    return open_clip.CLIP(**plain)


def _load(config: Mapping[str, Any], path: Path) -> open_clip.CLIP:
    with init_empty_weights(include_buffers=False):
        network = _build(config)
    load_strictly(network, load_state_dict(str(path), weights_only=True), path, assign=True)
    return network


def _model_and_tag(model: str, pretrained: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config = open_clip.get_model_config(model)
    if config is None:
        raise ValueError(f"open_clip has no model {model!r}; write for example ViT-B-32-quickgelu")
    if set(config) - {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}:
        raise ValueError(f"{model} is not a plain CLIP model; write for example ViT-B-32-quickgelu")
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if not tag.get("hf_hub"):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(f"open_clip has no weights {pretrained!r} for {model}; it knows: {known}")
    _check_activation(model, config, tag, f"the weights {pretrained!r}")
    return config, tag


def _check_activation(model: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], whose: str) -> None:
    """Raise if the architecture's activation is not the one its weights were trained with."""
    quick = bool(theirs.get("quick_gelu", False))
    if bool(ours.get("quick_gelu", False)) == quick:
        return
    plain = model.removesuffix("-quickgelu")
    raise ValueError(
        f"{whose} were trained with {'QuickGELU' if quick else 'GELU'}, but {model} computes"
        f" {'GELU' if quick else 'QuickGELU'}: they would load without complaint and give wrong embeddings;"
        f" write {plain + '-quickgelu' if quick else plain}"
    )

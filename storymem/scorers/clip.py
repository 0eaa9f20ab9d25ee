"""CLIP by open_clip: image and text embeddings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Self

import open_clip
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from storymem.config import STRICT, ConfigError, build_settings
from storymem.io import FileError, read_json_object
from storymem.scorers.checkpoint import load_strictly, read_checkpoint
from storymem.scorers.inputs import check_frames, check_texts
from storymem.scorers.preprocessing import CLIP_MEAN, CLIP_PREPROCESSINGS, CLIP_STD, normalise
from storymem.scorers.scorer import Scorer, unit
from storymem.scorers.texts import ClipTokenizer
from storymem.weights import Weights, locate

_WEIGHTS_FILE = "open_clip_model.safetensors"
_CONFIG_FILE = "open_clip_config.json"
_SIZES_GB = {"ViT-B-32": 0.6, "ViT-B-16": 0.6, "ViT-L-14": 1.7}
_Width = Annotated[int, Field(ge=1, le=8192)]
_Count = Annotated[int, Field(ge=1, le=96)]  # of layers and heads


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClipVision:
    """Sizes of CLIP's vision tower, a plain ViT, as open_clip names them."""

    image_size: Annotated[int, Field(ge=1, le=1024)] = 224
    patch_size: Annotated[int, Field(ge=1, le=256)] = 16
    width: _Width = 768
    head_width: _Width = 64
    layers: _Count = 12
    mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0

    def __post_init__(self) -> None:
        if self.width % self.head_width:
            raise ValueError(f"width={self.width} is not a multiple of head_width={self.head_width}")
        if not self.patch_size <= self.image_size <= 128 * self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not 1 to 128 times patch_size={self.patch_size}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClipText:
    """Sizes of CLIP's text tower, as open_clip names them."""

    context_length: Annotated[int, Field(ge=3, le=4096)] = 77
    vocab_size: Annotated[int, Field(ge=1, le=1 << 20)] = 49408
    width: _Width = 512
    heads: _Count = 8
    layers: _Count = 12

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClipConfig:
    """A plain CLIP model as open_clip writes it.

    Nothing else that open_clip knows is taken: other towers may be fetched from a hub when they are built.
    """

    embed_dim: _Width
    quick_gelu: bool = False
    vision_cfg: ClipVision
    text_cfg: ClipText


class ClipScorer(Scorer[open_clip.CLIP]):
    """Image and text embeddings of a CLIP model.

    Args:
        network: an open_clip model.
        preprocessing: ``"published_selector"`` (squash to the input size, bilinear, no antialias, no crop) or
            ``"published_aesthetic"`` (bicubic of the short side without antialias, centre crop, not clamped).
        mean: normalisation the weights were trained with, one number a channel.
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
        self.mean, self.std = _channels("mean", mean), _channels("std", std)
        if min(self.std) <= 0:
            raise ValueError(f"std={list(self.std)}: must be above 0")
        self.image_size: tuple[int, int] = tuple(network.visual.image_size)
        self.dim: int = network.visual.output_dim
        self.tokenizer = tokenizer or ClipTokenizer(network.context_length)

    @staticmethod
    def required_weights(
        model: str = "ViT-B-32-quickgelu", pretrained: str = "openai", source: str | None = None, **_: Any
    ) -> list[Weights]:
        """What :meth:`from_pretrained` loads."""
        tag = _model_and_tag(model, pretrained)[1]
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
            _check_activation(model, config, read_json_object(beside).get("model_cfg"), str(beside))
        scorer = cls(
            _load(config, path),
            preprocessing=preprocessing,
            mean=tag.get("mean") or CLIP_MEAN,
            std=tag.get("std") or CLIP_STD,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )
        scorer.origin = "published"
        return scorer

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
            FileError, CheckpointError: if a file is damaged, describes another kind of model, or they do not fit.
        """
        name = f"CLIP model in {folder}"
        described = locate(Weights(name=name, source=str(folder), file=_CONFIG_FILE))
        config, published = _read_config(described)
        path = locate(Weights(name=name, source=str(folder), file=_WEIGHTS_FILE))
        network = _load(config, path)
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
        config: ClipConfig | Mapping[str, Any],
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
            network = _build(config if isinstance(config, ClipConfig) else _plain_config(config))
        scorer = cls(network, preprocessing=preprocessing, device=device, dtype=dtype, batch_size=batch_size)
        scorer.origin = "untrained"
        return scorer

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


def _channels(name: str, values: Any) -> tuple[float, ...]:
    """``values`` as one finite number for each of three channels. Raises ``ValueError``."""
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 3:
        raise ValueError(f"{name}={values!r}: write three numbers")
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in values):
        raise ValueError(f"{name}={values!r}: write three numbers")
    return tuple(float(value) for value in values)


def _read_config(path: Path) -> tuple[ClipConfig, Mapping[str, Any]]:
    """Model and preprocessing of an ``open_clip_config.json``. Raises ``FileError``."""
    content = read_json_object(path)
    model, preprocess = content.get("model_cfg"), content.get("preprocess_cfg", {})
    if not isinstance(model, dict) or not isinstance(preprocess, dict):
        raise FileError(f"{path}: model_cfg and preprocess_cfg must be JSON objects")
    try:
        for name in preprocess.keys() & {"mean", "std"}:
            _channels(name, preprocess[name])
        return build_settings(ClipConfig, model), preprocess
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None


def _plain_config(config: Mapping[str, Any]) -> ClipConfig:
    """From plain or OmegaConf containers."""
    return build_settings(ClipConfig, json.loads(json.dumps(config, default=dict)))


def _build(config: ClipConfig) -> open_clip.CLIP:
    return open_clip.CLIP(**asdict(config))


def _load(config: ClipConfig, path: Path) -> open_clip.CLIP:
    tensors = read_checkpoint(path, inside="state_dict")
    if all(name.startswith("module.") for name in tensors):  # written by open_clip's training on several GPUs
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    with torch.device("meta"):
        network = _build(config)
    load_strictly(network, tensors, path, assign=True)
    causal = torch.full((config.text_cfg.context_length,) * 2, -math.inf).triu_(1)
    network.register_buffer("attn_mask", causal, persistent=False)  # no checkpoint has it
    return network


def _model_and_tag(model: str, pretrained: str) -> tuple[ClipConfig, dict[str, Any]]:
    described = open_clip.get_model_config(model)
    if described is None:
        raise ValueError(f"open_clip has no model {model!r}; write for example ViT-B-32-quickgelu")
    try:
        config = build_settings(ClipConfig, described)
    except ConfigError:
        raise ValueError(f"{model} is not a plain CLIP model; write for example ViT-B-32-quickgelu") from None
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if not tag.get("hf_hub"):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(f"open_clip has no weights {pretrained!r} for {model}; it knows: {known}")
    _check_activation(model, config, tag, f"the weights {pretrained!r}")
    return config, tag


def _check_activation(model: str, ours: ClipConfig, theirs: Any, whose: str) -> None:
    """Raise if the architecture's activation is not the one its weights were trained with."""
    if not isinstance(theirs, Mapping):
        raise FileError(f"{whose} does not describe a model: model_cfg must be a JSON object")
    quick = bool(theirs.get("quick_gelu", False))
    if ours.quick_gelu == quick:
        return
    plain = model.removesuffix("-quickgelu")
    raise ValueError(
        f"{whose} were trained with {'QuickGELU' if quick else 'GELU'}, but {model} computes"
        f" {'GELU' if quick else 'QuickGELU'}: they would load without complaint and give wrong embeddings;"
        f" write {plain + '-quickgelu' if quick else plain}"
    )

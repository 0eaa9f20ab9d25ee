"""CLIP by open_clip: image and text embeddings."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self, Unpack

import open_clip
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from storymem.config import STRICT, ConfigError, build_settings
from storymem.io import FileError, check_regular, read_json_object
from storymem.scorers.checkpoint import Count, Width, loaded, read_checkpoint, read_sizes, seeded
from storymem.scorers.preprocessing import CLIP_MEAN, CLIP_STD, crop, normalise, squash
from storymem.scorers.scorer import Placement, Scorer, check_frames, check_texts, unit
from storymem.weights import Weights, locate

logger = logging.getLogger(__name__)

VOCABULARY_FILE = "bpe_vocabulary.txt.gz"  # beside the weights of a network with a vocabulary of its own
_MAX_VOCABULARY = 16 << 20  # bytes when unpacked; CLIP's own has 3.2 million
_WEIGHTS_FILE = "open_clip_model.safetensors"
_CONFIG_FILE = "open_clip_config.json"
_SIZES_GB = {"ViT-B-32": 0.6, "ViT-B-16": 0.6, "ViT-L-14": 1.7}
_PREPROCESSINGS = {"published_selector": squash, "published_aesthetic": crop}


class ClipTokenizer:
    """open_clip's byte-pair tokenizer at a fixed context length.

    Args:
        context_length: a longer text keeps its first tokens and the end-of-text token.
        vocabulary: a gzipped list of merges; open_clip's own by default.

    Attributes:
        vocab_size: 512 + merges + 2.

    Raises:
        FileError: if the vocabulary is damaged.
    """

    def __init__(self, context_length: int, vocabulary: Path | None = None) -> None:
        self.context_length = context_length
        self._tokenizer = _tokenizer(context_length, vocabulary, "" if vocabulary is None else _checked(vocabulary))
        self.vocab_size: int = self._tokenizer.eot_token_id + 1  # the last; merges written twice count twice

    @classmethod
    def from_folder(cls, folder: Path, context_length: int, rows: int) -> Self:
        """The tokenizer of a model's folder: with the vocabulary in it, or CLIP's where there is none.

        Raises:
            FileError: if the vocabulary is damaged, or gives more ids than the model has ``rows`` of embeddings.
        """
        path = folder / VOCABULARY_FILE
        has_own = path.exists()
        tokenizer = cls(context_length, path if has_own else None)
        if tokenizer.vocab_size > rows:
            which = f"its {VOCABULARY_FILE}" if has_own else f"CLIP's vocabulary (it has no {VOCABULARY_FILE})"
            raise FileError(f"the model in {folder} embeds {rows} tokens, but {which} has {tokenizer.vocab_size}")
        return tokenizer

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text before truncation, start and end of text included."""
        return [len(self._tokenizer.encode(text)) + 2 for text in texts]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 [N, context_length], padded with 0; warns of texts that are cut."""
        if cut := sum(count > self.context_length for count in self.token_counts(texts)):
            logger.warning(
                "%d of %d texts are longer than %d tokens and were cut", cut, len(texts), self.context_length
            )
        return self._tokenizer(list(texts)) if texts else torch.zeros(0, self.context_length, dtype=torch.int64)


@cache  # reading the vocabulary takes longer than building a small model
def _tokenizer(context_length: int, vocabulary: Path | None, content: str) -> open_clip.SimpleTokenizer:
    """``content`` is the hash of the file, which may change."""
    bpe = {} if vocabulary is None else {"bpe_path": str(vocabulary)}
    return open_clip.SimpleTokenizer(**bpe, context_length=context_length)


def _checked(vocabulary: Path) -> str:
    """The hash of a vocabulary that is text of a sensible size, else ``FileError``."""
    try:
        with gzip.open(check_regular(vocabulary)) as opened:
            content = opened.read(_MAX_VOCABULARY + 1)
        content.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FileError(f"{vocabulary} is not a gzipped list of merges in UTF-8: {error}") from None
    if len(content) > _MAX_VOCABULARY:
        raise FileError(f"{vocabulary} unpacks to more than {_MAX_VOCABULARY:,} bytes; no vocabulary is so large")
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClipVision:
    """Sizes of CLIP's vision tower, a plain ViT, as open_clip names them."""

    image_size: Annotated[int, Field(ge=1, le=1024)] = 224
    patch_size: Annotated[int, Field(ge=1, le=256)] = 16
    width: Width = 768
    head_width: Width = 64
    layers: Count = 12
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
    width: Width = 512
    heads: Count = 8
    layers: Count = 12

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClipConfig:
    """A plain CLIP model as open_clip describes it. Other towers are refused: building one may download it."""

    embed_dim: Width
    quick_gelu: bool = False
    vision_cfg: ClipVision
    text_cfg: ClipText


_Number = Annotated[float, Field(strict=True)]
_Positive = Annotated[float, Field(strict=True, gt=0)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(allow_inf_nan=False))
class _Normalisation:
    """Mean and std per channel that a network was trained with, among open_clip's other settings of preprocessing."""

    mean: tuple[_Number, _Number, _Number] = CLIP_MEAN
    std: tuple[_Positive, _Positive, _Positive] = CLIP_STD


@dataclass(frozen=True, kw_only=True)
class _Described:
    """The content of an ``open_clip_config.json``."""

    model_cfg: ClipConfig
    preprocess_cfg: _Normalisation = field(default_factory=_Normalisation)


class ClipScorer(Scorer[open_clip.CLIP]):
    """Image and text embeddings of a CLIP model.

    Args:
        network: an open_clip model.
        preprocessing: ``"published_selector"`` (squash to the input size, bilinear, no antialias, no crop) or
            ``"published_aesthetic"`` (bicubic of the short side without antialias, centre crop, not clamped).
        mean, std: per channel, of the normalisation that the weights were trained with.
        tokenizer: CLIP's own by default.
        device, dtype, batch_size: see `Scorer`.
    """

    def __init__(
        self,
        network: open_clip.CLIP,
        *,
        preprocessing: str = "published_selector",
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        tokenizer: ClipTokenizer | None = None,
        **placement: Unpack[Placement],
    ) -> None:
        if preprocessing not in _PREPROCESSINGS:
            raise ValueError(f"unknown preprocessing {preprocessing!r}; write one of {', '.join(_PREPROCESSINGS)}")
        super().__init__(network, **placement)
        self.preprocessing = preprocessing
        self.mean, self.std = mean, std
        self.dim: int = network.visual.output_dim
        self.tokenizer = tokenizer or ClipTokenizer(network.context_length)

    @staticmethod
    def required_weights(
        model: str = "ViT-B-32-quickgelu", pretrained: str = "openai", source: str | None = None, **_: Any
    ) -> list[Weights]:
        """What :meth:`from_pretrained` loads."""
        owner, name, *file = _model_and_tag(model, pretrained)[1]["hf_hub"].strip("/").split("/")
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
        **placement: Unpack[Placement],
    ) -> Self:
        """Load published weights.

        Args:
            model: open_clip's name of the architecture.
            pretrained: open_clip's tag of the weights; it decides activation and normalisation.
            source: a local file or folder, or a hub id; by default the repository of the tag.
            preprocessing, placement: see the class.

        Raises:
            ValueError: also for a model whose activation is not the one that the weights were trained with: OpenAI's
                load into the plain ``ViT-...`` names and give wrong embeddings there.
        """
        config, tag = _model_and_tag(model, pretrained)
        path = locate(cls.required_weights(model, pretrained, source)[0])
        beside = path.parent / _CONFIG_FILE
        if beside.is_file():
            _check_activation(model, config, read_json_object(beside).get("model_cfg"), str(beside))
        mean, std = tag.get("mean") or CLIP_MEAN, tag.get("std") or CLIP_STD
        return cls(_load(config, path), preprocessing=preprocessing, mean=mean, std=std, **placement).marked(
            "published"
        )

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        preprocessing: str = "published_selector",
        **placement: Unpack[Placement],
    ) -> Self:
        """Load a model of any size from a folder in open_clip's own layout.

        It holds ``open_clip_config.json``, that is ``{"model_cfg": ..., "preprocess_cfg": ...}``, and the state dict in
        ``open_clip_model.safetensors``; for another vocabulary than CLIP's also ``bpe_vocabulary.txt.gz``, as
        open_clip's ``SimpleTokenizer`` reads it.
        """
        described, path = (
            locate(Weights(name=f"CLIP model in {folder}", source=str(folder), file=file))
            for file in (_CONFIG_FILE, _WEIGHTS_FILE)
        )
        found = read_sizes(_Described, read_json_object(described), described)
        network, pixels = _load(found.model_cfg, path), found.preprocess_cfg
        tokenizer = ClipTokenizer.from_folder(path.parent, network.context_length, network.vocab_size)
        return cls(
            network,
            preprocessing=preprocessing,
            mean=pixels.mean,
            std=pixels.std,
            tokenizer=tokenizer,
            **placement,
        )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        seed: int = 0,
        preprocessing: str = "published_selector",
        **placement: Unpack[Placement],
    ) -> Self:
        """An untrained model of open_clip's configuration (``embed_dim``, ``vision_cfg``, ``text_cfg`` ...)."""
        plain = json.loads(json.dumps(config, default=dict))  # from OmegaConf's containers too
        settings = build_settings(ClipConfig, plain)
        return cls(seeded(seed, lambda: _build(settings)), preprocessing=preprocessing, **placement).marked("untrained")

    def embed_images(self, frames: Tensor) -> Tensor:
        """Embeddings [N, D] of images [N, 3, H, W] in 0..1."""
        return self._in_batches(check_frames(frames), self._encode_images, self.dim)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [N, D] of texts; long texts are cut."""
        ids = self.tokenizer(check_texts(texts))
        return self._in_batches(ids, lambda batch: unit(self.network.encode_text(batch)), self.dim)

    def _encode_images(self, frames: Tensor) -> Tensor:
        pixels = _PREPROCESSINGS[self.preprocessing](frames, self.network.visual.image_size[0])
        return unit(self.network.encode_image(normalise(pixels, self.mean, self.std).to(self.dtype)))


def _build(config: ClipConfig) -> open_clip.CLIP:
    return open_clip.CLIP(**asdict(config))


def _load(config: ClipConfig, path: Path) -> open_clip.CLIP:
    tensors = read_checkpoint(path, inside="state_dict")
    if all(name.startswith("module.") for name in tensors):  # written by open_clip's training on several GPUs
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return loaded(lambda: _build(config), tensors, path)


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


def _check_activation(model: str, config: ClipConfig, trained: Any, source: str) -> None:
    """Raise if the activation of the architecture is not the one that the weights of ``source`` were trained with."""
    if not isinstance(trained, Mapping):
        raise FileError(f"{source} does not describe a model: model_cfg must be a JSON object")
    quick = bool(trained.get("quick_gelu", False))
    if config.quick_gelu != quick:
        plain = model.removesuffix("-quickgelu")
        used, computed = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
        raise ValueError(
            f"{source} were trained with {used}, but {model} computes {computed}: the embeddings would be wrong;"
            f" write {plain + '-quickgelu' if quick else plain}"
        )

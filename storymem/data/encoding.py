"""What the frozen networks compute of a clip and of a caption: embeddings, keyframes, latents, prompt embeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hydra.utils import instantiate
from torch import Tensor

from storymem.data.settings import CacheSettings, PrepareSettings
from storymem.io import check_finite
from storymem.memory import EmbedFrames, SelectionPolicy, embed_in_batches
from storymem.scorers import scorer_weights
from storymem.scorers.scorer import as_images
from storymem.wan.conditioning import blank_padded, encode_frames, encode_video, latent_mask
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.runtime import check_runtime
from storymem.wan.spec import ModelSpec
from storymem.weights import Weights, locate, sample_hash

_CAUSES = "its weights are damaged, or too large for their dtype: write model.dtype=float32 model.vae_dtype=float32"
_SCORER_CAUSES = "its weights are damaged, or too large for its dtype"


def load_embedder(settings: PrepareSettings) -> EmbedFrames:
    """CLIP on the device of ``runtime``, for uint8 frames."""
    scorer = instantiate(settings.scorer.clip).to(check_runtime(settings.runtime.placement))

    def embed(frames: np.ndarray) -> np.ndarray:
        rows = scorer.embed_images(as_images(frames)).numpy()
        check_finite(rows, "the embeddings by scorer.clip", _SCORER_CAUSES)
        return rows

    return embed


def scorer_identity(scorer: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a scorer's numbers: its configuration, except for where it runs, and its weights."""
    places = [locate(weights) for weights in scorer_weights(scorer)]
    if "folder" in scorer:
        places.append(Weights(name="scorer", source=str(scorer["folder"])).path)
    settings = {name: value for name, value in scorer.items() if name not in ("device", "dtype", "batch_size")}
    return {**settings, "weights": sample_hash(*places)}


@dataclass(frozen=True, kw_only=True)
class KeyframeChooser:
    """How candidate keyframes are chosen: as in generation, from one clip with an empty memory bank.

    Args:
        embed: frames -> CLIP embeddings.
        selector: the policy that a film uses.
        score: quality of a frame, uint8 [H, W, 3]; None: every frame is good.
        threshold: lowest quality that passes.
    """

    embed: EmbedFrames
    selector: SelectionPolicy
    score: Callable[[np.ndarray], float] | None = None
    threshold: float | None = None

    def choose(self, frames: np.ndarray) -> list[int]:
        """Frame indices. ``ValueError`` if no frame is good enough."""
        score = self.score
        selection = self.selector.select(
            embed_in_batches(frames, self.embed),
            bank=np.zeros((0, 0), np.float32),
            quality=None if score is None else (lambda index: score(frames[index])),
            quality_threshold=None if score is None else self.threshold,
        )
        if not selection.selected:
            best = max(selection.quality.values(), default=float("nan"))
            raise ValueError(
                f"quality: no frame reaches the threshold {self.threshold}, the best has {best:.2f}: no keyframes"
            )
        return list(selection.selected)


def load_chooser(settings: PrepareSettings) -> KeyframeChooser:
    """The selector and scorers of the settings, on the device of ``runtime``."""
    quality = instantiate(settings.scorer.quality).to(check_runtime(settings.runtime.placement))

    def score(frame: np.ndarray) -> float:
        scores = quality.score(as_images(frame[None]))
        check_finite(scores, "the score by scorer.quality", _SCORER_CAUSES)
        return float(scores[0])

    selector = instantiate(settings.memory["selector"])
    return KeyframeChooser(embed=load_embedder(settings), selector=selector, score=score, threshold=quality.threshold)


def encode_text(pipe: WanMemoryToVideoPipeline, text: str, length: int) -> tuple[dict[str, Tensor], int]:
    """Prompt embeds of a text up to its last token, and how many tokens it has (those beyond ``length`` are cut).

    Raises:
        NotFiniteError: for NaN or infinity from the text encoder, naming the text.
    """
    embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=length)
    rows = embeds[0].cpu()
    check_finite(rows, f"the text encoder's output for the caption {text[:80]!r}", _CAUSES)
    used = max(rows.abs().sum(dim=1).nonzero().flatten().tolist(), default=0) + 1  # padding follows
    return {"embeds": rows[:used].clone()}, len(pipe.tokenizer(prompt_clean(text), verbose=False).input_ids)


def encode_clip(
    pipe: WanMemoryToVideoPipeline,
    keyframes: KeyframeChooser,
    frames: np.ndarray,
    mask: np.ndarray | None,
    settings: CacheSettings,
    spec: ModelSpec,
) -> dict[str, Tensor]:
    """Everything that a cache holds of a clip, see :mod:`storymem.data.cache`.

    Args:
        pipe: its VAE is used.
        keyframes: chooses the candidate keyframes.
        frames: uint8 [F, H, W, 3].
        mask: float32 [F, H, W] in 0..1, 1 where the subject is; None: the clip has none.
        settings: what is stored.
        spec: the base model.

    Raises:
        ValueError: if no frame is good enough for a keyframe.
        NotFiniteError: for NaN or infinity from a network.
    """
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0
    chosen = keyframes.choose(frames)
    latents = {
        "video": encode_video(pipe.vae, pixels[None])[0],
        "keyframes": encode_frames(pipe.vae, pixels[:, chosen].transpose(0, 1)),
    }
    for given in sorted(settings.given):
        latents[f"given_{given}"] = encode_video(pipe.vae, blank_padded(pixels[:, :given], *frames.shape[:3]))[0]
    if mask is not None:
        latents["mask"] = latent_mask(torch.from_numpy(mask), spec)
    return {name: stored(latent, f"the latents {name!r}", settings) for name, latent in latents.items()}


def stored(latents: Tensor, what: str, settings: CacheSettings) -> Tensor:
    """Latents on the CPU in the dtype of the cache. ``NotFiniteError`` if that has NaN or infinity."""
    check_finite(latents, f"{what} from the VAE", _CAUSES)
    stored = latents.cpu().to(getattr(torch, settings.dtype))
    check_finite(stored, f"{what} in {settings.dtype}", "write cache.dtype=float32, which can represent them")
    return stored

"""ViCLIP: agreement with open_clip at one frame, time, checkpoints and truncation."""

from __future__ import annotations

import logging
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from storymem.config import ConfigError
from storymem.io import FileError
from storymem.scorers import viclip as viclip_module
from storymem.scorers.checkpoint import loaded
from storymem.scorers.viclip import ViclipScorer, middle_frames
from storymem.scorers.viclip_network import VICLIP_B_16, VICLIP_L_14, Viclip, ViclipConfig
from storymem.weights import MissingWeights
from tests.scorers.tiny import VICLIP_CONFIG, images, viclip

SMALL = ViclipConfig(**VICLIP_CONFIG)


def from_open_clip(state: dict[str, Tensor], config: ViclipConfig) -> dict[str, Tensor]:
    """An open_clip CLIP's tensors under ViCLIP's names, with no embedding of time."""
    renamed: dict[str, Tensor] = {"temp": torch.tensor(0.01)}
    for name, value in state.items():
        if name != "logit_scale":
            tower = "vision" if name.startswith("visual.") else "text"
            renamed[f"{tower}_encoder.{name.removeprefix('visual.')}"] = value
    renamed["vision_encoder.conv1.weight"] = renamed["vision_encoder.conv1.weight"][:, :, None]
    time = torch.zeros(1, config.num_frames, config.width)
    return renamed | {"vision_encoder.temporal_positional_embedding": time}


@torch.no_grad()
def test_one_frame_agrees_with_open_clip() -> None:
    """With no embedding of time, one frame is a CLIP image; at the widths of B/16 with fewer layers."""
    config = ViclipConfig(**{**VICLIP_B_16.__dict__, "layers": 2, "text_layers": 2})
    settings = open_clip.get_model_config("ViT-B-16-quickgelu")
    settings["vision_cfg"]["layers"] = settings["text_cfg"]["layers"] = 2
    settings["text_cfg"]["context_length"] = 32
    theirs = open_clip.CLIP(**settings).eval()
    ours = loaded(lambda: Viclip(config), from_open_clip(theirs.state_dict(), config), "open_clip")
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.vision_encoder(pixels[:, None]), theirs.encode_image(pixels), atol=1e-5, rtol=1e-5)
    ids = open_clip.tokenize(["a cat runs in a field", "Night. 2 trains pass"], context_length=32)
    torch.testing.assert_close(ours.text_encoder(ids), theirs.encode_text(ids), atol=1e-5, rtol=1e-5)


def test_every_frame_and_their_order_count() -> None:
    """No token is dropped at random: two runs agree, and a change in any one frame is seen."""
    clips, scorer = images(1, 8, 3, 40, 56), viclip()
    whole = scorer.embed_clips(clips)
    assert torch.equal(whole, scorer.embed_clips(clips))
    for frame in range(8):
        changed = clips.clone()
        changed[:, frame] = 1 - changed[:, frame]
        assert (scorer.embed_clips(changed) - whole).abs().max() > 1e-4
    scorer.network.vision_encoder.temporal_positional_embedding.normal_(std=0.2)
    assert (scorer.embed_clips(clips) - scorer.embed_clips(clips.flip(1))).abs().max() > 1e-3


def test_clips_of_other_lengths() -> None:
    clips, scorer = images(1, 33, 3, 40, 56), viclip()
    chosen = clips[:, scorer.frame_indices(33)]
    assert chosen.shape[1] == 8
    assert torch.equal(scorer.embed_clips(clips), scorer.embed_clips(chosen))
    with pytest.raises(ValueError, match="clips of 8 frames or of 1; got 4"):
        scorer.network.vision_encoder(torch.zeros(1, 4, 3, 32, 32))
    with pytest.raises(ValueError, match=r"clips must be .*\[\d, 0, 3"):
        scorer.embed_clips(clips[:, :0])


@pytest.mark.parametrize(("config", "tensors", "millions"), [(VICLIP_L_14, 447, 427.59), (VICLIP_B_16, 303, 149.64)])
def test_true_sizes(config: ViclipConfig, tensors: int, millions: float) -> None:
    with torch.device("meta"):
        state = Viclip(config).state_dict()
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_frames_are_the_middles_of_equal_intervals() -> None:
    assert middle_frames(81, 8) == [4, 14, 24, 34, 44, 54, 64, 75]
    assert middle_frames(5, 8) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert middle_frames(1, 8) == [0] * 8
    for length in range(8, 200):
        indices = middle_frames(length, 8)
        assert indices == sorted(set(indices))
        assert indices[0] >= 0
        assert indices[-1] < length


# --- checkpoints


@pytest.fixture
def _small_is_l_14(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small network in place of L/14, so that `from_pretrained` runs whole."""
    monkeypatch.setitem(viclip_module._SIZES, "L-14", SMALL)


@pytest.mark.usefixtures("_small_is_l_14")
@pytest.mark.parametrize("layout", ["pth", "safetensors"])
def test_both_public_layouts_load(tmp_path: Path, layout: str) -> None:
    scorer, clips = viclip(seed=5), images(2, 8, 3, 40, 56)
    state = {name: value.clone() for name, value in scorer.network.state_dict().items()}
    if layout == "pth":
        path = tmp_path / "ViClip-InternVid-10M-FLT.pth"
        torch.save({"model": state, "epoch": 3}, path)
    else:
        path = tmp_path
        save_file(state, tmp_path / "model.safetensors")
    loaded = ViclipScorer.from_pretrained("L-14", str(path))
    assert torch.equal(loaded.embed_clips(clips), scorer.embed_clips(clips))
    assert torch.equal(loaded.embed_texts(["a cat"]), scorer.embed_texts(["a cat"]))


@pytest.mark.usefixtures("_small_is_l_14")
def test_loading_is_strict(tmp_path: Path) -> None:
    state = dict(viclip().network.state_dict()) | {"text_encoder.extra": torch.zeros(1)}
    del state["temp"]
    torch.save({"model": state}, tmp_path / "file.pth")
    with pytest.raises(FileError, match=r"(?s)missing \(1\):\s+temp\s+unexpected \(1\):\s+text_encoder.extra"):
        ViclipScorer.from_pretrained("L-14", str(tmp_path / "file.pth"))


@pytest.mark.parametrize(("size", "gigabytes"), [("L-14", "1.71 GB"), ("B-16", "0.6 GB")])
def test_missing_weights_say_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: str, gigabytes: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights) as caught:
        ViclipScorer.from_pretrained(size)
    for part in ("model.safetensors", gigabytes, "CC-BY-NC-SA", f"hf download OpenGVLab/ViCLIP-{size}-hf"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="unknown size 'H-14'; write one of L-14, B-16"):
        ViclipScorer.from_pretrained("H-14")


def test_save_and_load_give_the_same_embeddings(tmp_path: Path) -> None:
    scorer, clips = viclip(seed=6), images(2, 8, 3, 40, 56)
    scorer.save(tmp_path / "network")
    loaded = ViclipScorer.from_folder(tmp_path / "network")
    assert loaded.config == scorer.config
    assert torch.equal(loaded.embed_clips(clips), scorer.embed_clips(clips))


def test_unknown_setting_names_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        ViclipScorer.from_config(VICLIP_CONFIG | {"widht": 8})


# --- texts


def test_texts_that_are_cut_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    scorer = viclip()
    long = "a cat on a red sofa " * 10
    with caplog.at_level(logging.WARNING):
        embeddings = scorer.embed_texts(["a cat", long, long + "and a dog"])
        scorer.embed_texts(["a dog"])
    assert caplog.messages == ["2 of 3 texts are longer than 32 tokens and were cut"]
    assert torch.equal(embeddings[1], embeddings[2])  # what lies beyond the cut changes nothing
    assert not torch.equal(embeddings[0], embeddings[1])
    fits = " ".join(["cat"] * 30)
    assert scorer.tokenizer.token_counts([fits, fits + " cat"]) == [32, 33]

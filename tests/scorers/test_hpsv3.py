"""HPSv3: the prompt, the pictures, batches bounded in pixels, the checkpoint's layout and 4 bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from storymem.io import FileError
from storymem.scorers import hpsv3 as hpsv3_module
from storymem.scorers.checkpoint import CheckpointError, read_checkpoint
from storymem.scorers.hpsv3 import Hpsv3Scorer
from storymem.scorers.hpsv3_inputs import (
    IMAGE_TOKEN,
    PIXELS,
    REWARD_TOKEN,
    assemble_prompt,
    reduce_as_selector,
    resized_size,
    selector_size,
)
from storymem.scorers.hpsv3_network import Hpsv3Config, Hpsv3Network, load_network
from storymem.weights import MissingWeights
from tests.scorers.tiny import HPSV3_CONFIG, byte_tokenizer, hpsv3, pictures

# --- prompt


def test_prompt_stands_in_the_template_with_one_reward_token() -> None:
    text = assemble_prompt("a cat on a sofa", visual_tokens=3)
    assert "Textual prompt - a cat on a sofa\n" in text
    assert text.count(REWARD_TOKEN) == 1
    assert text.count(IMAGE_TOKEN) == 3
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "prompt",
    ["<|Reward|>a cat", "a <|Rew<|Reward|>ard|>cat", "a cat<|image_pad|>", "a <|video_<|Reward|>pad|>cat"],
)
def test_reserved_tokens_in_a_prompt_are_removed(prompt: str) -> None:
    assert assemble_prompt(prompt) == assemble_prompt("a cat")
    frames, scorer = pictures(1, 3, 40, 56), hpsv3()
    assert torch.equal(scorer.score(frames, [prompt]), scorer.score(frames, ["a cat"]))


def test_braces_in_a_prompt_are_plain_text() -> None:
    assert "Textual prompt - a {text_prompt} {cat}\n" in assemble_prompt("a {text_prompt} {cat}")


def test_prompt_moves_the_score_and_padding_does_not() -> None:
    frames, scorer = pictures(2, 3, 40, 56), hpsv3()
    short, long = "a cat", "a dog that runs along a beach at sunset, wide shot, film grain"
    together = scorer.score(frames, [short, long])
    alone = torch.cat([scorer.score(frames[:1], [short]), scorer.score(frames[1:], [long])])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=0)
    assert (scorer.score(frames, [long, short]) - together).abs().min() > 1e-6


# --- pictures


def test_resizing_agrees_with_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width in torch.randint(20, 2500, (300, 2), generator=generator).tolist():
        if max(height, width) <= 200 * min(height, width):
            theirs = smart_resize(height, width, 28, PIXELS, PIXELS)
            assert resized_size(height, width) == theirs, f"{height}x{width}"


def test_extreme_aspect_ratios_are_refused() -> None:
    assert resized_size(10, 2000)[0] % 28 == 0
    with pytest.raises(ValueError, match="aspect ratio of 200; got 10x2001"):
        resized_size(10, 2001)


def test_selector_reduces_large_frames_only() -> None:
    assert selector_size(480, 832) == (336, 588)
    assert selector_size(336, 588) == (336, 588)
    assert selector_size(240, 416) == (252, 420)
    assert resized_size(*selector_size(480, 832)) == (364, 616)
    frames = (pictures(1, 3, 480, 832) * 255).to(torch.uint8)
    theirs = tv.resize(frames, [336, 588], InterpolationMode.BILINEAR, antialias=True)
    ours = reduce_as_selector(frames)
    assert ours.dtype == torch.uint8
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_the_two_preprocessings_differ() -> None:
    frames = torch.rand(1, 3, 480, 832, generator=torch.Generator().manual_seed(0))
    selector = hpsv3(preprocessing="published_selector").score(frames)
    assert (selector - hpsv3(preprocessing="published_hpsv3").score(frames)).abs() > 1e-6
    with pytest.raises(ValueError, match="unknown preprocessing 'none'; write one of published_selector"):
        hpsv3(preprocessing="none")


def test_batches_are_bounded_in_pixels() -> None:
    frames = pictures(5, 3, 112, 112)
    seen: list[int] = []
    whole = hpsv3().score(frames)
    for bound, rows in ((2 * 112 * 112, [2, 2, 1]), (1, [1] * 5), (100 * 112 * 112, [5])):
        scorer = hpsv3(max_batch_pixels=bound)
        scorer.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        torch.testing.assert_close(scorer.score(frames), whole, atol=2e-6, rtol=0)
        assert seen == rows
        seen.clear()


# --- network


def test_defaults_are_the_published_checkpoint() -> None:
    """736 tensors and 16,584,387,300 bytes in bfloat16, to within the file's header."""
    with torch.device("meta"):
        state = Hpsv3Network(Hpsv3Config()).state_dict()
    lm_head = state["model.language_model.embed_tokens.weight"].numel()
    assert len(state) + 1 == 736
    assert state["model.language_model.embed_tokens.weight"].shape[0] == 151658
    size = 2 * (sum(value.numel() for value in state.values()) + lm_head)
    assert 0 < 16_584_387_300 - size < 200_000


def test_bf16_backbone_keeps_a_float32_head_and_exact_rotary_frequencies() -> None:
    scorer, exact = hpsv3(dtype="bfloat16"), hpsv3()
    assert {parameter.dtype for parameter in scorer.network.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in scorer.network.rm_head.parameters()} == {torch.float32}
    theirs = dict(exact.network.named_buffers())
    for name, buffer in scorer.network.named_buffers():
        assert torch.equal(buffer, theirs[name]), name


def test_inputs_with_another_number_of_reward_tokens_are_refused() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="reward token exactly once"):
        hpsv3().network(ids, torch.ones_like(ids), torch.zeros(0, 1176), torch.zeros(0, 3, dtype=torch.int64))


def published(scorer: Hpsv3Scorer) -> dict[str, torch.Tensor]:
    """A scorer's weights as the public file keeps them."""
    tensors = {}
    for name, value in scorer.network.state_dict().items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        tensors[name] = value.clone()
    return tensors | {"lm_head.weight": torch.zeros(HPSV3_CONFIG.vocab_size, HPSV3_CONFIG.hidden)}


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small checkpoint and its tokenizer; the small network stands in for the real one."""
    monkeypatch.setattr(hpsv3_module, "PUBLISHED", HPSV3_CONFIG)
    save_file(published(hpsv3(seed=7)), tmp_path / "HPSv3.safetensors")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def load(folder: Path, **arguments: object) -> Hpsv3Scorer:
    return Hpsv3Scorer.from_pretrained(str(folder), str(folder / "tokenizer"), **({"dtype": "float32"} | arguments))


def test_public_layout_loads(local: Path) -> None:
    frames = pictures(2, 3, 40, 56)
    assert torch.equal(load(local).score(frames), hpsv3(seed=7).score(frames))


def test_loads_in_bf16_with_the_head_in_float32(local: Path) -> None:
    frames = pictures(2, 3, 40, 56)
    scorer = load(local, dtype="bfloat16")
    assert scorer.network.rm_head[0].weight.dtype == torch.float32
    assert torch.equal(scorer.score(frames), hpsv3(seed=7, dtype="bfloat16").score(frames))


def test_loading_is_strict_and_lists_everything(local: Path) -> None:
    tensors = read_checkpoint(local / "HPSv3.safetensors")
    del tensors["visual.merger.ln_q.bias"]
    tensors["rm_head.5.bias"] = torch.zeros(3)
    save_file(tensors | {"model.extra": torch.zeros(1)}, local / "HPSv3.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_network(local / "HPSv3.safetensors", HPSV3_CONFIG, torch.float32)
    assert "missing: model.visual.merger.ln_q.bias" in str(caught.value)
    assert "unexpected: model.language_model.extra" in str(caught.value)
    assert "misshapen: rm_head.5.bias is [3], should be [2]" in str(caught.value)


def test_missing_weights_say_how_to_get_them(local: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingWeights) as caught:
        Hpsv3Scorer.from_pretrained()
    for part in (
        "HPSv3.safetensors",
        "16.6 GB",
        "model card",
        "hf download MizzenAI/HPSv3 HPSv3.safetensors",
    ):
        assert part in str(caught.value)
    with pytest.raises(MissingWeights, match=r"hf download Qwen/Qwen2-VL-7B-Instruct tokenizer\.json"):
        Hpsv3Scorer.from_pretrained(str(local))


def test_another_tokenizer_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|mine|>"], special_tokens=True)
    with pytest.raises(ValueError, match=r"gives <\|Reward\|> the id 271, the network expects 270"):
        Hpsv3Scorer.from_config(HPSV3_CONFIG, tokenizer)


def test_only_the_tokenizers_own_file_is_read(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code beside it is neither run nor asked about, and nobody is called."""
    settings = local / "tokenizer" / "tokenizer_config.json"
    named = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | named))
    (local / "tokenizer" / "mine.py").write_text(f"open({str(local / 'ran')!r}, 'w')\nclass Mine: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("called somebody"))
    scorer = load(local)
    assert not (local / "ran").exists()
    ids = scorer.tokenizer(assemble_prompt("a cat", 2))["input_ids"]
    assert ids == hpsv3().tokenizer(assemble_prompt("a cat", 2))["input_ids"]
    assert (ids.count(HPSV3_CONFIG.reward_token), ids.count(HPSV3_CONFIG.image_token)) == (1, 2)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "BPE"}}', "{" * 5000, "\udcff"])
def test_a_damaged_tokenizer_is_named(local: Path, content: str) -> None:
    (local / "tokenizer" / "tokenizer.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(FileError, match=r"tokenizer\.json"):
        load(local)


# --- 4 bits


def test_four_bits_without_bitsandbytes_say_what_to_install(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'storymem\[four-bit\]'"):
        load(local, four_bit=True)


def test_four_bits_score_close_to_full_precision(local: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    scorer = load(local, four_bit=True, device="auto")
    linears = [module for module in scorer.network.model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(isinstance(module, bitsandbytes.nn.Linear4bit) for module in linears)
    assert {parameter.dtype for parameter in scorer.network.rm_head.parameters()} == {torch.float32}
    frames = pictures(2, 3, 40, 56)
    assert (scorer.score(frames) - hpsv3(seed=7).score(frames)).abs().max() < 0.1
    scorer.to("cpu")
    assert scorer.device.type == "cpu"

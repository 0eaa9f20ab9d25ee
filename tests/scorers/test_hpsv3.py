"""HPSv3: the prompt, the pixels, batches bounded in pixels, the checkpoint's layout and 4 bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from storymem.io import FileError
from storymem.scorers import hpsv3 as hpsv3_module
from storymem.scorers.checkpoint import read_checkpoint
from storymem.scorers.hpsv3 import IMAGE_TOKEN, REWARD_TOKEN, Hpsv3Scorer, assemble_prompt, resized_size, selector_size
from storymem.scorers.hpsv3_network import PUBLISHED, Hpsv3Network
from storymem.weights import MissingWeights
from tests.scorers.tiny import HPSV3_CONFIG, TinyHpsv3, byte_tokenizer, hpsv3, images


def test_prompt_stands_in_the_template_with_one_reward_token() -> None:
    text = assemble_prompt("a {text_prompt} {cat}", visual_tokens=3)
    assert "Textual prompt - a {text_prompt} {cat}\n" in text
    assert text.count(REWARD_TOKEN) == 1
    assert text.count(IMAGE_TOKEN) == 3
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_sizes_follow_the_published_rules() -> None:
    assert selector_size(480, 832) == (336, 588)
    assert selector_size(336, 588) == (336, 588)
    assert selector_size(240, 416) == (252, 420), "small frames are not enlarged"
    assert resized_size(*selector_size(480, 832)) == (364, 616)
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        hpsv3().score(torch.zeros(1, 3, 10, 2001))


def test_the_two_preprocessings_differ() -> None:
    frames = torch.rand(1, 3, 240, 416, generator=torch.Generator().manual_seed(0))
    selector = hpsv3(preprocessing="published_selector").score(frames)
    assert (selector - hpsv3(preprocessing="published_hpsv3").score(frames)).abs() > 1e-6
    with pytest.raises(ValueError, match="unknown preprocessing 'none'; write one of published_selector"):
        hpsv3(preprocessing="none")


def test_batches_are_bounded_in_pixels() -> None:
    frames = images(5, 3, 112, 112)
    seen: list[int] = []
    whole = hpsv3().score(frames)
    for bound, rows in ((2 * 112 * 112, [2, 2, 1]), (1, [1] * 5), (100 * 112 * 112, [5])):
        scorer = hpsv3(max_batch_pixels=bound)
        scorer.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        torch.testing.assert_close(scorer.score(frames), whole, atol=2e-6, rtol=0)
        assert seen == rows
        seen.clear()


def test_the_configuration_is_that_of_the_published_checkpoint() -> None:
    """736 tensors and 16,584,387,300 bytes in bfloat16, to within the file's header."""
    with torch.device("meta"):
        state = Hpsv3Network(PUBLISHED).state_dict()
    lm_head = state["model.language_model.embed_tokens.weight"].numel()
    assert len(state) + 1 == 736
    size = 2 * (sum(value.numel() for value in state.values()) + lm_head)
    assert 0 < 16_584_387_300 - size < 200_000


def test_inputs_with_another_number_of_reward_tokens_are_refused() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="reward token exactly once"):
        hpsv3().network(ids, torch.ones_like(ids), torch.zeros(0, 1176), torch.zeros(0, 3, dtype=torch.int64))


# --- checkpoints


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small checkpoint in the public layout and its tokenizer, in place of the published ones."""
    monkeypatch.setattr(hpsv3_module, "PUBLISHED", HPSV3_CONFIG)
    tensors = {"lm_head.weight": torch.zeros(HPSV3_CONFIG.text_config.vocab_size, 64)}
    for name, value in hpsv3(seed=7).network.state_dict().items():
        tensors[name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")] = value.clone()
    save_file(tensors, tmp_path / "HPSv3.safetensors")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def load(folder: Path, **arguments: object) -> Hpsv3Scorer:
    return TinyHpsv3.from_pretrained(str(folder), str(folder / "tokenizer"), **({"dtype": "float32"} | arguments))


def test_public_layout_loads(local: Path) -> None:
    frames = images(2, 3, 40, 56)
    assert torch.equal(load(local).score(frames), hpsv3(seed=7).score(frames))


def test_bf16_keeps_a_float32_head_and_exact_rotary_frequencies(local: Path) -> None:
    scorer, exact = load(local, dtype="bfloat16"), hpsv3()
    assert {parameter.dtype for parameter in scorer.network.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in scorer.network.rm_head.parameters()} == {torch.float32}
    expected = dict(exact.network.named_buffers())
    for name, buffer in scorer.network.named_buffers():
        assert torch.equal(buffer, expected[name]), name


def test_loading_is_strict_and_lists_everything(local: Path) -> None:
    tensors = read_checkpoint(local / "HPSv3.safetensors")
    del tensors["visual.merger.ln_q.bias"]
    tensors["rm_head.5.bias"] = torch.zeros(3)
    save_file(tensors | {"model.extra": torch.zeros(1)}, local / "HPSv3.safetensors")
    with pytest.raises(FileError) as caught:
        load(local)
    for name in ("model.visual.merger.ln_q.bias", "model.language_model.extra", "rm_head.5.bias is [3], not [2]"):
        assert name in str(caught.value)


def test_missing_weights_say_how_to_get_them(local: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingWeights) as caught:
        Hpsv3Scorer.from_pretrained()
    for part in ("16.6 GB", "model card", "hf download MizzenAI/HPSv3 HPSv3.safetensors"):
        assert part in str(caught.value)
    with pytest.raises(MissingWeights, match=r"hf download Qwen/Qwen2-VL-7B-Instruct tokenizer\.json"):
        Hpsv3Scorer.from_pretrained(str(local))


# --- tokenizers


def test_another_tokenizer_is_refused(local: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|mine|>"], special_tokens=True)
    tokenizer.save_pretrained(local / "tokenizer")
    with pytest.raises(ValueError, match=r"gives <\|Reward\|> the id 271, the network expects 270"):
        load(local)


def test_only_the_tokenizers_own_file_is_read(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code beside it is neither run nor offered to be run, and no network is used."""
    settings = local / "tokenizer" / "tokenizer_config.json"
    named = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | named))
    (local / "tokenizer" / "mine.py").write_text(f"open({str(local / 'ran')!r}, 'w')\nclass Mine: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("used the network"))
    scorer = load(local)
    assert not (local / "ran").exists()
    ids = scorer.tokenizer(assemble_prompt("a cat", 2))["input_ids"]
    assert ids == hpsv3().tokenizer(assemble_prompt("a cat", 2))["input_ids"]
    assert (ids.count(scorer.network.reward_token), ids.count(HPSV3_CONFIG.image_token_id)) == (1, 2)


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
    frames = images(2, 3, 40, 56)
    assert (scorer.score(frames) - hpsv3(seed=7).score(frames)).abs().max() < 0.1
    assert scorer.to("cpu").device.type == "cpu"

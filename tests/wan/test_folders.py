"""Model folders are compared with their classes by header: what is absent, damaged or foreign is named before work."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from storymem.config import build_settings
from storymem.film.generate import generate_films as generate
from storymem.io import NotFiniteError
from storymem.wan.loading import load_pipeline
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import ModelSettings
from storymem.wan.sources import check_weights, inspect_weights
from storymem.weights import MissingWeights
from tests.composing import composed
from tests.wan.tiny import CPU, settings, text_to_video

STORY = "title: One\noverview: A walk.\nscenes:\n  - shots:\n      - {prompt: Pim walks in the meadow.}\n"


@pytest.fixture(scope="module")
def saved(pipe: WanMemoryToVideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a diffusers folder, with a tokenizer that has a vocabulary file."""
    folder = tmp_path_factory.mktemp("saved") / "i2v"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    """A copy of ``saved`` to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "base"))


def check(folder: Path, **changes: Any) -> None:
    weights = {"name": "base", "source": str(folder)}
    check_weights(settings(weights=weights, has_text_to_video=False, **changes), text_to_video=False)


def set_json(path: str, **values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(content | values))

    return damage


def rename(path: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / path).read_text())
        content[new] = content.pop(old)
        (folder / path).write_text(json.dumps(content))

    return damage


def text(path: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)  # type: ignore[return-value]


def tensors(path: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / path)
        change(state)
        save_file(state, folder / path, metadata={"format": "pt"})

    return damage


def remove(path: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return damage


def cut(path: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / path, size)


def pickled(path: str, name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        torch.save(load_file(folder / path), (folder / path).with_name(name))
        (folder / path).unlink()

    return damage


def fifo(path: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / path).unlink()
        os.mkfifo(folder / path)

    return damage


T, T2 = (f"transformer{n}/diffusion_pytorch_model.safetensors" for n in ("", "_2"))
VAE, TEXT = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
Q = "encoder.block.0.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("tokenizer"), r"lacks tokenizer/\*: the download is incomplete"),
        (set_json("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}), r"would run code"),
        (text("tokenizer/tokenizer_config.json", "[]"), r"tokenizer_config\.json holds list"),
        (
            tensors(TEXT, lambda state: state.pop(Q)),
            rf"{TEXT} does not contain the weights of this model's text encoder.*missing.*{Q}",
        ),
        (
            tensors(VAE, lambda state: state.pop("encoder.conv_in.bias")),
            r"weights of this model's VAE.*encoder\.conv_in\.bias",
        ),
        (tensors(T2, lambda state: state.pop("proj_out.bias")), r"transformer_2/.*experts .*missing.*proj_out\.bias"),
        (tensors(T, lambda state: state.update(foreign=torch.ones(1))), r"transformer/.*experts .*unexpected.*foreign"),
        (tensors(T, lambda s: s.update({"proj_out.bias": torch.ones(3)})), r"misshapen.*proj_out\.bias is \[3\], not"),
        (tensors(T, lambda s: s.update({"proj_out.bias": torch.ones(64).byte()})), r"proj_out\.bias is U8"),
        (cut(T, 10_000), r"transformer/.* is not a readable safetensors file .*10,000 bytes may be a broken download"),
        (cut(VAE, 0), r"vae/.* is not a readable safetensors file"),
        (text(T, (10**15).to_bytes(8, "little") + b"{}"), r"header too large"),
        (text(T, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), r"Git LFS pointer"),
        (fifo(T), r"transformer/.* is not a regular file"),
        (fifo("vae/config.json"), r"vae/config\.json is not a regular file"),
        (remove("transformer_2"), r"lacks transformer_2/\*"),
        (remove("transformer/config.json"), r"transformer/config\.json: there is no such file"),
        (pickled(T, "diffusion_pytorch_model.bin"), r"diffusion_pytorch_model\.bin is a pickle.*fetch the safetensors"),
        (pickled(TEXT, "pytorch_model.bin"), r"pytorch_model\.bin is a pickle.*fetch the safetensors"),
        (set_json("transformer/config.json", num_layers="one"), r"num_layers='one': input should be a valid integer"),
        (set_json("transformer/config.json", eps="1e-6"), r"eps='1e-6': input should be a valid number"),
        (set_json("transformer/config.json", num_layers=10**9), r"num_layers is a number of 30 bits"),
        (
            set_json("transformer/config.json", num_layers=10**6),
            r"num_layers is of 1000000 layers, .* \d+ tensors",
        ),
        (set_json("transformer/config.json", num_attention_heads=10**6), r"misshapen"),
        (set_json("transformer/config.json", attention_head_dim=-1), r"does not describe a network"),
        (set_json("transformer/config.json", _class_name="Other"), r"is of Other, and transformer must be Wan"),
        (text("transformer/config.json", "[" * 10_000), r"nested too deeply"),
        (text("transformer/config.json", '{"eps": NaN}'), r"NaN is not a number"),
        (set_json("text_encoder/config.json", d_model="wide"), r"text_encoder/config\.json does not describe.*d_model"),
        (set_json("text_encoder/config.json", model_type="t5"), r"model_type is 't5'"),
        (set_json("text_encoder/config.json", quantization_config={"bits": 4}), r"quantised weights"),
        (set_json("vae/config.json", latents_std=[0.0] * 16), r"latents_std must be z_dim numbers, the latter above 0"),
        (set_json("vae/config.json", dim_mult=[1] * 10_000), r"dim_mult is of 10000 layers"),
        (
            set_json("model_index.json", transformer=["evil", "Evil"]),
            r"transformer is evil\.Evil, which no Wan2\.2 model has",
        ),
        (set_json("model_index.json", checker=["os", "system"]), r"checker is os\.system"),
        (set_json("model_index.json", scheduler=["os", "system"]), r"scheduler is os\.system"),
        (
            set_json("model_index.json", tokenizer=["transformers", "AutoModel"]),
            r"tokenizer is transformers\.AutoModel",
        ),
        (set_json("model_index.json", vae=[None, None]), r"vae is None\.None"),
        (set_json("model_index.json", _class_name="FluxPipeline"), r"FluxPipeline, which is not a Wan pipeline"),
        (set_json("transformer/config.json", num_layer=1), r"unknown key 'num_layer'; did you mean 'num_layers'"),
        (rename("vae/config.json", "latents_mean", "latents_mena"), r"unknown key 'latents_mena'"),
        (rename("text_encoder/config.json", "d_kv", "dkv"), r"text_encoder/.*misshapen|unknown key"),
        (
            rename("text_encoder/config.json", "relative_attention_max_distance", "relative_attention_max_distanc"),
            r"unknown key 'relative_attention_max_distanc'; did you mean 'relative_attention_max_distance'",
        ),
        (text("model_index.json", "{"), r"model_index\.json is not valid JSON"),
        (text(f"{T}.index.json", '{"weight_map": {"a": "../b.safetensors"}}'), r"names '\.\./b\.safetensors'"),
        (text(f"{T}.index.json", '{"weight_map": [1]}'), r"is not an index of weights"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_loaded(
    base: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(base)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        check(base)
    assert time.monotonic() - start < 5, "by header alone"


def test_a_whole_folder_passes_with_its_weights_in_parts_too(base: Path) -> None:
    check(base)
    state = load_file(base / T)
    names = list(state)
    for number in range(2):
        part = {name: state[name] for name in names[number::2]}
        save_file(part, base / f"transformer/part-{number}.safetensors")
    (base / T).unlink()
    index = {"weight_map": {name: f"part-{names.index(name) % 2}.safetensors" for name in names}}
    (base / f"{T}.index.json").write_text(json.dumps(index))
    check(base)
    index["weight_map"]["proj_out.bias"] = "part-0.safetensors"
    index["weight_map"]["proj_out.weight"] = "part-0.safetensors"
    (base / f"{T}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"part-[01]\.safetensors (lacks|holds) proj_out.*different downloads"):
        check(base)


def test_a_tokenizer_without_its_vocabulary(base: Path) -> None:
    """transformers makes one to which every word is unknown, without a warning."""
    (base / "tokenizer/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    set_json("model_index.json", tokenizer=["transformers", "T5Tokenizer"])(base)
    with pytest.raises(ValueError, match=r"tokenizer contains no (vocabulary|readable)"):
        check(base)


def test_a_tokenizer_as_transformers_5_writes_it(base: Path) -> None:
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuv"])}
    shutil.rmtree(base / "tokenizer")
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(base / "tokenizer")
    assert json.loads((base / "tokenizer/tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    check(base)


def test_components_of_different_models(base: Path, tmp_path: Path) -> None:
    network = {"text_dim": 24, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96}
    model = settings()
    network = {**model.network.transformer, **network}
    other = settings(
        network={"transformer": network, "vae": model.network.vae, "text_encoder": model.network.text_encoder}
    )
    load_pipeline(other, runtime=CPU, text_encoder=False).transformer.save_pretrained(base / "transformer")
    with pytest.raises(ValueError, match=r"embeddings of text_encoder have 32 numbers, and the transformers take 24"):
        check(base)


def test_another_layout_is_refused_with_the_right_repository(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").touch()
    advice = r"hf download Wan-AI/Wan2\.2-I2V-A14B-Diffusers, and model\.weights\.source=Wan-AI/Wan2\.2-I2V-A14B-Diff"
    for model, message in (
        ("wan2.2-a14b", f"not in Wan's original layout; {advice}"),
        ("toy", r"is not a model folder.*; leave model\.weights\.source out, to use the weights of toy$"),
    ):
        chosen = composed("story=x", f"model={model}", f"model.weights.source={tmp_path}")["model"]
        with pytest.raises((ValueError, MissingWeights), match=message):
            check_weights(build_settings(ModelSettings, chosen), text_to_video=False)
    save_file({"a": torch.ones(1)}, tmp_path / "wan.safetensors")
    advice = r"\. Files of experts are named by model\.gguf"
    with pytest.raises(ValueError, match=f"not in Wan's original layout{advice}"):
        check(tmp_path)
    with pytest.raises(ValueError, match=rf"wan\.safetensors is a single file{advice}"):
        check(tmp_path / "wan.safetensors")


def test_networks_of_the_other_task(pipe: WanMemoryToVideoPipeline, base: Path, tmp_path: Path) -> None:
    by_text = text_to_video(settings(), pipe.vae)
    by_text.save_pretrained(tmp_path / "t2v")
    for name in ("transformer", "transformer_2"):
        shutil.copytree(tmp_path / "t2v" / name, base / name, dirs_exist_ok=True)
    with pytest.raises(
        ValueError, match=r"takes 16 input channels \(as Wan2\.2-T2V-A14B\), and model\.weights needs 36"
    ):
        check(base)
    model = settings(
        weights={"name": "a", "source": "b"}, text_to_video={"name": "t2v", "source": str(tmp_path / "t2v")}
    )
    (source,) = [s for s in inspect_weights(model, text_to_video=True) if s.weights.name == "t2v"]
    assert not source.problem
    pipe.save_pretrained(tmp_path / "t2v")
    with pytest.raises(
        ValueError, match=r"takes 36 input channels .*model\.text_to_video needs 16.*T2V-A14B-Diffusers"
    ):
        text_to_video(model, pipe.vae)


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (T2, "proj_out.weight", float("nan")),
        (VAE, "encoder.conv_in.weight", float("inf")),
        (TEXT, Q, 1e20),
    ],
)
def test_nan_and_infinity_are_named_when_loaded(base: Path, path: str, name: str, value: float) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[name].view(-1)[1] = value

    tensors(path, change)(base)
    weights = {"name": "base", "source": str(base)}
    with pytest.raises(NotFiniteError, match=f"{path}: {name} holds"):
        load_pipeline(settings(weights=weights, has_text_to_video=False), runtime=CPU)


def test_all_problems_are_reported_at_once(base: Path, tmp_path: Path) -> None:
    (base / "model_index.json").unlink()
    weights, adapter = ({"name": name, "source": str(tmp_path / name)} for name in ("base", "adapter"))
    model = settings(weights=weights, adapter={"weights": adapter}, has_text_to_video=False)
    with pytest.raises(MissingWeights, match=r"(?s)contains no model_index\.json.*adapter does not exist"):
        check_weights(model, text_to_video=False)


# Through the command's function: nothing is touched, and the plan names the problem.


@pytest.fixture
def film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.yaml").write_text(STORY)
    return ["story=story.yaml", "output=film", "runtime=cpu"]


@pytest.mark.parametrize("what", ["model.weights.source", "model.adapter.weights.source"])
def test_a_film_is_refused_before_its_folder_is_made(film: list[str], tmp_path: Path, what: str) -> None:
    (tmp_path / "wrong").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "wrong" / "high_noise.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match="wrong"):
        generate(composed(*film, f"{what}=wrong"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["story.yaml", "wrong"]


def test_the_plan_lists_what_is_missing_and_what_does_not_fit(
    film: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "high_noise_model").mkdir()
    with pytest.raises(ValueError, match="not ready: 2 marked MISSING"):
        generate(composed(*film, "dry_run=true", "model.weights.source=.", "model.adapter.weights.source=./gone"))
    plan = capsys.readouterr().out
    assert "weights  toy models: .\n  UNFIT: . is not a model folder: it contains no model_index.json" in plan
    assert "weights  MISSING toy memory adapter: ./gone does not exist" in plan

"""Published weights are found where they are; what is missing is reported and never downloaded."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from storymem.io import FileError, NotFiniteError
from storymem.weights import MissingWeights, Weights, check_values, locate, read_header


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def write(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def download(cache: Path, *files: str, repo: str = "owner/model") -> Path:
    """Lay ``files`` into the cache as the hub's own client does; returns the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text("0123abcd")
    return write(root / "snapshots" / "0123abcd", *files)


def index(folder: Path, *shards: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {f"weight.{number}": shard for number, shard in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def published(file: str | None = None, source: str = "owner/model") -> Weights:
    return Weights(name="A model", source=source, file=file, size_gb=17, licence="Apache-2.0")


def message(weights: Weights) -> str:
    with pytest.raises(MissingWeights) as error:
        locate(weights)
    return str(error.value)


# On disk


def test_a_file_is_found(tmp_path: Path) -> None:
    file = write(tmp_path, "here.safetensors") / "here.safetensors"
    assert locate(published(source=str(file))) == file


def test_a_folder_is_found_with_and_without_a_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", "sub/a.safetensors")
    assert locate(published(source=str(folder))) == folder
    assert locate(published("sub/a.safetensors", source=str(folder))) == folder / "sub" / "a.safetensors"


def test_a_folder_copied_flat_is_understood(tmp_path: Path) -> None:
    folder = write(tmp_path / "flat", "a.safetensors")
    assert locate(published("sub/a.safetensors", source=str(folder))) == folder / "a.safetensors"


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "weights", "a.bin")
    assert locate(published(source="~/weights/a.bin")) == tmp_path / "weights" / "a.bin"


def test_a_folder_named_like_a_repository_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "owner" / "model", "a.bin")
    assert locate(published()).resolve() == (tmp_path / "owner" / "model").resolve()


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./absent", "~/absent", "absent", "a/b/c"])
def test_what_cannot_be_a_repository_is_a_path(source: str) -> None:
    text = message(published(source=source))
    assert f"A model: {source} does not exist." in text
    assert "Give the path of an existing file or folder" in text
    assert "hf download" not in text


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    text = message(published("model.safetensors", source=str(write(tmp_path / "folder", "other.bin"))))
    assert "holds no model.safetensors" in text


def test_a_pattern_gives_its_folder(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", "MI2V/a.bin", "MM2V/a.bin", "transformer/x.bin", "transformer_2/x.bin")
    assert locate(published("MM2V/*", source=str(whole))) == whole / "MM2V"
    assert locate(published("MM2V/*", source=str(whole / "MM2V"))) == whole / "MM2V", "only the part that is needed"
    assert locate(published("transformer*/*", source=str(whole))) == whole


def test_a_pattern_that_nothing_matches_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no MM2V/*" in message(published("MM2V/*", source=str(tmp_path / "empty")))


# In the hub's cache


def test_a_repository_in_the_cache_is_found(cache: Path) -> None:
    snapshot = download(cache, "model_index.json", "vae/a.safetensors")
    assert locate(published()) == snapshot
    assert locate(published("vae/a.safetensors")) == snapshot / "vae" / "a.safetensors"
    assert locate(published("vae/*")) == snapshot / "vae"


def test_a_missing_repository_is_reported_with_size_licence_and_command() -> None:
    lines = message(published()).splitlines()
    assert lines == [
        "A model: owner/model is not in the local Hugging Face cache.",
        "  size:     17 GB",
        "  licence:  Apache-2.0",
        "  download: hf download owner/model",
        "  or give the path of a local copy.",
    ]


@pytest.mark.parametrize(
    ("file", "command"),
    [
        (None, "hf download owner/model"),
        ("a/model.safetensors", "hf download owner/model a/model.safetensors"),
        ("transformer*/*", 'hf download owner/model --include "transformer*/*"'),
    ],
)
def test_the_download_command_is_exact(cache: Path, file: str | None, command: str) -> None:
    text = message(published(file))
    assert f"  download: {command}\n" in text
    assert file is None or f"  file:     {file}\n" in text
    if file is not None:
        download(cache, "something/else.bin")
        assert f"holds no {file} in the local Hugging Face cache" in message(published(file))


def test_small_sizes_are_in_megabytes() -> None:
    assert "size:     4 MB" in message(Weights(name="a", source="owner/model", size_gb=0.004))
    assert "size:" not in message(Weights(name="a", source="owner/model"))


def test_what_is_on_no_hub_is_reported_with_its_address(tmp_path: Path) -> None:
    weights = Weights(name="a", source=str(tmp_path / "head.pth"), url="https://example.org/head.pth")
    expected = f'curl --create-dirs -L -o "{tmp_path / "head.pth"}" "https://example.org/head.pth"'
    assert f"download: {expected}" in message(weights)


# Interrupted downloads


@pytest.mark.parametrize("file", [None, "transformer*/*"])
def test_an_interrupted_download_is_noticed(cache: Path, tmp_path: Path, file: str | None) -> None:
    for folder, source in ((download(cache, "model_index.json"), "owner/model"), (tmp_path / "copy", None)):
        part = folder / "transformer"
        index(part, "one.safetensors", "two.safetensors", "three.safetensors")
        write(part, "one.safetensors")
        weights = published(file, source=source or str(folder))
        assert "is incomplete: transformer/ lacks three.safetensors, two.safetensors" in message(weights)
        write(part, "two.safetensors", "three.safetensors")
        assert locate(weights) == folder


def test_parts_that_are_not_asked_for_may_be_incomplete(cache: Path) -> None:
    snapshot = download(cache, "transformer/a.safetensors")
    index(snapshot / "text_encoder", "absent.safetensors")
    assert locate(published("transformer*/*")) == snapshot
    assert "text_encoder/ lacks absent.safetensors" in message(published())


def test_it_is_an_error_of_files() -> None:
    with pytest.raises(FileNotFoundError):
        locate(published())


def test_what_comes_with_the_package_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = Weights(name="toy models", source="package:toyworld/weights")
    assert weights.is_local
    assert (locate(weights) / "model_index.json").is_file()
    with pytest.raises(MissingWeights, match="package:toyworld/nothing does not exist"):
        locate(Weights(name="nothing", source="package:toyworld/nothing"))


# What is not weights at all


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(FileError, match=r"pipe\.safetensors is not a regular file"):
        locate(published(source=str(tmp_path / "pipe.safetensors")))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "source is empty"),
        ("owner/na me", "neither a path nor a Hugging Face repository id"),
        ("~nobody-of-this-name/weights", "does not exist"),
        ("a" * 5000, "does not exist"),
        ("./nul\0", "does not exist"),
    ],
)
def test_sources_that_are_no_paths(source: str, message: str) -> None:
    with pytest.raises((FileError, MissingWeights), match=message):
        locate(published(source=source))


def test_a_file_outside_its_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="file=/etc/passwd must be relative to source="):
        locate(published("/etc/passwd", source=str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds list"),
        ("{}", "is not an index of weights"),
        ('{"weight_map": {"a": 1}}', "is not an index of weights"),
        ('{"weight_map": {"a": "../../b"}}', "is not a file beside it"),
        ('{"weight_map": {"a": "\\u0000"}}', "is not a file beside it"),
        ("[" * 10_000, "nested too deeply"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FileError, match=rf"model\.safetensors\.index\.json .*{message}"):
        locate(published(source=str(tmp_path)))


# Headers


def test_a_header_is_read_without_its_weights(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4).bfloat16()}, tmp_path / "a.safetensors", metadata={"x": "y"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.shapes == {"a": (2, 3), "b": (4,)}
    assert header.dtypes == {"a": "F32", "b": "BF16"}
    assert header.metadata == {"x": "y"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes may be a broken download"),
        (b"\x08\x00", "2 bytes may be a broken download"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer.*git lfs pull"),
        (b"<!doctype html>", "a web page, of a broken download"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00", r"a GGUF file; .*use model\.gguf"),
        (b"PK\x03\x04aaaaaaaaaaaa", r"a pickle .*use the \.safetensors file"),
        ((1 << 50).to_bytes(8, "little") + b"{}", "header too large"),
        ((2).to_bytes(8, "little") + b"{}trailing", "18 bytes may be a broken download"),
        ((9).to_bytes(8, "little") + b'{"a": [1]', "17 bytes may be a broken download"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(FileError, match=rf"a\.safetensors is not a readable safetensors file.*{message}"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_values_that_are_no_weights(dtype: torch.dtype) -> None:
    fine = torch.linspace(-400, 400, 64).to(dtype)
    check_values([("fine", fine), ("empty", fine[:0]), ("counts", torch.tensor([1 << 40]))], "file")
    broken = fine.clone()
    broken[7] = float("nan")
    with pytest.raises(NotFiniteError, match=r"file: broken holds NaN or infinite values"):
        check_values([("fine", fine), ("broken", broken)], "file")


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_nan_is_found_beside_any_other_value_of_8_bits(dtype: torch.dtype) -> None:
    values = torch.linspace(-200, 200, 255).to(dtype)
    check_values([("w", values)], "file")
    with pytest.raises(NotFiniteError, match="w holds NaN or infinite values"):
        check_values([("w", torch.cat([values.float(), torch.tensor([float("nan")])]).to(dtype))], "file")


def test_values_too_large_to_be_weights() -> None:
    with pytest.raises(NotFiniteError, match=r"file: w holds values up to 1e\+10, which no trained network has"):
        check_values([("w", torch.tensor([0.0, -1e10]))], "file")

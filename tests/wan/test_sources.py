"""Which files a model needs; all that are missing are reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storymem.wan.settings import AdapterSettings, ModelSettings
from storymem.wan.sources import adapter_weights, check_weights, required_weights
from storymem.weights import MissingWeights, Weights
from tests.wan.tiny import settings

FOLDERS = {"none": "MI2V", "mi2v": "MI2V", "mm2v": "MM2V"}


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def published(**changes: Any) -> ModelSettings:
    hub: dict[str, Any] = {
        "weights": {"name": "i2v", "source": "owner/i2v", "size_gb": 69},
        "text_to_video": {"name": "t2v", "source": "owner/t2v", "size_gb": 57},
        "adapter": {"weights": {"name": "lora", "source": "owner/lora", "size_gb": 2.5}, "folders": FOLDERS},
    }
    return settings(**hub | changes)


def names(model: ModelSettings, *, text_to_video: bool) -> list[str]:
    return [w.name for w in required_weights(model, text_to_video=text_to_video, continuity="mm2v")]


def test_what_a_film_needs() -> None:
    assert names(settings(), text_to_video=True) == []
    assert names(published(), text_to_video=True) == ["i2v", "lora (MM2V)", "t2v"]
    assert names(published(), text_to_video=False) == ["i2v", "lora (MM2V)"]
    assert names(published(has_text_to_video=False), text_to_video=True) == ["i2v", "lora (MM2V)"]
    assert names(published(adapter=None), text_to_video=False) == ["i2v"]


def test_all_that_is_missing_is_reported_at_once() -> None:
    with pytest.raises(MissingWeights) as error:
        check_weights(published(), text_to_video=True, continuity="mm2v")
    text = str(error.value)
    for line in ("hf download owner/i2v", "hf download owner/t2v", 'hf download owner/lora --include "MM2V/*"'):
        assert line in text
    for size in ("69 GB", "57 GB", "2.5 GB"):
        assert size in text


def test_only_what_is_missing_is_reported(tmp_path: Path) -> None:
    (tmp_path / "i2v").mkdir()
    model = published(weights={"name": "i2v", "source": str(tmp_path / "i2v")})
    with pytest.raises(MissingWeights) as error:
        check_weights(model, text_to_video=True, continuity="mi2v")
    assert "i2v:" not in str(error.value)
    assert "owner/t2v" in str(error.value)


def adapter(source: str | Path, continuity: str, folders: dict[str, str] = FOLDERS) -> Weights:
    weights = Weights(name="lora", source=str(source))
    return adapter_weights(AdapterSettings(weights=weights, folders=folders), continuity)


def test_each_continuity_has_its_sub_folder_on_the_hub_and_on_disk(tmp_path: Path) -> None:
    for continuity, folder in FOLDERS.items():
        hub = adapter("owner/lora", continuity)
        assert (hub.source, hub.file) == ("owner/lora", f"{folder}/*")
        disk = adapter(tmp_path, continuity)
        assert (disk.source, disk.file) == (str(tmp_path / folder), None)
    assert adapter("owner/lora", "mi2v", {}) == Weights(name="lora", source="owner/lora")


def test_a_local_adapter_is_never_taken_for_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    for source in ("mine", "~/mine"):
        found = adapter(source, "mm2v")
        assert found.source == str(tmp_path / "mine" / "MM2V")
        assert found.is_local


@pytest.mark.parametrize("name", ["one.safetensors", "one.pth"])
def test_an_own_adapter_needs_no_sub_folders_and_may_be_one_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    for source in (tmp_path / name, tmp_path):
        assert adapter(source, "mm2v").source == str(source)
    (tmp_path / "MM2V").mkdir()
    assert adapter(tmp_path, "mm2v").source == str(tmp_path / "MM2V")
    assert adapter(tmp_path, "mi2v").source == str(tmp_path)

"""The rehearsal of true size, with small sizes: every form of weights is written, loaded and resumed by the command."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.rehearsal import _is_wrong, differs
from benchmarks.true_size import on_disk, write_scorers
from storymem.scorers.hpsv3 import IMAGE_TOKEN, Hpsv3Scorer
from storymem.scorers.hpsv3_network import PUBLISHED, Hpsv3Network
from storymem.weights import read_header

ROOT = Path(__file__).parents[1]


def test_it_fails_where_the_calculation_is_wrong() -> None:
    right = {"stages": {}, "differs": [], "resumed": True, "recalled": [0, 3]}
    assert not _is_wrong(right)
    assert not _is_wrong({"refused": "needs 40 GB of RAM"})
    for wrong in ({"differs": ["decode"]}, {"resumed": False}, {"recalled": [0, 0]}):
        assert _is_wrong(right | wrong)
    assert [differs({"peak_gb": peak, "calculated_gb": 10.0}) for peak in (8.9, 9.1, 10.9, 11.1)] == [1, 0, 0, 1]


def test_scorers_of_true_size_are_what_the_scorers_load(tmp_path: Path) -> None:
    overrides = dict(setting.split("=", 1) for setting in write_scorers(tmp_path, "hpsv3"))
    path = Path(overrides["scorer.quality.source"])
    assert path.stat().st_size == pytest.approx(Hpsv3Scorer.required_weights()[0].size_gb * 1e9, rel=0.01)
    assert on_disk(path.parent)[1] < 1e8, "holes take no disk"
    with torch.device("meta"):
        network = Hpsv3Network(PUBLISHED)
    assert sum(map(math.prod, read_header(path).shapes.values())) == sum(
        it.numel() for it in [*network.parameters(), network.model.get_input_embeddings().weight]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path.with_name("tokenizer.json")))
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == PUBLISHED.image_token_id
    assert len(tokenizer) == network.reward_token, "the next token that is added"


@pytest.mark.slow
@pytest.mark.parametrize(("model", "form"), [("wan2.2-a14b", "original"), ("wan2.2-ti2v-5b", "comfyui-fp8_scaled")])
def test_a_form_of_weights_makes_a_film(model: str, form: str, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    report.write_text("# Rehearsals\n\n## another\n\nIts result.\n\n" + f"## {model}, {form}, laion-v1\n\nOld.\n")
    arguments = [f"model={model}", f"form={form}", "scale=tiny", f"report={report}"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.rehearsal", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    text = report.read_text()
    assert text.startswith(f"# Rehearsals\n\n## another\n\nIts result.\n\n## {model}, {form}, laion-v1\n")
    assert "Old." not in text
    assert "Resumed: True. Keyframes recalled: [0, 3]." in text
    assert "RAM is not compared with the calculation" in text
    stages = set(re.findall(r"^\| (\w+) \| \d", text, re.MULTILINE))
    assert stages == {"texts", "load", "encode", "denoise", "decode", "select", "save", "resume"}

"""A projector trained before a quantized language model, where bitsandbytes is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.models.quantizable import blocks_of_64
from tests.train.commands import run

import vzip

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_the_projector_alone_moves_and_fits_the_unquantized_model(
    quantization: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    processor = tiny.processor()
    blocks_of_64(tiny.llava(vocab_size=len(processor.tokenizer))).save_pretrained(tmp_path / "model")
    more = [f"model.quantization={quantization}", "train.precision=bfloat16", "launcher.gradient_checkpointing=true"]
    assert run("train", [*words, *more], monkeypatch) == 0
    (final,) = tmp_path.glob("runs/train/*/*/visionzip-6+3/seed0/final")
    assert json.loads((final / "tuned.json").read_text())["step"] == 2
    base, tuned = (vzip.load_vlm(tmp_path / "model", projector=path) for path in (None, final))
    moved = {
        name
        for name, parameter in tuned.model.named_parameters()
        if not torch.equal(parameter, base.model.get_parameter(name))
    }
    assert moved and all("multi_modal_projector" in name for name in moved)
    log = [json.loads(line) for line in (final.parent / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < step["loss"] < 20 for step in log) and len(log) == 2

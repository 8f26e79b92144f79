"""The speed of an evaluation, measured on six images: every side answers every question, and answers what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import bench_eval

from vzip.errors import RunExistsError


def test_every_side_answers_the_same_questions(
    small_benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lmms_eval")
    monkeypatch.setattr(bench_eval.benchmark, "prepare", lambda: small_benchmark)
    out = tmp_path / "runs" / "speed.json"
    assert bench_eval.main(["--limit", "2", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["num_questions"] == 8 and record["batch_size"] == 8
    assert set(record["seconds"]) == {"vanilla", "transformers", "compressed_1", "compressed"}
    rates = {name: 8 / took for name, took in record["seconds"].items()}
    assert record["ratios"] == pytest.approx(
        {name: rates["compressed"] / rates[name] for name in ("vanilla", "transformers")}
    )
    assert record["equal_answers"] == {"compressed_to_compressed_1": 1.0, "vanilla_to_transformers": 1.0}
    assert "goal 3x" in capsys.readouterr().out
    with pytest.raises(RunExistsError, match="--overwrite"):
        bench_eval.main(["--limit", "2", "--out", str(out)])

"""`python -m vzip leaderboard` on the built-in model: from nothing, after an interruption, and once more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vzip import cli
from vzip.models import model_cache
from vzip.sweep import leaderboard as sweep

pytestmark = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("lmms_eval") is None, reason="needs lmms-eval"
)


def test_interrupted_resumed_and_taken_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["leaderboard", "methods=visionzip,fastv:K=1", "budgets=64", "eval.limit=2", f"paths.runs_dir={tmp_path}"]
    run_plan, asked = sweep.run_plan, []

    def interrupted(plan: object) -> object:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(plan)
        return run_plan(plan)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep, "run_plan", interrupted)
    monkeypatch.setattr(model_cache, "KEEPER", model_cache.ModelKeeper())
    assert cli.main(words) == 130
    assert "2 of 4 runs are finished and kept" in capsys.readouterr().err
    loads = []
    load_vlm = model_cache.load_vlm
    monkeypatch.setattr(model_cache, "load_vlm", lambda *a, **k: loads.append(1) or load_vlm(*a, **k))
    monkeypatch.setattr(model_cache, "KEEPER", model_cache.ModelKeeper())
    monkeypatch.setattr("vzip.sweep.execute.KEEPER", model_cache.KEEPER, raising=False)
    asked.clear()
    assert cli.main(words) == 0
    assert len(asked) == 2 and len(loads) == 1, "only what was missing, on one loaded model"
    told = capsys.readouterr()
    assert "floors added: random, uniform" in told.err and "floors: random, uniform (added" in told.out
    assert "not possible" in told.out and "cannot be below 116.0" in told.out and "PROVISIONAL" in told.out
    out = tmp_path / "leaderboard" / "tiny" / "scenes_limit-2"
    table = json.loads((out / "leaderboard.json").read_text())
    assert next((row["method"], row["num_entering"]) for row in table["entries"]) == ("vanilla", [576, 576])
    rows = {row["method"]: row for row in table["entries"]}
    assert set(rows) == {"vanilla", "visionzip", "random", "uniform"}
    record = json.loads((out / rows["visionzip"]["run"] / "run.json").read_text())
    num_images = record["visual_cache"]["num_encoded"]
    assert num_images == 2, "of eight questions"
    # Vanilla and visionzip ran before the interruption, the others after it on a model loaded anew.
    crops = {name: json.loads((out / rows[name]["run"] / "run.json").read_text())["tower_cache"] for name in rows}
    assert crops == {
        "vanilla": {"num_hits": 0, "num_misses": num_images},
        "visionzip": {"num_hits": num_images, "num_misses": 0},
        "random": {"num_hits": 0, "num_misses": num_images},
        "uniform": {"num_hits": num_images, "num_misses": 0},
    }, "the tower runs once an image for all methods"
    assert rows["visionzip"]["cost"]["kv_cache_bytes"] < rows["vanilla"]["cost"]["kv_cache_bytes"]
    assert {"prefill", "time_to_first_token"} <= rows["vanilla"]["cost"]["median_ms"].keys()
    assert "selection" in rows["visionzip"]["cost"]["median_ms"]

    loads.clear()
    assert cli.main([*words, "--out", str(out)]) == 0 and not loads, "nothing is run or measured twice"
    assert json.loads((out / "leaderboard.json").read_text())["entries"] == table["entries"]
    assert cli.main([*words, "--merge", str(out)]) == 2
    assert "is the folder that this leaderboard writes" in capsys.readouterr().err
    assert cli.main([*words, "--merge", str(tmp_path)]) == 2
    assert "holds no leaderboard.json" in capsys.readouterr().err

"""eval=paper_video: the files are checked before anything is loaded, wherever they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from vzip.config.build import EvaluationPlan, evaluation_plan
from vzip.config.options import config_dir
from vzip.errors import ConfigError, ManifestError
from vzip.evaluation.benchmarks.video_qa import VIDEO_SETS


@pytest.fixture(scope="module", autouse=True)
def hydra_folder() -> Iterator[None]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield


def plan(tmp_path: Path, *words: str) -> EvaluationPlan:
    return evaluation_plan(
        compose("eval", ["+exp=video_llava_7b_136tok", f"paths.runs_dir={tmp_path / 'runs'}", *words])
    )


def test_a_folder_is_needed_and_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"paths.video_root=null: .*data_manifests/video_qa.json"):
        plan(tmp_path).include_path()
    with pytest.raises(ConfigError, match=r"paths.video_root=/nowhere: no such directory"):
        plan(tmp_path, "paths.video_root=/nowhere")
    with pytest.raises(ManifestError, match=r"(?s)TGIF-QA: .*MSVD-QA: .*MSRVTT-QA: .*ActivityNet-QA: .* is not there"):
        plan(tmp_path, f"paths.video_root={tmp_path}").include_path()


def test_the_benchmarks_asked_for_are_prepared_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VZIP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data" / VIDEO_SETS["msvd_qa_zero_shot"].folder
    (folder / "videos").mkdir(parents=True)
    (folder / "videos" / "a.mp4").touch()
    (folder / "test_q.json").write_text(json.dumps([{"question_id": "1", "video_name": "a", "question": "who?"}]))
    (folder / "test_a.json").write_text(json.dumps([{"question_id": "1", "answer": "nobody"}]))
    ready = plan(tmp_path, f"paths.video_root={tmp_path / 'data'}", "eval.tasks=[msvd_qa_zero_shot]")
    assert ready.evaluation["include_path"] == "video", "the record's recipe does not depend on where the videos are"
    assert [path.name for path in Path(str(ready.include_path())).glob("*.yaml")] == ["msvd_qa_zero_shot.yaml"]
    whole = plan(tmp_path, f"paths.video_root={tmp_path / 'data'}")
    assert whole.evaluation["tasks"] == list(VIDEO_SETS)
    ending = "runs/paper_video/video_llava_7b_136tok/visionzip-17tok/seed0"
    assert str(whole.evaluation["run_dir"]).endswith(ending)
    assert whole.evaluation["resolved_config"]["recipe"] == "video_llava_7b_136tok"

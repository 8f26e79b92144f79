"""Choices about videos: lmms-eval's own scoring code, scores by length, and longer videos at equal cost."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
from lmms_eval.tasks.egoschema import utils as egoschema
from lmms_eval.tasks.mvbench import utils as mvbench
from rich.console import Console
from scripts.make_random_model import build
from tests import tiny
from tests.media.clips import write

import vzip
from vzip.errors import ManifestError
from vzip.evaluation.benchmarks import video_choice
from vzip.evaluation.benchmarks.catalog import OWN_TASKS
from vzip.evaluation.benchmarks.protocols import PROTOCOLS
from vzip.evaluation.run import evaluate
from vzip.report.table import print_record

# The scripted model takes images, so the middle frame of each video stands in its row.
FRAME = "doc_to_visual: !function vzip.evaluation.benchmarks.image_tasks.mmvet_image\n"


def videomme(make_image: Any) -> list[dict[str, Any]]:
    kinds = [("a", "short", "B"), ("a", "short", "C"), ("b", "long", "A"), ("c", "medium", "D")]
    shared = {"domain": "Knowledge", "sub_category": "Law", "task_type": "OCR Problems"}
    options = ["A. one", "B. two", "C. three", "D. four"]
    return [
        {"question_id": str(i), "videoID": video, "duration": length, "question": f"q{i}?", "options": options}
        | {"answer": right, "image": make_image(0), **shared}
        for i, (video, length, right) in enumerate(kinds)
    ]


def test_videomme_is_told_by_length(benchmarks, make_image):
    said = {"q0": "B", "q1": "(A)", "q2": "The answer is A.", "q3": "Z"}
    done = benchmarks.run("videomme_frames", videomme(make_image), said, FRAME)
    entries = [row["scores"]["videomme_perception_score"] for row in done.rows]
    assert done.value("videomme_perception_score") == video_choice.videomme_score(entries) == 50
    assert done.entry["grouped_by"] == "duration" and done.error("videomme_perception_score")[1] == "clustered"
    told = {name: (group["value"], group["num_samples"]) for name, group in done.entry["groups"].items()}
    assert told == {"short": (50, 2), "long": (100, 1), "medium": (0, 1)}
    for name, (value, _) in told.items():
        assert value == video_choice.videomme_score([entry for entry in entries if entry["duration"] == name])
    assert done.entry["protocol"]["generation"]["max_new_tokens"] == 16
    assert done.entry["chance"] == 25 and "subtitles" in done.entry["protocol"]["difference"]
    console = Console(file=io.StringIO(), width=120)
    print_record(done.record, console)
    shown = [line.replace("*", "").split() for line in console.file.getvalue().splitlines() if "duration" in line]
    assert [(line[3], line[5], line[-2]) for line in shown] == [
        ("short", "50", "2"),
        ("long", "100", "1"),
        ("medium", "0", "1"),
    ]


def test_longvideobench(benchmarks, make_image):
    kinds = [(600, 0), (15, 1), (15, 2)]
    questions = [
        {"id": str(i), "video_id": f"v{i}", "video_path": "x", "duration_group": length, "question_category": "T2A"}
        | {"question": f"q{i}?", "correct_choice": right, "option4": "N/A", "image": make_image(0)}
        | {f"option{k}": f"text{k}" for k in range(4)}
        for i, (length, right) in enumerate(kinds)
    ]
    done = benchmarks.run(
        "longvideobench_frames", questions, {"q0": "A", "q1": "The answer is B.", "q2": "D. text3"}, FRAME
    )
    entries = [row["scores"]["lvb_acc"] for row in done.rows]
    assert done.value("lvb_acc") == video_choice.longvideobench_score(entries) == pytest.approx(2 / 3, abs=1e-5)
    assert {name: group["value"] for name, group in done.entry["groups"].items()} == {"15": 0.5, "600": 1.0}
    assert list(done.entry["groups"]) == ["15", "600"], "in the order of their length"
    assert done.rows[0]["prompt"].count("text") == 4, "options that are not there are left out"


def test_egoschema(benchmarks, make_image):
    options = [f"{letter}. text {letter}" for letter in "ABCDE"]
    questions = [
        {"question_idx": str(i), "video_idx": f"v{i}", "question": f"q{i}?", "option": options, "answer": str(i)}
        | {"image": make_image(0)}
        for i in range(3)
    ]
    done = benchmarks.run("egoschema_subset", questions, {"q0": "A", "q1": "C.", "q2": "(C)"}, FRAME)
    entries = [row["scores"]["score"] for row in done.rows]
    assert done.value("score") == egoschema.egoschema_aggregate_score(entries, None) == pytest.approx(2 / 3)
    assert done.error("score") == (pytest.approx((2 / 9 / 3) ** 0.5), "binomial")


def test_nextqa(benchmarks, make_image):
    questions = [
        {"video": video, "question": f"q{i}", "answer": right, "qid": str(i), "type": "CW", "image": make_image(0)}
        | {f"a{k}": f"text{k}" for k in range(5)}
        for i, (video, right) in enumerate([("7", 0), ("7", 1), ("8", 4)])
    ]
    done = benchmarks.run("nextqa_mc_test", questions, {"q0": "A", "q1": "C", "q2": "E. text4"}, FRAME)
    assert done.value("exact_match") == pytest.approx(2 / 3) and done.error("exact_match")[1] == "clustered"
    assert done.rows[0]["prompt"].count("\n") == 5 + 1 and "E. text4" in done.rows[0]["prompt"]


def test_mvbench_leaves_empty_answers_out(benchmarks, make_image):
    questions = [
        {"video": f"{i}.mp4", "question": f"q{i}?", "candidates": ["up", "down", "left"], "answer": right}
        | {"image": make_image(0)}
        for i, right in enumerate(["down", "up", "left"])
    ]
    done = benchmarks.run("mvbench_action_antonym", questions, {"q0": "(B) down", "q1": "C", "q2": ""}, FRAME)
    entries = [row["scores"]["mvbench_accuracy"] for row in done.rows]
    assert done.value("mvbench_accuracy") == mvbench.mvbench_aggregate_results(entries) == 50
    assert done.error("mvbench_accuracy")[1] == "bootstrap"


@pytest.fixture(scope="module")
def model():
    return tiny.video_llava(vocab_size=320, video_token=5)


@pytest.fixture
def own_videomme(tmp_path, write_parquet, make_image, monkeypatch):
    """Four questions of Video-MME's form about three clips, in lmms-eval's place; the clips' folder, the tasks'."""
    from lmms_eval.tasks.videomme import utils

    monkeypatch.setattr(utils, "base_cache_dir", str(tmp_path))
    clips = tmp_path / "videomme" / "data"
    clips.mkdir(parents=True)
    for name in "abc":
        write(clips / f"{name}.mp4", 20)
    rows = [{key: value for key, value in row.items() if key != "image"} for row in videomme(make_image)]
    write_parquet(rows, tmp_path / "data.parquet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(
        f"include: {OWN_TASKS / 'video' / 'videomme_frames.yaml'}\ntask: own_videomme\ndataset_path: parquet\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'data.parquet'}}}}}\n"
    )
    monkeypatch.setitem(PROTOCOLS, "own_videomme", PROTOCOLS["videomme_frames"])
    return clips, tmp_path / "tasks"


def test_longer_video_at_equal_cost(model, tmp_path, own_videomme):
    """Video-MME's own files in lmms-eval's place, 2 frames of 65 visual tokens against 16 frames of 8."""
    clips, tasks = own_videomme
    counts = {}
    methods = {2: vzip.Identity(), 16: vzip.VisionZip(vzip.TokenBudget(num_dominant=6, num_contextual=2))}
    for num_frames, method in methods.items():
        vlm = vzip.CompressedVlm(model, method, tiny.video_processor(), num_frames=num_frames)
        run_dir = tmp_path / str(num_frames)
        asked = {"tasks": ["own_videomme"], "include_path": tasks, "gen_kwargs": {"max_new_tokens": 2}}
        record = evaluate(vlm, **asked, run_dir=run_dir, progress=False)
        assert set(record["tasks"]["own_videomme"]["groups"]) == {"short", "medium", "long"}
        counts[num_frames] = record["visual_tokens"]["measured_max"]
    assert counts == {2: 2 * 65, 16: 16 * 8} and counts[16] <= counts[2]
    os.unlink(clips / "c.mp4")  # lmms-eval's function ends the whole process here
    with pytest.raises(
        ManifestError, match=r"1 of 4 questions cannot be asked.*\n.*question 3: .*c\.mp4 does not exist"
    ):
        evaluate(vlm, **asked, run_dir=tmp_path / "missing", progress=False)
    assert not (Path(tmp_path) / "missing" / "run.json").exists()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "video_llava_published"])
def test_every_family_with_videos_end_to_end(family, tmp_path, own_videomme):
    """Files to scores by length, on a small random model: all tokens, fractions of each step, of the whole video."""
    model, processor = build(family)
    num_frames, measured = 8, {}
    for name, method in {
        "all": vzip.Identity(),
        "crop": vzip.VisionZip(vzip.FractionBudget(0.25, 0.125)),
        "video": vzip.VisionZip(vzip.FractionBudget(0.25, 0.125, scope="video")),
    }.items():
        vlm = vzip.CompressedVlm(model, method, processor, num_frames=num_frames)
        record = evaluate(
            vlm,
            tasks=["own_videomme"],
            include_path=own_videomme[1],
            gen_kwargs={"max_new_tokens": 2},
            run_dir=tmp_path / name,
            progress=False,
        )
        entry, counts = record["tasks"]["own_videomme"], record["visual_tokens"]
        assert set(entry["groups"]) == {"short", "medium", "long"} and entry["num_samples"] == 4
        assert counts["measured_min"] == counts["measured_max"] and counts["num_images"] == 4
        measured[name] = counts["measured_max"]
    pixels = vlm.preprocess_videos([str(own_videomme[0] / "a.mp4")])
    (shape,) = vlm.adapter.read_inputs(**pixels).shapes
    steps, patches = shape.num_crops, shape.num_patches
    units = steps * (patches + int(shape.has_cls))  # of all frames together their CLS tokens are among what is left
    assert measured["all"] == shape.num_vanilla
    added = shape.num_added
    assert measured["crop"] == steps * (patches // 4 + max(patches // 8, 1)) + added
    assert measured["video"] == units // 4 + max(units // 8, 1)

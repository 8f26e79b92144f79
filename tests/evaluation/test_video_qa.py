"""The video benchmarks: files joined by id, everything that is missing named, and a tiny Video-LLaVA end to end."""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests import tiny
from tests.evaluation.fake_endpoint import Answer, running
from tests.media.clips import write

import vzip
from vzip.cli import judge as judge_cli
from vzip.data.manifest import manifest_folder
from vzip.errors import ConfigError, ManifestError, UnsupportedModelError
from vzip.evaluation.benchmarks import video_qa
from vzip.evaluation.benchmarks.catalog import find_tasks
from vzip.evaluation.benchmarks.protocols import PROTOCOLS
from vzip.evaluation.benchmarks.video_qa import VIDEO_SETS, offline_scores, prepare, read_questions
from vzip.evaluation.run import evaluate

MSVD, ACTIVITYNET = VIDEO_SETS["msvd_qa_zero_shot"], VIDEO_SETS["activitynet_qa_zero_shot"]
QUESTIONS = [("v_a_0", "a", "what is seen?"), ("v_a_1", "a", "what moves?"), ("v_b_0", "b", "who is there?")]
ANSWERS = {"v_a_0": "grey", "v_a_1": "nothing", "v_b_0": "nobody"}


def write_set(
    root: Path, entry: video_qa.VideoSet, questions=QUESTIONS, answers=ANSWERS, videos=("a.mp4", "b.avi"), seed=0
) -> Path:
    """A benchmark's folder in Video-LLaVA's layout, its answers in another order than its questions."""
    folder = root / entry.folder
    (folder / entry.videos).mkdir(parents=True, exist_ok=True)
    for name in videos:
        (folder / entry.videos / f"{entry.prefix}{name}").touch()
    rows = [{"question_id": key, "video_name": name, "question": text} for key, name, text in questions]
    given = [{"answer": answer, "type": 3, "question_id": key} for key, answer in answers.items()]
    random.Random(seed).shuffle(given)
    (folder / "test_q.json").write_text(json.dumps(rows))
    (folder / "test_a.json").write_text(json.dumps(given))
    return folder


class TestFiles:
    @pytest.mark.parametrize("seed", range(4))
    def test_answers_are_found_by_id_whatever_their_order(self, tmp_path, seed):
        folder = write_set(tmp_path, MSVD, seed=seed)
        rows = read_questions(tmp_path, MSVD)
        assert [(row["question_id"], row["question"], row["answer"]) for row in rows] == [
            ("v_a_0", "what is seen?", "grey"),
            ("v_a_1", "what moves?", "nothing"),
            ("v_b_0", "who is there?", "nobody"),
        ]
        assert [row["video"] for row in rows] == [str(folder / "videos" / name) for name in ("a.mp4", "a.mp4", "b.avi")]

    def test_activitynets_file_names_and_answers_that_are_numbers(self, tmp_path):
        write_set(tmp_path, ACTIVITYNET, answers={**ANSWERS, "v_a_0": 3}, videos=("a.mkv", "a.mp4", "b.webm"))
        rows = read_questions(tmp_path, ACTIVITYNET)
        assert [Path(row["video"]).name for row in rows] == ["v_a.mp4", "v_a.mp4", "v_b.webm"]
        assert rows[0]["answer"] == "3"

    def test_names_that_have_their_ending(self, tmp_path):
        write_set(tmp_path, MSVD, questions=[("0", "a.mp4", "q?"), ("1", "b.2", "q?")], answers={"0": "x", "1": "y"})
        (tmp_path / MSVD.folder / MSVD.videos / "b.2.mp4").touch()
        assert [Path(row["video"]).name for row in read_questions(tmp_path, MSVD)] == ["a.mp4", "b.2.mp4"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"answers": {"v_a_0": "grey"}}, r"test_a.json: no answer to v_a_1, v_b_0\."),
            (
                {"videos": ("a.mp4", "c.mp4")},
                r"1 of 2 videos are not in .*/videos: b \(\.mp4, .*left out silently",
            ),
            ({"questions": [*QUESTIONS, QUESTIONS[0]]}, "test_q.json: question_id must be unique.*: v_a_0"),
            ({"questions": [("v_a_0", None, "what?")]}, "test_q.json, entry 0: must have question_id, video_name"),
            ({"questions": []}, "test_q.json: must be a list of at least one entry"),
        ],
    )
    def test_what_is_missing_or_broken_is_named(self, tmp_path, change, message):
        write_set(tmp_path, MSVD, **change)
        with pytest.raises(ManifestError, match=message):
            read_questions(tmp_path, MSVD)

    def test_files_that_are_not_there(self, tmp_path):
        with pytest.raises(ManifestError, match=r"MSVD-QA: .*MSVD_Zero_Shot_QA is not there.*data_manifests/video_qa"):
            read_questions(tmp_path, MSVD)
        folder = write_set(tmp_path, MSVD)
        (folder / "test_a.json").write_text("{")
        with pytest.raises(ManifestError, match=r"test_a.json: not readable as JSON"):
            read_questions(tmp_path, MSVD)
        (folder / "test_a.json").unlink()
        with pytest.raises(ManifestError, match=r"test_a.json: not there"):
            read_questions(tmp_path, MSVD)

    def test_many_missing_videos_are_counted(self, tmp_path):
        write_set(
            tmp_path, MSVD, [(str(i), f"x{i}", "q?") for i in range(30)], {str(i): "y" for i in range(30)}, videos=()
        )
        with pytest.raises(ManifestError, match=r"30 of 30 videos .*: x0, x1, x2, x3, x4 and 25 more"):
            read_questions(tmp_path, MSVD)


class TestPrepare:
    def test_only_what_is_asked_for_and_once(self, tmp_path):
        write_set(tmp_path / "root", MSVD)
        tasks = ["pope", MSVD.task]
        folder = prepare(tmp_path / "root", tasks, tmp_path / "cache")
        assert sorted(path.name for path in folder.iterdir()) == [f"{MSVD.task}.jsonl", f"{MSVD.task}.yaml", "utils.py"]
        before = [path.stat().st_mtime_ns for path in folder.iterdir()]
        assert prepare(str(tmp_path / "root"), tasks, tmp_path / "cache") == folder
        assert [path.stat().st_mtime_ns for path in folder.iterdir()] == before
        write_set(tmp_path / "root", MSVD, answers={**ANSWERS, "v_a_0": "other"})
        assert prepare(tmp_path / "root", tasks, tmp_path / "cache") != folder
        assert len(list((tmp_path / "cache").iterdir())) == 2, "nothing half written stays"

    def test_another_process_may_be_faster(self, tmp_path, monkeypatch):
        write_set(tmp_path / "root", MSVD)
        expected = prepare(tmp_path / "root", [MSVD.task], tmp_path / "cache")
        content = (expected / f"{MSVD.task}.jsonl").read_bytes()
        shutil.rmtree(expected)
        finish = Path.rename

        def after_the_other(work: Path, folder: Path) -> None:
            shutil.copytree(work, folder)
            finish(work, folder)

        monkeypatch.setattr(Path, "rename", after_the_other)
        assert prepare(tmp_path / "root", [MSVD.task], tmp_path / "cache") == expected
        assert (expected / f"{MSVD.task}.jsonl").read_bytes() == content
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [expected.name]

    def test_all_problems_at_once(self, tmp_path):
        write_set(tmp_path, MSVD, videos=())
        with pytest.raises(ManifestError, match=r"(?s)MSVD-QA: 2 of 2 videos.*ActivityNet-QA: .* is not there"):
            prepare(tmp_path, list(VIDEO_SETS), tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    def test_no_folder_or_no_video_benchmark(self, tmp_path):
        with pytest.raises(ConfigError, match=r"paths.video_root=null.*data_manifests/video_qa.json"):
            prepare(None, [MSVD.task])
        with pytest.raises(ConfigError, match=r"none of eval.tasks=\['pope'\] is a video benchmark"):
            prepare(tmp_path, ["pope"])

    def test_another_number_of_questions_than_published_is_said(self, tmp_path, caplog):
        write_set(tmp_path, MSVD)
        prepare(tmp_path, [MSVD.task], tmp_path / "cache")
        assert "MSVD-QA: 3 questions; as published it has 13157" in caplog.text


def test_asked_for_without_their_files():
    with pytest.raises(ConfigError, match=r"msvd_qa_zero_shot: .* eval.include_path=video and paths.video_root=DIR"):
        find_tasks([MSVD.task], None)
    # lmms-eval's own asks its judge while it scores, and takes a failed call for a wrong answer.
    with pytest.raises(UnsupportedModelError, match=r"activitynetqa: .* Use eval.tasks=\[activitynet_qa_zero_shot\]"):
        find_tasks(["activitynetqa"], None)


@pytest.mark.parametrize(
    ("answer", "said", "exact", "contains"),
    [
        ("dog", "Dog.", 1, 1),
        ("dog", "A dog runs.", 0, 1),
        ("dog", "The hotdog is big.", 0, 0),
        ("on the left", "on left", 1, 1),
        ("two men", "Two tall men", 0, 0),
        ("two men", "There are two men here", 0, 1),
        ("3", "", 0, 0),
        ("the", "a", 1, 0),
        ("ice-cream", "Ice cream!", 1, 1),
    ],
)
def test_offline_scores(answer, said, exact, contains):
    assert offline_scores(answer, said) == {"exact_match": exact, "contains_answer": contains}


def test_the_manifest_and_the_protocols_are_of_these_sets():
    listed = json.loads((manifest_folder() / "video_qa.json").read_text())["sets"]
    assert {entry["task"] for entry in listed} == set(VIDEO_SETS) <= PROTOCOLS.keys()
    for entry in listed:
        ours = VIDEO_SETS[entry["task"]]
        assert [entry[key] for key in ("title", "folder", "videos", "num_questions")] == [
            ours.title,
            ours.folder,
            ours.videos,
            ours.num_questions,
        ]
        assert entry["video_file"].startswith(f"{ours.prefix}<video_name>.mp4")
        protocol = PROTOCOLS[ours.task]
        assert (protocol.primary, protocol.unit, protocol.cluster) == ("judge_accuracy", "fraction", "video_name")
        assert "gpt-3.5-turbo" in str(protocol.judge) and protocol.paper and "by id" in protocol.difference


@pytest.fixture(scope="module")
def vlm():
    model = tiny.video_llava(vocab_size=320, video_token=5)
    compressor = vzip.VisionZip(vzip.TokenBudget(num_dominant=6, num_contextual=3))
    return vzip.CompressedVlm(model, compressor, tiny.video_processor(), num_frames=4)


@pytest.fixture(scope="module")
def finished(vlm, tmp_path_factory):
    """A run of the three questions on two videos; the first one's answer is what the model says, asked by hand."""
    root = tmp_path_factory.mktemp("video")
    folder = write_set(root / "root", MSVD, videos=())
    clips = {"a": write(folder / "videos" / "a.mp4"), "b": write(folder / "videos" / "b.mp4", 7)}
    said = {}
    for key, name, question in QUESTIONS:
        inputs = vlm.build_inputs([f"user: <video>{question} "], None, [[clips[name]]])
        with torch.no_grad():
            tokens = vlm.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=3)
        said[key] = vlm.processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    write_set(root / "root", MSVD, answers={**ANSWERS, "v_a_0": said["v_a_0"]}, videos=())
    include_path = prepare(root / "root", [MSVD.task], root / "cache")
    record = evaluate(
        vlm,
        tasks=[MSVD.task],
        include_path=include_path,
        run_dir=root / "run",
        gen_kwargs={"max_new_tokens": 6},
        batch_size=2,
        progress=False,
    )
    return root / "run", record, said


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_a_tiny_model_end_to_end(finished):
    run, record, said = finished
    rows = rows_of(run)
    assert {row["question_id"]: row["answer"] for row in rows} == said
    assert len(set(said.values())) > 1, "all answers equal: the test could not fail"
    assert [row["question"] for row in rows] == [question for _, _, question in QUESTIONS]
    assert [(row["cluster"], row["num_visual_tokens"]) for row in rows] == [("a", [36]), ("a", [36]), ("b", [36])]
    entry = record["tasks"][MSVD.task]
    # Residuals 2/3 - 1/3 of one video and -1/3 of the other: sqrt(2 * (1/9 + 1/9)) / 3.
    error = {
        "value": pytest.approx(1 / 3),
        "standard_error": pytest.approx(2 / 9),
        "standard_error_source": "clustered",
    }
    assert entry["metrics"]["exact_match"] == error
    assert entry["num_samples"] == 3 and entry["unit"] == "fraction"
    assert entry["primary_metric"] is None, "the paper's metric is the judge's, who has not been asked"


def test_then_judged(finished, monkeypatch, tmp_path):
    run, _, said = finished
    monkeypatch.setenv("VZIP_CACHE", str(tmp_path))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def answer(request, number):
        right = "Question: who is there?\nCorrect Answer: nobody\n" in request["messages"][1]["content"]
        return Answer("{'pred': 'yes', 'score': 4}" if right else "{'pred': 'no', 'score': 1}")

    parser = argparse.ArgumentParser()
    judge_cli.add_arguments(parser)
    with running(answer) as endpoint:
        words = [str(run), "--base-url", endpoint.url, "--model", "judge", "--yes"]
        assert judge_cli.main(parser.parse_args(words), Console(file=io.StringIO())) == 0
    prompts = [request["messages"][1]["content"] for request in endpoint.requests]
    for key, _, question in QUESTIONS:
        assert sum(f"Question: {question}" in prompt and f"Answer: {said[key]}\n" in prompt for prompt in prompts) == 1
    entry = json.loads((run / "run.json").read_text())["tasks"][MSVD.task]
    assert entry["primary_metric"] == "judge_accuracy"
    assert entry["metrics"]["judge_accuracy"]["value"] == pytest.approx(1 / 3)
    assert entry["metrics"]["judge_score"]["value"] == 2.0
    # Two videos: residuals -2/3 and 2/3, so sqrt(2 * 8/9) / 3.
    assert entry["metrics"]["judge_accuracy"]["standard_error"] == pytest.approx((16 / 9) ** 0.5 / 3)
    assert {row["question_id"]: row["scores"]["judge_accuracy"] for row in rows_of(run)} == {
        "v_a_0": 0.0,
        "v_a_1": 0.0,
        "v_b_0": 1.0,
    }

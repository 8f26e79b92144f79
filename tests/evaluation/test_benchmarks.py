"""lmms-eval's own scoring code, on local data in the benchmarks' own schema, with scores known by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lmms_eval import tasks as lmms_eval_tasks

from vzip.evaluation.catalog import built_in_tasks, task_config
from vzip.evaluation.protocol import PROTOCOLS
from vzip.evaluation.run import evaluate

INSTALLED = Path(lmms_eval_tasks.__file__).parent


def own_copy(folder: Path, task: str, source: str, data: Path, extra: str = "") -> None:
    """A task file that is the installed one in everything but its name and its data."""
    (folder / f"{task}.yaml").write_text(
        f"include: {INSTALLED / source}\ntask: {task}\ndataset_path: parquet\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {data}, validation: {data}, testdev: {data}}}}}\n{extra}"
    )


@pytest.fixture
def run(scripted, tmp_path, monkeypatch):
    """Runs one benchmark on rows, with the answers in their order; the protocol of the original is used."""

    def go(task: str, source: str, rows: list[dict[str, Any]], said: list[str], write_parquet, **kwargs: Any):
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        write_parquet(rows, folder / "data.parquet")
        name = f"own_{task}"
        own_copy(folder, name, source, folder / "data.parquet")
        monkeypatch.setitem(PROTOCOLS, name, PROTOCOLS[task])
        answers = iter(said)
        vlm = scripted(lambda prompt: next(answers))
        record = evaluate(vlm, tasks=[name], include_path=folder, run_dir=tmp_path / "run", progress=False, **kwargs)
        return record["tasks"][name], vlm.prompts

    return go


def test_pope(run, write_parquet, make_picture):
    truth = ["yes", "yes", "yes", "no", "no", "no"]
    said = ["Yes", "yes", "no", "yes", "no", "No"]
    rows = [
        {
            "question_id": str(i),
            "question": f"Is there a dog{i}?",
            "answer": a,
            "image": make_picture(i),
            "category": "x",
        }
        for i, a in enumerate(truth)
    ]
    entry, prompts = run("pope", "pope/pope.yaml", rows, said, write_parquet)
    # true positives 2, false positives 1, false negatives 1: precision = recall = F1 = 2/3; 4 of 6 right.
    assert entry["metrics"]["pope_f1_score"]["value"] == pytest.approx(2 / 3)
    assert entry["metrics"]["pope_accuracy"]["value"] == pytest.approx(4 / 6)
    assert entry["metrics"]["pope_yes_ratio"]["value"] == pytest.approx(0.5)
    assert entry["primary_metric"] == "pope_f1_score" and entry["unit"] == "fraction"
    assert entry["metrics"]["pope_f1_score"]["standard_error_source"] == "bootstrap"
    assert 0.05 < entry["metrics"]["pope_f1_score"]["standard_error"] < 0.5
    assert (
        prompts[0] == "USER: <image>\nIs there a dog0?\nAnswer the question using a single word or phrase. ASSISTANT:"
    )


def test_mme_sums_both_parts(run, write_parquet, make_picture):
    rows, said = [], []
    # existence: picture a both right (200), picture b one right (50); code_reasoning: one picture, one right (50).
    for category, picture, right in (
        ("existence", "a", (True, True)),
        ("existence", "b", (True, False)),
        ("code_reasoning", "c", (False, True)),
    ):
        for number, (answer, correct) in enumerate(zip(("Yes", "No"), right, strict=True)):
            rows.append(
                {
                    "question_id": f"{category}/{picture}.png",
                    "image": make_picture(number),
                    "question": f"{picture}{number}? Please answer yes or no.",
                    "answer": answer,
                    "category": category,
                }
            )
            said.append(answer if correct else {"Yes": "No", "No": "Yes"}[answer])
    entry, prompts = run("mme", "mme/mme.yaml", rows, said, write_parquet)
    assert entry["metrics"]["mme_perception_score"]["value"] == (200 + 50) / 2
    assert entry["metrics"]["mme_cognition_score"]["value"] == 50
    total = entry["metrics"]["mme_perception_score+mme_cognition_score"]
    assert total["value"] == 175 and entry["primary_metric"] == "mme_perception_score+mme_cognition_score"
    # Two pictures of scores 200 and 50: drawing two gives 200, 125 or 50 with 1/4, 1/2, 1/4, so 53.03; one picture: 0.
    assert entry["metrics"]["mme_perception_score"]["standard_error"] == pytest.approx(53.03, rel=0.15)
    assert entry["metrics"]["mme_cognition_score"]["standard_error"] == 0
    assert total["standard_error"] == entry["metrics"]["mme_perception_score"]["standard_error"]
    assert "Please answer" not in prompts[0]


def test_scienceqa(run, write_parquet, make_picture):
    rows = [
        {"image": make_picture(i), "question": "Which?", "choices": ["p", "q"], "answer": a, "hint": h}
        for i, (a, h) in enumerate([(0, ""), (1, "a hint"), (1, "")])
    ]
    entry, prompts = run("scienceqa_img", "scienceqa/scienceqa_img.yaml", rows, ["A", "B. q", "A"], write_parquet)
    assert entry["metrics"]["exact_match"]["value"] == pytest.approx(2 / 3)
    assert prompts[1].startswith("USER: <image>\nContext: a hint\nWhich?\nA. p\nB. q\nAnswer with the option's letter")


def test_textvqa_counts_agreeing_annotators(run, write_parquet, make_picture, tmp_path):
    # Ten annotators; "stop" by two of them: leaving each out in turn gives (8 * 2/3 + 2 * 1/3) / 10 = 0.6.
    answers = ["stop", "stop", *["go"] * 8]
    rows = [
        {"image": make_picture(0), "question": "what does it say?", "question_id": 7, "answers": answers, "answer": "x"}
    ]
    entry, prompts = run("textvqa_val", "textvqa/textvqa_val.yaml", rows, ["Stop"], write_parquet)
    assert entry["metrics"]["exact_match"]["value"] == pytest.approx(0.6)
    assert entry["primary_metric"] == "exact_match" and "OCR" not in prompts[0]
    assert list((tmp_path / "run" / "submissions").iterdir()), "submission files belong into the run directory"


def test_seedbench(run, write_parquet, make_picture):
    choices = {f"choice_{letter}": letter for letter in "abcd"}
    rows = [
        {
            "image": [make_picture(i)],
            "question": "What?",
            **choices,
            "answer": "B",
            "data_type": kind,
            "question_id": "0",
        }
        for i, kind in enumerate(["image", "image", "video", "image"])
    ]
    entry, _ = run("seedbench", "seedbench/seedbench.yaml", rows, ["B", "b", "A", "C. c"], write_parquet)
    assert entry["metrics"]["seed_image"]["value"] == pytest.approx(2 / 3)
    assert entry["metrics"]["seed_all"]["value"] == 0.5
    assert entry["metrics"]["seed_all"]["standard_error"] == pytest.approx((0.25 / 4) ** 0.5)
    assert entry["metrics"]["seed_all"]["standard_error_source"] == "binomial"


def test_every_protocol_names_metrics_the_installed_task_has():
    manager = built_in_tasks()
    for task, protocol in PROTOCOLS.items():
        if task.startswith("scenes_"):
            continue
        listed = {entry["metric"] for entry in task_config(manager, task)["metric_list"]}
        assert set(protocol.primary.split("+")) <= listed, task
        assert task_config(manager, task).get("output_type", "generate_until") == "generate_until"

"""MM-Vet and LLaVA-Bench: asked without a judge, then scored by one."""

from __future__ import annotations

import io
import json
from argparse import ArgumentParser

import pytest
import yaml
from rich.console import Console
from tests.evaluation.benchmark_kit import INSTALLED
from tests.evaluation.fake_endpoint import Answer, running

from vzip.cli import judge as judge_cli
from vzip.errors import UnsupportedModelError
from vzip.evaluation.benchmarks.catalog import OWN_TASKS, find_tasks, task_config
from vzip.evaluation.benchmarks.judged import JUDGED_TASKS
from vzip.evaluation.benchmarks.protocols import PROTOCOLS
from vzip.results.record import read_record, read_samples

KEY = "sk-secret-0123456789"


def judge(monkeypatch, tmp_path, task, behaviour) -> tuple[int, str, list[dict]]:
    """Judges the run of a benchmark; returns the exit code, what was printed, and what the judge was asked."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("VZIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(JUDGED_TASKS, f"own_{task}", JUDGED_TASKS[task])
    parser = ArgumentParser()
    judge_cli.add_arguments(parser)
    console = Console(width=200, record=True, markup=False, highlight=False, file=io.StringIO())
    with running(behaviour) as endpoint:
        code = judge_cli.main(parser.parse_args([str(tmp_path / "run"), "--base-url", endpoint.url, "--yes"]), console)
    return code, console.export_text(), endpoint.requests


def test_mm_vet(benchmarks, make_image, monkeypatch, tmp_path):
    truth = [("q0 of x?", "-1<AND>-5"), ("q1?", "red<OR>blue"), ("q2?", "cat")]
    questions = [
        {
            "question_id": f"v1_{i}",
            "question": question,
            "answer": answer,
            "capability": "rec",
            "image": make_image(i),
        }
        for i, (question, answer) in enumerate(truth)
    ]
    done = benchmarks.run("mmvet_direct", questions, {"q0": "x = -1", "q1": "blue", "q2": " "})
    assert done.rows[0]["prompt"] == "USER: <image>\nq0 of x? ASSISTANT:", "no word but the question"
    assert done.entry["primary_metric"] is None and done.value("answered") == pytest.approx(2 / 3)

    def graded(request, number):
        text = request["messages"][0]["content"]
        return Answer("0.5" if "q0 of x? | -1 <AND> -5 | x = -1 |" in text else "1.0 |" if "q1?" in text else "cat: 1")

    code, shown, requests = judge(monkeypatch, tmp_path, "mmvet_direct", graded)
    record, rows = read_record(tmp_path / "run"), read_samples(tmp_path / "run")["own_mmvet_direct"]
    entry, judging = record["tasks"]["own_mmvet_direct"], record["judge"]["own_mmvet_direct"]
    # Half right and all right; the third got no number, which is no score of 0.
    assert entry["metrics"]["judge_score"]["value"] == 75 and entry["primary_metric"] == "judge_score"
    assert entry["unit"] == "percent"
    assert [row["scores"].get("judge_score") for row in rows] == [50, 100, None]
    assert code == 1 and "v1_2: no usable reply in 3; the last: 'cat: 1'" in shown
    assert (judging["num_judged"], judging["num_unusable"], judging["model"]) == (2, 1, "gpt-4-0613")
    assert judging["prompt"] == "mm_vet_v1" and judging["max_tokens"] == 8
    assert "judge: 1 of 3 answers of own_mmvet_direct have no usable verdict" in record["provisional_reasons"]
    assert requests[0]["messages"][0]["content"].startswith("Compare the ground truth and prediction from AI models")
    assert KEY not in shown + (tmp_path / "run/run.json").read_text() + (tmp_path / "run/samples.jsonl").read_text()


def test_llava_bench(benchmarks, make_image, monkeypatch, tmp_path):
    questions = [
        {"question_id": i, "question": f"q{i}?", "gpt_answer": f"reference {i}", "category": kind, "image_id": "p"}
        | {"caption": ["A dog.", "On grass."], "image": make_image(i)}
        for i, kind in enumerate(["conv", "detail", "complex"])
    ]
    done = benchmarks.run("llava_bench_wild", questions, {f"q{i}": f"answer {i}" for i in range(3)})
    assert done.entry["primary_metric"] is None and done.value("answered") == 1

    def rated(request, number):
        text = request["messages"][1]["content"]
        asked = next(i for i in range(3) if f"[Question]\nq{i}?\n" in text)
        assert text.startswith("[Context]\nA dog.\nOn grass.\n\n[Question]")
        assert f"[Assistant 1]\nreference {asked}\n" in text and f"[Assistant 2]\nanswer {asked}\n" in text
        return Answer(["8 6\nThe first is longer.", "10, 9", "9 3"][asked])

    code, _, requests = judge(monkeypatch, tmp_path, "llava_bench_wild", rated)
    metric = read_record(tmp_path / "run")["tasks"]["own_llava_bench_wild"]["metrics"]["judge_score"]
    assert code == 0 and metric["value"] == pytest.approx(100 * (6 + 9 + 3) / (8 + 10 + 9))
    assert metric["standard_error"] is None, "all questions are about one picture"
    assert requests[0]["model"] == "gpt-4" and requests[0]["max_tokens"] == 1024


@pytest.mark.parametrize(
    ("task", "reply", "score"),
    [
        ("mmvet_direct", "0.7", 70),
        ("mmvet_direct", "1.0 | because", 100),
        ("mmvet_direct", "", None),
        ("mmvet_direct", "1.5", None),
        ("mmvet_direct", "nan", None),
        ("mmvet_direct", "The score is 0.5", None),
        ("llava_bench_wild", "8 7.5\nwhy", {"reference": 8, "judged": 7.5}),
        ("llava_bench_wild", "\n", None),
        ("llava_bench_wild", "8\n7", None),
        ("llava_bench_wild", "Assistant 1: 8, Assistant 2: 7", None),
        ("llava_bench_wild", "0 7", None),
        ("llava_bench_wild", "8 11", None),
    ],
)
def test_replies(task, reply, score):
    kind = JUDGED_TASKS[task]
    assert kind.read(reply) == (None if score is None else {"judge_score": score})
    assert kind.usable(reply) == (score is not None)


def test_what_lmms_eval_judges_itself_is_refused_before_a_model_is_loaded():
    for task, ours in (
        ("mmvet", "mmvet_direct"),
        ("llava_in_the_wild", "llava_bench_wild"),
        ("mmbench_en_dev", "mmbench_en_dev_static"),
    ):
        with pytest.raises(UnsupportedModelError, match=rf"task {task}: .* the call failed. Use .*\[{ours}\]"):
            find_tasks([task], None)


def test_mm_vets_data_are_lmms_evals():
    # The one task that cannot include lmms-eval's file, whose functions want a key when they are read.
    lines = (INSTALLED / "mmvet/mmvet.yaml").read_text().splitlines()
    theirs = yaml.safe_load("\n".join(line for line in lines if "!function" not in line))
    ours = task_config(find_tasks(["mmvet_direct"], None), "mmvet_direct")
    for key in ("dataset_path", "dataset_kwargs", "test_split", "output_type"):
        assert ours[key] == theirs[key]
    assert ours["generation_kwargs"]["max_new_tokens"] == theirs["generation_kwargs"]["max_new_tokens"]


def test_judged_tasks_have_protocols():
    judged = {name for name, protocol in PROTOCOLS.items() if protocol.judge is not None}
    assert judged == set(JUDGED_TASKS)
    for name in judged:
        assert (PROTOCOLS[name].primary, PROTOCOLS[name].unit) == (
            JUDGED_TASKS[name].metrics[0],
            JUDGED_TASKS[name].unit,
        )
    assert {path.stem for path in (OWN_TASKS / "image").glob("*.yaml")} & judged == {"mmvet_direct", "llava_bench_wild"}


def test_the_prompts_are_the_published_ones():
    # Taken of the benchmarks' own files; the texts themselves come from lmms-eval, mended where it has a slip.
    digests = {
        "mmvet_direct": "adfeda49b83cd216c7fa0d7bd182c7a59c6dbfebf9cec80ea8f03be4bc53dd9c",
        "llava_bench_wild": "288fb764b4f479d281673c345ab035c3f02ec3692343a1e28d5deafd6c2af727",
    }
    for task, digest in digests.items():
        assert JUDGED_TASKS[task].prompt.sha256 == digest
    # One text serves all three categories of LLaVA-Bench.
    rule = json.loads((INSTALLED / "llava-in-the-wild/rule.json").read_text())
    assert rule["llava_bench_complex"] == rule["llava_bench_detail"] == rule["llava_bench_conv"]

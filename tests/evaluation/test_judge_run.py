"""`python -m vzip judge`: verdicts in a run's record, what it costs, and everything that must not happen."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import re
from argparse import ArgumentParser
from pathlib import Path

import pytest
from rich.console import Console
from tests.evaluation.fake_endpoint import Answer, running
from tests.writing import held

from vzip import cli
from vzip.cli import judge as judge_cli
from vzip.cli.judge import estimate_tokens
from vzip.errors import ConfigError, JudgeError, ManifestError, RunExistsError
from vzip.evaluation.benchmarks.judge_prompts import read_prompt
from vzip.results.record import read_samples

KEY = "sk-secret-0123456789"
MSVD, TGIF = "msvd_qa_zero_shot", "tgif_qa_zero_shot"
# question, target, answer, video, (verdict, score) that the judge gives.
MSVD_ROWS = [
    ("what is a man doing?", "cook", "He is cooking.", "a", ("yes", 5)),
    ("what is cut?", "carrot", "An onion.", "a", ("no", 1)),
    ("who runs?", "dog", "A dog runs.", "b", ("yes", 4.6)),
    ("who walks?", "man", "A woman walks.", "c", ("no", 2)),
]
TGIF_ROWS = [("what jumps?", "cat", "A cat.", "x", ("yes", 5)), ("how often?", "3", "Twice.", "y", ("no", 0))]


def row(task: str, doc_id: int, content: tuple) -> dict:
    question, target, answer, video, _ = content
    return {
        "task": task,
        "doc_id": doc_id,
        "question_id": f"v_{video}_{doc_id}",
        "cluster": video,
        "filter_index": 0,
        "question": question,
        "prompt": f"USER: <video>\n{question} ASSISTANT:",
        "target": target,
        "answer": answer,
        "scores": {"exact_match": 0.0},
        "num_visual_tokens": [136],
    }


def entry(num_samples: int) -> dict:
    metrics = {"exact_match": {"value": 0.0, "standard_error": None, "standard_error_source": None}}
    return {
        "primary_metric": None,
        "unit": "fraction",
        "chance": None,
        "num_samples": num_samples,
        "metrics": metrics,
    }


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A finished run of two benchmarks, its answers in no particular order, and a key in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("VZIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    record = {
        "schema_version": 1,
        "model": {},
        "compressor": {"name": "VisionZip"},
        "visual_tokens": {},
        "tasks": {MSVD: entry(4), TGIF: entry(2)},
        "provisional": True,
        "provisional_reasons": ["the checkout had changes that are not committed"],
    }
    rows = [row(MSVD, i, content) for i, content in enumerate(MSVD_ROWS)]
    rows += [row(TGIF, i, content) for i, content in enumerate(TGIF_ROWS)]
    random.Random(1).shuffle(rows)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def by_script(request: dict, number: int) -> Answer:
    """The judge: what MSVD_ROWS and TGIF_ROWS say of the answer that the prompt holds."""
    text = request["messages"][1]["content"]
    ((_, _, _, _, (verdict, score)),) = [
        content
        for content in MSVD_ROWS + TGIF_ROWS
        if f"Question: {content[0]}\nCorrect Answer: {content[1]}\nPredicted Answer: {content[2]}\n" in text
    ]
    return Answer(f"{{'pred': '{verdict}', 'score': {score}}}")


def judge(run: Path, url: str, *words: str) -> tuple[int, str]:
    """Runs the command; returns its exit code and what it printed."""
    parser = ArgumentParser()
    judge_cli.add_arguments(parser)
    console = Console(width=200, record=True, markup=False, highlight=False, file=io.StringIO())
    code = judge_cli.main(parser.parse_args([str(run), "--base-url", url, "--model", "judge", *words]), console)
    return code, console.export_text()


def record_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def rows_of(run: Path) -> dict[tuple[str, int], dict]:
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return {(one["task"], one["doc_id"]): one for one in rows}


def test_scores_by_hand(run):
    with running(by_script) as endpoint:
        code, shown = judge(run, endpoint.url, "--yes")
    record = record_of(run)
    metrics = record["tasks"][MSVD]["metrics"]
    assert code == 0 and record["tasks"][MSVD]["primary_metric"] == "judge_accuracy"
    # Right: questions 0 and 2. Scores 5, 1, 4 (4.6 cut), 2.
    assert metrics["judge_accuracy"]["value"] == 0.5 and metrics["judge_score"]["value"] == 3.0
    # Residuals by video: a (1/2 - 1/2) = 0, b 1/2, c -1/2: sqrt(3/2 * (0 + 1/4 + 1/4)) / 4.
    assert metrics["judge_accuracy"]["standard_error"] == pytest.approx(math.sqrt(0.75) / 4)
    assert metrics["judge_accuracy"]["standard_error_source"] == "clustered"
    # Scores: a 2 - 2 = 0, b 1, c -1.
    assert metrics["judge_score"]["standard_error"] == pytest.approx(math.sqrt(1.5 * 2) / 4)
    assert metrics["exact_match"]["value"] == 0.0
    assert record["tasks"][TGIF]["metrics"]["judge_score"]["value"] == 2.5
    rows = rows_of(run)
    assert rows[MSVD, 2]["scores"] == {"exact_match": 0.0, "judge_accuracy": 1.0, "judge_score": 4.0}
    assert rows[TGIF, 1]["scores"]["judge_accuracy"] == 0.0
    assert rows[TGIF, 1]["judge"] == {
        "reply": "{'pred': 'no', 'score': 0}",
        "model": "judge-0125",
        "problem": None,
    }
    assert "judge_accuracy 0.5" in " ".join(shown.replace("│", " ").split())
    assert shown.count("not the paper's metric") == 2


def test_what_the_record_says_of_the_judge(run):
    with running(by_script) as endpoint:
        judge(run, endpoint.url, "--yes", "--temperature", "0.3")
        url = endpoint.url
    said = record_of(run)["judge"][MSVD]
    assert said.pop("judged").endswith("+00:00")
    assert said == {
        "model": "judge",
        "base_url": url,
        "temperature": 0.3,
        "max_tokens": 64,
        "prompt": "video_chatgpt_v1",
        "prompt_sha256": read_prompt("video_chatgpt_v1").sha256,
        "served_models": {"judge-0125": 4},
        "num_judged": 4,
        "num_unusable": 0,
    }
    assert record_of(run)["provisional_reasons"] == ["the checkout had changes that are not committed"]


def test_the_order_of_the_answers_means_nothing(run):
    shuffled = run.with_name("shuffled")
    shuffled.mkdir()
    (shuffled / "run.json").write_text((run / "run.json").read_text())
    lines = (run / "samples.jsonl").read_text().splitlines(keepends=True)
    (shuffled / "samples.jsonl").write_text("".join(reversed(lines)))
    with running(by_script) as endpoint:
        judge(run, endpoint.url, "--yes")
        judge(shuffled, endpoint.url, "--yes", "--cache", str(run.with_name("other.sqlite")))
        assert len(endpoint.requests) == 12
    assert rows_of(run) == rows_of(shuffled)
    assert record_of(run)["tasks"] == record_of(shuffled)["tasks"]


def test_verdicts_are_not_replaced_unasked(run):
    with running(by_script) as endpoint:
        judge(run, endpoint.url, "--yes")
        before = (run / "run.json").read_bytes(), (run / "samples.jsonl").read_bytes()
        with pytest.raises(RunExistsError, match=r"already judged by judge with video_chatgpt_v1 .* add --overwrite"):
            judge(run, endpoint.url, "--yes")
        with pytest.raises(RunExistsError, match="already judged"):
            judge(run, endpoint.url, "--yes", "--temperature", "1")
        assert ((run / "run.json").read_bytes(), (run / "samples.jsonl").read_bytes()) == before
        endpoint.behaviour = lambda request, number: Answer("{'pred': 'no', 'score': 0}")
        judge(run, endpoint.url, "--yes", "--overwrite", "--temperature", "1")
    assert record_of(run)["tasks"][MSVD]["metrics"]["judge_accuracy"]["value"] == 0
    assert record_of(run)["judge"][MSVD]["temperature"] == 1


def test_what_gets_no_verdict_is_named_and_neither_right_nor_wrong(run):
    def answer(request, number):
        return Answer("no idea") if "who runs?" in request["messages"][1]["content"] else by_script(request, number)

    with running(answer) as endpoint:
        code, shown = judge(run, endpoint.url, "--yes")
        assert code == 1
        assert "1 answers have no usable verdict and count as neither right nor wrong" in shown
        assert "v_b_2: no usable reply in 3; the last: 'no idea'" in shown
        record = record_of(run)
        assert record["tasks"][MSVD]["metrics"]["judge_accuracy"]["value"] == pytest.approx(1 / 3)
        assert record["judge"][MSVD]["num_unusable"] == 1 and record["judge"][MSVD]["num_judged"] == 3
        assert "judge: 1 of 4 answers of msvd_qa_zero_shot have no usable verdict" in record["provisional_reasons"]
        assert rows_of(run)[MSVD, 2]["scores"] == {"exact_match": 0.0}
        # The same judge may complete its work, and pays for what is missing only.
        endpoint.behaviour, before = by_script, len(endpoint.requests)
        assert judge(run, endpoint.url, "--yes", "--tasks", MSVD)[0] == 0
        assert len(endpoint.requests) - before == 1
    assert record_of(run)["tasks"][MSVD]["metrics"]["judge_accuracy"]["value"] == 0.5
    assert record_of(run)["provisional_reasons"] == ["the checkout had changes that are not committed"]
    assert record_of(run)["judge"][TGIF]["num_judged"] == 2


def test_an_endpoint_that_dies_changes_nothing_and_is_gone_on_with(run):
    before = (run / "run.json").read_bytes(), (run / "samples.jsonl").read_bytes()

    def dies(request, number):
        return by_script(request, number) if number < 4 else Answer(status=401, body=f"key {KEY} expired")

    with running(dies) as endpoint:
        with pytest.raises(
            JudgeError, match=r"4 of 6 answers .* are judged and kept in .*Run the same command"
        ) as raised:
            judge(run, endpoint.url, "--yes", "--workers", "1")
        assert KEY not in str(raised.value)
        assert ((run / "run.json").read_bytes(), (run / "samples.jsonl").read_bytes()) == before
        endpoint.behaviour = by_script
        asked = len(endpoint.requests)
        code, shown = judge(run, endpoint.url, "--yes")
        assert code == 0 and "4 of them judged before" in shown
        assert len(endpoint.requests) - asked == 2
    assert record_of(run)["judge"][MSVD]["num_judged"] == 4


def test_benchmarks_of_two_kinds_are_paid_for_together_and_judged_one_after_the_other(run):
    record, mmvet = record_of(run), [row("mmvet_direct", i, (f"q{i}?", "red", "Red.", f"p{i}", ())) for i in range(2)]
    record["tasks"]["mmvet_direct"] = entry(2)
    (run / "run.json").write_text(json.dumps(record))
    with (run / "samples.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in mmvet)

    def dies(request, number):
        return by_script(request, number) if len(request["messages"]) == 2 else Answer(status=403, body="no more")

    with running(dies) as endpoint:
        with pytest.raises(JudgeError, match=r"no more\)\. Check .* 0 of 2 answers \(mmvet_direct\) are judged"):
            judge(run, endpoint.url, "--yes")
        assert set(record_of(run)["judge"]) == {MSVD, TGIF}, "what was finished is in the record"
        endpoint.behaviour, asked = lambda request, number: Answer("0.5"), len(endpoint.requests)
        code, shown = judge(run, endpoint.url, "--yes")
        assert code == 0 and shown.count("to be sent") == 1 and "2 answers (mmvet_direct), 0 of them" in shown
        assert len(endpoint.requests) - asked == 2
        assert record_of(run)["tasks"]["mmvet_direct"]["metrics"]["judge_score"]["value"] == 50
        assert "video_chatgpt" not in shown, "the other judge has nothing left to do"
        with pytest.raises(RunExistsError, match="already judged"):
            judge(run, endpoint.url, "--yes")
        # All of it again: about 1.9 and 1.2, and no more is allowed than for both together.
        words = ("--yes", "--overwrite", "--price-in", "1000", "--price-out", "1000", "--temperature", "1")
        endpoint.behaviour, asked = by_script, len(endpoint.requests)
        with pytest.raises(JudgeError, match=r"about 3\.\d\d is more than --max-cost 2.5\. Nothing was sent"):
            judge(run, endpoint.url, *words, "--max-cost", "2.5")
        assert len(endpoint.requests) == asked


class TestCost:
    def test_shown_before_anything_is_sent(self, run, monkeypatch):
        tokens = sum(
            estimate_tokens(read_prompt("video_chatgpt_v1").fill(question=question, answer=target, prediction=answer))
            for question, target, answer, *_ in MSVD_ROWS + TGIF_ROWS
        )
        assert 6 * 250 < tokens < 6 * 450, "OpenAI's tokenizer gives the filled prompt about 300 tokens"
        monkeypatch.setattr("sys.stdin", io.StringIO())
        with running(by_script) as endpoint:
            with pytest.raises(ConfigError, match=r"add --yes. Nothing was sent"):
                judge(run, endpoint.url)
            monkeypatch.setattr("sys.stdin", Terminal())
            monkeypatch.setattr("builtins.input", lambda question: "n")
            code, shown = judge(run, endpoint.url, "--price-in", "1000", "--price-out", "2000")
            assert endpoint.requests == [] and code == 0
            expected = (tokens * 1000 + 6 * 20 * 2000) / 1e6
            assert f"about {tokens:,} tokens" in shown and f"cost: about {expected:.2f} at 1000 and 2000" in shown
            assert "not started; nothing was sent." in shown
            monkeypatch.setattr("builtins.input", lambda question: "y")
            assert "cost unknown (give --price-in and --price-out)" in judge(run, endpoint.url)[1]
        assert "judge" in record_of(run)

    def test_no_more_is_spent_than_allowed(self, run):
        prices = ("--price-in", "1000", "--price-out", "1000", "--yes")
        with running(by_script) as endpoint:
            with pytest.raises(JudgeError, match=r"is more than --max-cost 0.1. Nothing was sent"):
                judge(run, endpoint.url, *prices, "--max-cost", "0.1")
            assert endpoint.requests == []
            # The estimate is about 2; this endpoint counts 1000 tokens a question, so 1.00 each.
            costly = Answer(body=json.dumps(EXPENSIVE))
            endpoint.behaviour = lambda request, number: costly
            with pytest.raises(JudgeError, match=r"3\.00 were spent, more than --max-cost 2\.5.* kept"):
                judge(run, endpoint.url, *prices, "--max-cost", "2.5", "--workers", "1")
            assert len(endpoint.requests) < 6
            endpoint.behaviour = by_script
            shown = judge(run, endpoint.url, *prices, "--max-cost", "2.5", "--cache", str(run / "new.sqlite"))[1]
        assert "1,200 tokens sent, 60 came back, 1.26 spent" in shown

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--max-cost", "3"], "--max-cost needs them"),
            (["--price-in", "3"], "give both"),
            (["--price-in", "-1", "--price-out", "1"], "--price-in -1.0: must be 0 or more"),
            (["--temperature", "-1"], "--temperature -1.0: must be 0 or more"),
            (["--workers", "0"], "--workers 0: must be 1 or more"),
            (["--tasks", "msvd_qa"], r"--tasks msvd_qa: not in this run \(did you mean 'msvd_qa_zero_shot'\?\)"),
        ],
    )
    def test_settings_that_cannot_be(self, run, words, message):
        with running(by_script) as endpoint, pytest.raises(ConfigError, match=message):
            judge(run, endpoint.url, "--yes", *words)
        assert endpoint.requests == []


EXPENSIVE = {
    "model": "judge-0125",
    "choices": [{"message": {"content": "{'pred': 'yes', 'score': 5}"}}],
    "usage": {"prompt_tokens": 900, "completion_tokens": 100},
}


class Terminal:
    def isatty(self) -> bool:
        return True


def test_runs_that_cannot_be_judged(run):
    with running(by_script) as endpoint:
        with pytest.raises(ManifestError, match="holds no run"):
            judge(run.parent, endpoint.url, "--yes")
        lines = (run / "samples.jsonl").read_text()
        (run / "samples.jsonl").write_text(lines + lines.splitlines()[0] + "\n")
        with pytest.raises(ManifestError, match="stands there more than once"):
            judge(run, endpoint.url, "--yes")
        record = record_of(run)
        renamed = copy.deepcopy(record) | {"tasks": {"pope": record["tasks"][MSVD]}}
        (run / "run.json").write_text(json.dumps(renamed))
        (run / "samples.jsonl").write_text(lines.replace(MSVD, "pope").replace(TGIF, "pope"))
        with pytest.raises(ConfigError, match=r"none of its tasks \(pope\) is scored by this judge"):
            judge(run, endpoint.url, "--yes")
    assert endpoint.requests == []


def test_the_key_is_nowhere(run, capsys):
    def tells(request, number):
        return Answer(by_script(request, number).text + f" your key is {KEY}")

    with running(tells) as endpoint:
        assert cli.main(["judge", str(run), "--model", "judge", "--base-url", endpoint.url, "--yes"]) == 0
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err
    files = [path for path in run.parent.rglob("*") if path.is_file()]
    assert len(files) >= 3 and all(KEY.encode() not in path.read_bytes() for path in files)
    assert "your key is ***" in rows_of(run)[MSVD, 0]["judge"]["reply"]


def test_without_a_key_openai_is_not_asked(run, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert cli.main(["judge", str(run), "--yes"]) == 2
    assert "wants a key: set the environment variable OPENAI_API_KEY" in capsys.readouterr().err


def body(text: object, **change: object) -> str:
    """A completion with fields of one's own; JSON escapes what UTF-8 cannot hold."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 200, "completion_tokens": 10}
    return json.dumps({"object": "chat.completion", "model": "judge-1", "choices": [choice], "usage": usage} | change)


def as_json(text: str) -> Answer:
    return Answer(body=text, headers={"Content-Type": "application/json"})


UNUSUAL = "a\u2028b\u2029c\x85d\x0be\x1cf\x00g\ud83dh"


def test_no_reply_and_no_answer_makes_a_run_unreadable(run):
    """Line ends of Python's and half a surrogate pair: in the reply, the model's name, the answer and the question."""
    path = run / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    path.write_text("".join(json.dumps(r | {"answer": r["answer"] + UNUSUAL}, ensure_ascii=True) + "\n" for r in rows))
    reply = as_json(body(f"{{'pred': 'yes', 'score': 5}}{UNUSUAL}", model=f"judge{UNUSUAL}"))
    with running(lambda request, number: reply) as endpoint:
        code, _ = judge(run, endpoint.url, "--yes")
        assert code == 0
        again, _ = judge(run, endpoint.url, "--yes", "--overwrite")  # reads what it wrote, replies from the cache
        assert again == 0 and len(endpoint.requests) == 6
    kept = read_samples(run)[MSVD][0]
    assert kept["answer"].endswith(UNUSUAL)
    assert kept["judge"]["reply"].endswith(UNUSUAL.replace("\ud83d", "\N{REPLACEMENT CHARACTER}"))


def test_the_key_is_in_no_file_whatever_the_endpoint_repeats(run, tmp_path):
    replies = [body(f"{{'pred': 'yes', 'score': 5}} {KEY}", model=f"judge {KEY}"), body("no idea", model=KEY)]
    replies += [json.dumps({"error": KEY}), f"<{KEY}>", body([KEY]), body(None, model=[KEY])]
    with running(lambda request, number: as_json(replies[number % len(replies)])) as endpoint:
        _, shown = judge(run, endpoint.url, "--yes", "--workers", "1")
    assert KEY not in shown
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) >= 3 and not [file for file in files if KEY.encode() in file.read_bytes()]
    assert "judge ***" in (run / "run.json").read_text()


@pytest.mark.parametrize("where", ["--base-url", "--model"])
def test_the_key_is_no_part_of_what_is_recorded(run, where):
    words = [where, f"http://localhost/{KEY}/v1" if where == "--base-url" else f"judge-{KEY}"]
    with pytest.raises(ConfigError, match="must not hold the key") as raised:
        judge(run, "http://localhost/v1", "--yes", *words)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        "many",
        [1],
        7,
        {},
        {"prompt_tokens": "200", "completion_tokens": None},
        {"prompt_tokens": -5000, "completion_tokens": -1},
        {"prompt_tokens": float("nan"), "completion_tokens": float("inf")},
        {"prompt_tokens": True, "completion_tokens": {}},
        {"prompt_tokens": [3], "completion_tokens": 10**30},
    ],
    ids=str,
)
def test_usage_that_is_no_number_is_taken_as_not_told(run, usage):
    """The reply was paid: it counts, and the meter has our own estimate."""
    with running(lambda request, number: as_json(body("{'pred': 'yes', 'score': 5}", usage=usage))) as endpoint:
        code, shown = judge(run, endpoint.url, "--yes", "--price-in", "1", "--price-out", "1")
    assert code == 0 and record_of(run)["judge"][MSVD]["num_judged"] == 4
    sent, received = re.search(r"([\d,]+) tokens sent, ([\d,]+) came back", shown).groups()
    assert int(sent.replace(",", "")) > 6 * 50 and int(received) == 6 * 20


def test_only_what_is_kept_is_said_to_be_kept(run):
    with (
        running(lambda request, number: Answer("I cannot say.")) as endpoint,
        pytest.raises(JudgeError, match=r"0 of 6 answers .* are judged and kept"),
    ):
        judge(run, endpoint.url, "--yes", "--workers", "1")


def test_a_pause_without_end_is_refused_and_named(run):
    slow = Answer(status=429, body="slow down", headers={"Retry-After": "99999999"})
    with (
        running(lambda request, number: slow) as endpoint,
        pytest.raises(JudgeError, match=r"HTTP 429 slow down; it asks for a pause of 99999999 \(Retry-After\)"),
    ):
        judge(run, endpoint.url, "--yes")


def test_a_run_that_another_process_writes(run):
    before = (run / "run.json").read_bytes()
    with (
        running(by_script) as endpoint,
        held(run),
        pytest.raises(RunExistsError, match="writes there at this moment"),
    ):
        judge(run, endpoint.url, "--yes")
    assert endpoint.requests == [] and (run / "run.json").read_bytes() == before


def test_a_task_named_twice(run):
    with pytest.raises(ConfigError, match=rf"--tasks: {MSVD} named more than once"):
        judge(run, "http://127.0.0.1:1/v1", "--yes", "--tasks", f"{MSVD},{MSVD}")


@pytest.mark.parametrize(
    "change",
    [
        {"doc_id": ...},
        {"question": None},
        {"scores": []},
        {"scores": ...},
        {"filter_index": "0"},
        {"target": ...},
        {"answer": ...},
    ],
    ids=str,
)
def test_an_answer_of_another_shape_is_named(run, change):
    path = run / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    for key, value in change.items():
        rows[0] = {k: v for k, v in rows[0].items() if k != key} | ({} if value is ... else {key: value})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ManifestError, match=rf"samples\.jsonl: an answer of .* has no usable {next(iter(change))}"):
        judge(run, "http://127.0.0.1:1/v1", "--yes")

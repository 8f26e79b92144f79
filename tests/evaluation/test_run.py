"""evaluate(): scores known by hand, a real tiny model, records, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tests.writing import held

import vzip
import vzip.errors
from vzip.errors import ConfigError, RunExistsError, UnsupportedModelError
from vzip.evaluation.run import evaluate
from vzip.results import record as reading
from vzip.results.token_count import TokenCountError


def question_in(prompt: str) -> str:
    return prompt.removeprefix("USER: ").replace("<image>\n", "").split(" ASSISTANT:")[0]


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


@pytest.fixture
def run_of(tmp_path: Path, include_path: Path) -> Callable[..., dict[str, Any]]:
    def run(vlm: Any, tasks: list[str], name: str = "run", **kwargs: Any) -> dict[str, Any]:
        settings = {"include_path": include_path, "progress": False, **kwargs}
        return evaluate(vlm, tasks=tasks, run_dir=tmp_path / name, **settings)

    return run


class TestScores:
    def test_all_right(self, run_of, scripted, answers, tmp_path):
        vlm = scripted(lambda prompt: answers[question_in(prompt)])
        record = run_of(vlm, ["own_exact", "own_yesno", "own_text"])
        for task in ("own_exact", "own_yesno", "own_text"):
            entry = record["tasks"][task]
            assert entry["metrics"]["exact_match"]["value"] == 1.0
            assert (entry["primary_metric"], entry["num_samples"]) == ("exact_match", 4)

    def test_three_of_four_and_its_error(self, run_of, scripted, answers, tmp_path):
        vlm = scripted(lambda prompt: "blue" if "color" in prompt else answers[question_in(prompt)])
        record = run_of(vlm, ["own_exact"])
        score = record["tasks"]["own_exact"]["metrics"]["exact_match"]
        assert score["value"] == 0.75
        # Scores 0 1 1 1: sample standard deviation 0.5, over the root of 4.
        assert score["standard_error"] == pytest.approx(0.25)
        rows = samples(tmp_path / "run")
        assert [row["scores"]["exact_match"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
        assert [row["answer"] for row in rows] == ["blue", "dog", "3", "on the left"]
        assert rows[0]["prompt"] == "USER: <image>\nwhat color? ASSISTANT:"
        assert (rows[0]["question"], rows[0]["target"]) == ("what color?", "red")
        assert [row["num_visual_tokens"] for row in rows] == [[7]] * 4

    def test_until_cuts_the_answer(self, run_of, scripted, answers):
        vlm = scripted(lambda prompt: answers[question_in(prompt)] + ". And more")
        assert run_of(vlm, ["own_yesno"])["tasks"]["own_yesno"]["metrics"]["exact_match"]["value"] == 1.0
        again = run_of(vlm, ["own_yesno"], "again", gen_kwargs={"until": ["never"]})
        assert again["tasks"]["own_yesno"]["metrics"]["exact_match"]["value"] == 0.0

    def test_questions_without_an_image(self, run_of, scripted, answers, tmp_path):
        record = run_of(scripted(lambda prompt: answers[question_in(prompt)]), ["own_text"])
        assert record["visual_tokens"] == {
            "budget_per_crop": 7,
            "measured_min": None,
            "measured_max": None,
            "num_images": 0,
        }
        assert [row["num_visual_tokens"] for row in samples(tmp_path / "run")] == [[]] * 4


class TestBatches:
    def test_grouped_by_generation_settings(self, run_of, scripted, answers):
        vlm = scripted(lambda prompt: answers[question_in(prompt)])
        run_of(vlm, ["own_exact", "own_yesno"], batch_size=3)
        sizes = [(size, kwargs["max_new_tokens"]) for size, kwargs in vlm.batches]
        assert sorted(sizes) == [(1, 3), (1, 4), (3, 3), (3, 4)]
        assert all(kwargs["do_sample"] is False and "temperature" not in kwargs for _, kwargs in vlm.batches)

    def test_overrides_win(self, run_of, scripted, answers):
        vlm = scripted(lambda prompt: answers[question_in(prompt)])
        run_of(vlm, ["own_exact"], gen_kwargs={"max_new_tokens": 9, "num_beams": None})
        assert {kwargs["max_new_tokens"] for _, kwargs in vlm.batches} == {9}
        assert not any("num_beams" in kwargs for _, kwargs in vlm.batches)

    def test_batch_size_does_not_change_the_answers(self, run_of, vlm, tmp_path):
        for size in (1, 3, 4):
            run_of(vlm, ["own_exact", "own_yesno", "own_text"], str(size), batch_size=size)
        one = samples(tmp_path / "1")
        assert len({row["answer"] for row in one}) > 1, "all answers equal: the test could not fail"
        assert samples(tmp_path / "3") == one
        assert samples(tmp_path / "4") == one


class TestRealModel:
    def test_equals_generating_by_hand(self, run_of, vlm, tmp_path, processor, include_path):
        run_of(vlm, ["own_exact"])
        rows = samples(tmp_path / "run")
        docs = datasets.Dataset.from_parquet(str(include_path / "exact.parquet"))
        for row, doc in zip(rows, docs, strict=True):
            inputs = vlm.build_inputs([f"USER: <image>\n{doc['question']} ASSISTANT:"], [[doc["image"]]])
            tokens = vlm.generate(**inputs, max_new_tokens=4, do_sample=False)
            text = processor.tokenizer.decode(tokens[0], skip_special_tokens=True)
            assert row["answer"] == text.split("\n\n")[0].strip()

    @pytest.mark.parametrize(
        ("compressor", "tokens"),
        [
            (vzip.Identity(), 16),
            (vzip.VisionZip(vzip.TokenBudget(5, 2)), 7),
            (vzip.RandomTokens(vzip.TokenBudget(3, 1), seed=1), 4),
        ],
    )
    def test_measured_tokens(self, run_of, vlm, compressor, tokens):
        vlm.compressor = compressor
        record = run_of(vlm, ["own_exact"])
        assert record["visual_tokens"]["measured_min"] == record["visual_tokens"]["measured_max"] == tokens
        assert record["visual_tokens"]["num_images"] == 4
        assert record["compressor"]["num_tokens"] == (None if tokens == 16 else tokens)

    def test_the_model_survives(self, run_of, vlm):
        first = run_of(vlm, ["own_exact"])
        second = run_of(vlm, ["own_exact"], "again")
        assert first["tasks"] == second["tasks"]


class TestRefusals:
    def test_exceptions_propagate(self, run_of, scripted, tmp_path):
        def fail(prompt: str) -> str:
            raise ZeroDivisionError("inside generate")

        with pytest.raises(ZeroDivisionError, match="inside generate"):
            run_of(scripted(fail), ["own_exact"])
        assert not (tmp_path / "run" / "run.json").exists()

    def test_a_wrong_count_ends_the_run(self, run_of, scripted, answers, tmp_path):
        vlm = scripted(lambda prompt: answers[question_in(prompt)], measured=16)
        with pytest.raises(TokenCountError, match=r"should pass \[7\].*measured \[16\]"):
            run_of(vlm, ["own_exact"])
        assert not (tmp_path / "run" / "run.json").exists()

    def test_never_overwrites_unless_told(self, run_of, scripted, answers, tmp_path):
        vlm = scripted(lambda prompt: answers[question_in(prompt)])
        run_of(vlm, ["own_exact"])
        before = (tmp_path / "run" / "run.json").read_bytes()
        asked = len(vlm.prompts)
        with pytest.raises(RunExistsError, match="overwrite=true"):
            run_of(vlm, ["own_exact"])
        assert (tmp_path / "run" / "run.json").read_bytes() == before and len(vlm.prompts) == asked
        run_of(vlm, ["own_yesno"], overwrite=True)
        assert list(json.loads((tmp_path / "run" / "run.json").read_text())["tasks"]) == ["own_yesno"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tasks": []}, "at least one task"),
            ({"tasks": "own_exact"}, "must be a list"),
            ({"tasks": ["own_exact", "own_exact"]}, "more than once"),
            ({"limit": 0}, "limit=0"),
            ({"limit": 0.5}, "limit=0.5"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"seed": -1}, "seed=-1"),
            ({"gen_kwargs": {"max_new_token": 3}}, "did you mean 'max_new_tokens'"),
            ({"include_path": "/nowhere"}, "no such folder"),
        ],
    )
    def test_bad_arguments_write_nothing(self, scripted, include_path, tmp_path, change, message):
        settings = {"tasks": ["own_exact"], "include_path": include_path} | change
        with pytest.raises(ConfigError, match=message):
            evaluate(scripted(lambda prompt: ""), run_dir=tmp_path / "run", **settings)
        assert not (tmp_path / "run").exists()

    def test_unknown_task_names_the_nearest(self, run_of, scripted, tmp_path):
        vlm = scripted(lambda prompt: "")
        with pytest.raises(ConfigError, match=r"'own_exakt' is not known \(did you mean 'own_exact'\?\)"):
            run_of(vlm, ["own_exakt"])
        with pytest.raises(ConfigError, match=r"'popes' is not known \(did you mean 'pope'\?\)"):
            run_of(vlm, ["popes"], include_path=None)
        assert not (tmp_path / "run").exists() and not vlm.prompts

    def test_likelihood_tasks(self, run_of, scripted):
        with pytest.raises(UnsupportedModelError, match="seedbench_ppl has output_type multiple_choice"):
            run_of(scripted(lambda prompt: ""), ["seedbench_ppl"], include_path=None)

    def test_a_name_lmms_eval_has_already(self, run_of, scripted, include_path, tmp_path):
        folder = tmp_path / "own"
        folder.mkdir()
        (folder / "pope.yaml").write_text("task: pope\noutput_type: generate_until\n")
        with pytest.raises(ConfigError, match="name of a built-in task"):
            run_of(scripted(lambda prompt: ""), ["pope", "gqa"], include_path=folder)

    def test_the_placeholder_in_a_question(self, run_of, scripted, include_path, tmp_path):
        folder = tmp_path / "own"
        folder.mkdir()
        (folder / "data.jsonl").write_text('{"question": "what is <image> ?", "answer": "x"}\n')
        (folder / "own.yaml").write_text(
            f"task: own_marker\noutput_type: generate_until\ntest_split: test\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\n"
            "doc_to_text: question\ndoc_to_target: answer\n"
            "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
        )
        with pytest.raises(vzip.errors.PromptError, match="own_marker, question 0"):
            run_of(scripted(lambda prompt: ""), ["own_marker"], include_path=folder)


class TestRecord:
    def test_complete(self, run_of, vlm, tmp_path, include_path):
        config = {"recipe": "mine", "budget": {"num_dominant": 5}}
        record = run_of(vlm, ["own_exact"], batch_size=2, seed=3, resolved_config=config)
        assert json.loads((tmp_path / "run" / "run.json").read_text()) == record
        assert record["config"] == config and record["seed"] == 3 and record["batch_size"] == 2
        assert record["model"]["class"] == "LlavaForConditionalGeneration"
        assert record["model"]["num_parameters"] == vlm.model.num_parameters()
        assert record["model"]["dtype"] == "float32" and record["model"]["preprocess"] == "llava"
        assert record["compressor"]["name"] == "VisionZip" and "merge_rule='sum'" in record["compressor"]["settings"]
        assert record["versions"]["lmms-eval"] == "0.7.3" and record["versions"]["torch"]
        assert record["wall_time_s"] > 0 and 0.1 < record["peak_memory_gib"]["process"] < 100
        assert record["hardware"]["num_cpu_cores"] >= 1 and record["hardware"]["memory_gib"] > 0
        data = record["data"]["own_exact"]
        assert data["num_rows"] == 4 and data["split"] == "test"
        import hashlib

        file = include_path / "exact.parquet"
        assert data["files_sha256"] == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
        assert len(record["code"]["commit"]) == 40
        missing = {"accelerate", "peft", "bitsandbytes", "av", "datasets"} - record["versions"].keys()
        assert not missing and len(record["hardware"]["gpus"]) == len(record["hardware"]["gpu_memory_gib"])
        undocumented = [name for name in record if f"``{name}``" not in (reading.__doc__ or "")]
        assert undocumented == [], "say what it is in vzip.results.record"

    def test_a_pruner_and_what_was_measured_of_it(self, run_of, vlm, tmp_path):
        vlm.compressor, vlm.pruner = vzip.Identity(), vzip.FastV(1, 0.25)
        record = run_of(vlm, ["own_exact"], batch_size=3)
        pruner = record["pruner"]
        assert (pruner["name"], pruner["settings"]) == ("FastV", "FastV(K=1, keep=0.25, pooled=False)")
        assert pruner["schedule"] == {"least": [16, 4], "most": [16, 4]}
        assert (pruner["average_min"], pruner["average_max"]) == (10.0, 10.0) == reading.visual_tokens_of(record)
        assert [first - second for first, second in pruner["cache_lengths"].values()] == [12, 12]
        assert record["visual_tokens"]["measured_max"] == 16
        assert reading.method_of(record) == "Identity+FastV" and not reading.is_vanilla(record)
        vlm.pruner = None
        vanilla = run_of(vlm, ["own_exact"], "vanilla")
        assert vanilla["pruner"] is None and reading.is_vanilla_of(vanilla, record)
        assert not reading.is_vanilla_of(record, vanilla) and reading.visual_tokens_of(vanilla) == (16, 16)

    def test_no_leftovers(self, run_of, scripted, answers, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        run_of(scripted(lambda prompt: answers[question_in(prompt)]), ["own_exact"])
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
            "lmms_eval.log",
            "run.json",
            "samples.jsonl",
        ]
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    def test_limit_makes_it_provisional(self, run_of, scripted, answers, tmp_path):
        record = run_of(scripted(lambda prompt: answers[question_in(prompt)]), ["own_exact"], limit=2)
        assert record["provisional"] and "limit=2" in record["provisional_reasons"][0]
        assert record["tasks"]["own_exact"]["num_samples"] == len(samples(tmp_path / "run")) == 2

    @pytest.mark.parametrize(
        ("state", "word"), [((None, None), "not run from a checkout"), (("a" * 40, True), "not committed")]
    )
    def test_code_state_makes_it_provisional(self, run_of, scripted, answers, monkeypatch, state, word):
        from vzip.results import provenance

        monkeypatch.setattr(provenance, "code_state", lambda: {"commit": state[0], "dirty": state[1]})
        record = run_of(scripted(lambda prompt: answers[question_in(prompt)]), ["own_exact"])
        assert record["provisional"] and word in record["provisional_reasons"][0]

    def test_clean_and_whole_is_not(self, run_of, scripted, answers, monkeypatch):
        from vzip.results import provenance

        monkeypatch.setattr(provenance, "code_state", lambda: {"commit": "a" * 40, "dirty": False})
        record = run_of(scripted(lambda prompt: answers[question_in(prompt)]), ["own_exact"])
        assert record["provisional"] is False and record["provisional_reasons"] == []

    def test_system_prompt(self, run_of, scripted, answers):
        vlm = scripted(lambda prompt: "")
        record = run_of(vlm, ["own_exact"], system_prompt="Be brief.")
        assert vlm.prompts[0] == "SYSTEM: Be brief. USER: <image>\nwhat color? ASSISTANT:"
        assert record["system_prompt"] == "Be brief."


class TestResume:
    def test_goes_on_where_it_stopped(self, run_of, scripted, answers, tmp_path, capfd):
        def until_the_third(prompt: str) -> str:
            if "how many" in prompt:
                raise KeyboardInterrupt
            return answers[question_in(prompt)]

        with pytest.raises(KeyboardInterrupt, match=r"^2 of 4 answers are kept in .*run$"):
            run_of(scripted(until_the_third), ["own_exact"])
        assert (tmp_path / "run" / "answers.partial.jsonl").exists()
        vlm = scripted(lambda prompt: answers[question_in(prompt)])
        record = run_of(vlm, ["own_exact"], progress=True)
        told = capfd.readouterr().err
        assert "2 of 4 answers kept from the interrupted run" in told and "answering: 4 of 4 questions (100 %)" in told
        assert [question_in(prompt) for prompt in vlm.prompts] == ["how many?", "where?"]
        assert record["num_resumed_answers"] == 2
        assert record["tasks"]["own_exact"]["metrics"]["exact_match"]["value"] == 1.0
        assert record["visual_tokens"]["num_images"] == 4
        assert not (tmp_path / "run" / "answers.partial.jsonl").exists()

    def test_not_from_other_settings(self, run_of, scripted, answers):
        def fail_late(prompt: str) -> str:
            if "where" in prompt:
                raise KeyboardInterrupt
            return "wrong"

        with pytest.raises(KeyboardInterrupt):
            run_of(scripted(fail_late), ["own_exact"])
        vlm = scripted(lambda prompt: answers[question_in(prompt)])
        vlm.compressor = vzip.VisionZip(vzip.TokenBudget(4, 3))
        record = run_of(vlm, ["own_exact"])
        assert len(vlm.prompts) == 4 and record["num_resumed_answers"] == 0

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_directory_that_another_process_writes(self, run_of, scripted, tmp_path, overwrite):
        vlm = scripted(lambda prompt: "")
        with held(tmp_path / "run"), pytest.raises(RunExistsError, match="writes there at this moment"):
            run_of(vlm, ["own_exact"], overwrite=overwrite)
        assert not vlm.prompts and [path.name for path in (tmp_path / "run").iterdir()] == [".owner"]

"""A model names its own evaluation and budget; a recipe's and the command line's win."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from tests.config.kit import script

from vzip.config.build import chat_plan, resolved
from vzip.config.options import config_dir, option_values, options
from vzip.evaluation.benchmarks.judged import JUDGED_TASKS

# The words -> evaluation, budget.
CASES = {
    (): ("scenes", "64tok"),
    ("model=tiny",): ("scenes", "64tok"),
    ("model=llava15_7b",): ("paper_no_judge", "64tok"),
    ("model=llava15_13b",): ("paper_no_judge", "64tok"),
    ("model=llava_next_7b",): ("paper_no_judge", "32tok"),
    ("model=llava_next_13b",): ("paper_no_judge", "32tok"),
    ("model=llava_next_mistral_7b",): ("paper_no_judge", "32tok"),
    ("model=mini_gemini_7b",): ("paper_no_judge", "64tok"),
    ("model=mini_gemini_13b",): ("paper_no_judge", "64tok"),
    ("model=video_llava_7b",): ("paper_video", "17tok"),
    ("model=video_llava_7b_hf",): ("paper_video", "17tok"),
    ("model=qwen2_5_vl_3b",): ("paper_no_judge", "128tok"),
    ("model=qwen2_5_vl_7b",): ("paper_no_judge", "128tok"),
    ("model=qwen3_vl_2b",): ("paper_no_judge", "128tok"),
    ("model=qwen3_vl_4b",): ("paper_no_judge", "128tok"),
    ("model=qwen3_vl_8b",): ("paper_no_judge", "128tok"),
    ("model=llava_onevision_0_5b",): ("paper_no_judge", "64tok"),
    ("model=llava_onevision_7b",): ("paper_no_judge", "64tok"),
    ("model=llava_video_7b",): ("paper_no_judge", "64tok"),
    ("model=internvl3_1b",): ("paper_no_judge", "64tok"),
    ("model=internvl3_2b",): ("paper_no_judge", "64tok"),
    ("model=internvl3_8b",): ("paper_no_judge", "64tok"),
    ("model=llava_local", "model.name_or_path=org/mine"): ("paper_no_judge", "64tok"),
    ("model=llava_next_13b", "eval=quick"): ("quick", "32tok"),
    ("eval=ocr", "budget=64tok", "model=llava_next_13b"): ("ocr", "64tok"),
    ("model=llava_next_7b", "compressor=none", "budget=full"): ("paper_no_judge", "full"),
    ("+exp=llava_next_7b_640tok",): ("paper_image", "128tok"),
    ("+exp=llava_next_7b_640tok_tuned",): ("paper_image", "128tok"),
    ("+exp=llava15_7b_64tok_split",): ("quick", "64tok"),
    ("+exp=llava15_7b_64tok", "model=llava_next_7b"): ("paper_image", "64tok"),
    ("+exp=llava15_7b_64tok", "model=tiny", "eval=scenes"): ("scenes", "64tok"),
    ("+exp=llava15_7b_64tok", "budget=192tok"): ("paper_image", "192tok"),
}


@pytest.fixture
def hydra_folder() -> Iterator[None]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield


@pytest.mark.parametrize("primary", ["eval", "train"])
@pytest.mark.parametrize("words", list(CASES), ids=" ".join)
def test_whose_word_counts(words: tuple[str, ...], primary: str, hydra_folder: None) -> None:
    config = resolved(compose(primary, list(words)))
    assert (config["eval"]["name"], config["budget"]["name"]) == CASES[words]
    assert not {"defaults", "eval", "budget"} & set(config["model"]), "what a model overrides is not a setting of it"
    assert "defaults" not in config["eval"] and set(config["eval"]) == set(option_values(config_dir(), "eval", "quick"))


def test_every_model_is_among_the_cases() -> None:
    named = {word.removeprefix("model=") for words in CASES for word in words if word.startswith("model=")}
    assert set(options(config_dir(), "model")) - {"llava15_7b_untuned"} == named


def test_no_judge_is_the_papers_without_those_that_need_one() -> None:
    own, paper = (option_values(config_dir(), "eval", name) for name in ("paper_no_judge", "paper_image"))
    assert own["tasks"] == [task for task in paper["tasks"] if task not in JUDGED_TASKS]
    assert {key: own[key] for key in own if key not in ("name", "tasks")} == {
        key: paper[key] for key in paper if key not in ("name", "tasks")
    }


def test_asking_and_chatting_take_the_models_budget() -> None:
    _, compressor, prompt = chat_plan(["model=llava_next_7b"])
    assert compressor.budget.num_tokens == 32  # type: ignore[attr-defined]  # VisionZip's
    assert prompt is not None and prompt.startswith("A chat between")
    assert chat_plan(["model=video_llava_7b", "budget=64tok"])[1].budget.num_tokens == 64  # type: ignore[attr-defined]


def test_each_job_of_a_sweep_takes_its_own_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py", "-m", "model=tiny,llava_next_7b,llava15_13b", "dry_run=true"])
    script("eval").main()
    said = [line for line in capfd.readouterr().err.splitlines() if "runs/" in line]
    assert len(said) == 3, "one line a job"
    for line, part in zip(
        said, ("scenes/tiny/visionzip-64", "no_judge/llava_next_7b/visionzip-32", "13b/vis"), strict=True
    ):
        assert part in line
    assert list(tmp_path.iterdir()) == [], "a dry sweep leaves nothing"

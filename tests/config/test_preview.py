"""What eval.py says before it loads anything, and dry_run=true, which stops there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tests.config.kit import Run

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("needs lmms-eval", allow_module_level=True)

PLANS = {
    "model=llava_next_13b": [
        "llava_next_13b (llava-hf/llava-v1.6-vicuna-13b-hf)",
        "visionzip, 27 dominant + 5 contextual tokens a crop",
        "160 = 5 crops x 32 an image, of up to 2,880",
        "10 with about 275,085 questions: gqa 12,578,",
        "judge          not needed",
        "record         runs/paper_no_judge/llava_next_13b/visionzip-32tok/seed0/run.json",
    ],
    "model=llava15_7b eval=quick": [
        "64 of 576 an image",
        "4 with 2,000 questions: gqa 500, pope_splits 500, scienceqa_overall 500, textvqa_val_ocr 500",
    ],
    "model=llava_next_7b compressor=none budget=full": [
        "none, every visual token",
        "up to 2,880 = 5 crops x 576 an image",
    ],
    "+exp=llava15_7b_fastv_64tok": [
        "none+fastv_keep-30, every visual token enters the language model",
        "FastV(K=2, keep=30, pooled=False): 64.1 an image on average over the layers",
        "record         runs/paper_image/llava15_7b_fastv_64tok/none+fastv_keep-30-full/seed0/run.json",
    ],
    "pruner=fastv pruner.keep=0.25": ["FastV(K=2, keep=0.25, pooled=False): 35.2 an image on average over the layers"],
    "pruner=sparsevlm pruner.layers=[0,2] pruner.keep=[20,10]": [
        "SparseVLM(layers=(0, 2), keep=(20, 10), seed=0): 26.0 an image on average over the layers"
    ],
    "+exp=llava15_7b_sparsevlm_64tok": [
        "SparseVLMByRank(layers=(2, 6, 15, 19), scale=0.8, bias=0.0, seed=0)\n",
        "record         runs/paper_image/llava15_7b_sparsevlm_64tok/none+sparsevlm_v10-full/seed0/run.json",
    ],
    "model=llava_next_7b pruner=fastv": ["FastV(K=2, keep=0.5, pooled=False)\n"],
    "+exp=llava15_7b_128tok launcher=ddp": [
        "128 of 576 an image",
        "scores mmvet_direct, llava_bench_wild afterwards",
        "python -m vzip judge runs/paper_image/llava15_7b_128tok/visionzip-128tok/seed0",
        "not on this machine: launcher.",
    ],
    "+exp=video_llava_7b_choice_64frames eval.tasks=[nextqa_mc_test]": [
        "2,048 = 64 frames x 32, of 16,448 a video",
        "judge          not needed",
    ],
    # 27 x 27 patches, pooled to 14 x 14; 10 crops of an image, not 64
    "model=llava_video_7b eval=video_choice eval.tasks=[nextqa_mc_test]": [
        "4,097 of 12,545 a video of 64 frames; 640 = 10 crops x 64 an image, of up to 7,290",
    ],
    "model=llava_onevision_7b eval=video_choice eval.tasks=[nextqa_mc_test] compressor=none budget=full": [
        "visual tokens  6,273 a video of 32 frames; up to 7,290 = 10 crops x 729 an image"
    ],
    "model=qwen2_5_vl_3b eval=video_choice eval.tasks=[nextqa_mc_test]": [
        "up to 128 of an image's (a video: each temporal step's), which vary"
    ],
    "model=qwen2_5_vl_3b budget=fraction budget.dominant=0.65 budget.contextual=0.05": [
        "visionzip, 65 % of the patches of a crop dominant + 5 % contextual",
        "70 % of an image's",
        "record         runs/paper_no_judge/qwen2_5_vl_3b/visionzip-0.65+0.05/seed0/run.json",
    ],
    "": ["tiny (vzip/tiny)", "4 with 1,600 questions: scenes_existence 400", "runs/scenes/tiny/"],
    "eval.tasks=[scenes_reading] eval.limit=7 model=mini_gemini_7b eval=scenes": ["1 with 7 questions"],
    "model=llava_local model.name_or_path=org/unknown": ["64 of each crop; how many there are, its config.json"],
}


@pytest.mark.parametrize("words", list(PLANS))
def test_a_dry_run_tells_the_plan_and_leaves_nothing(words: str, run: Run, tmp_path: Path) -> None:
    code, said = run("dry_run=true", *words.split())
    assert code == 0, said
    for part in PLANS[words]:
        assert part in said
    assert said.count("the plan:") == 1 and "dry_run=true: checked" in said
    assert len(said.split("the plan:")[1].splitlines()) <= 14
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_the_run_would(run: Run, tmp_path: Path) -> None:
    code, said = run("dry_run=true", "model=video_llava_7b")
    assert code == 2 and "136 = 8 frames x 17, of 2,056 a video" in said and "paths.video_root=null" in said
    assert "at least 93,977 questions: tgif_qa_zero_shot unknown" in said
    code, said = run("dry_run=true", "eval.tasks=[mme]", "eval.include_path=null", "eval.limit=3")
    assert code == 2 and "must be a multiple of 2" in said
    record = tmp_path / "runs/scenes/tiny/visionzip-64tok/seed0/run.json"
    record.parent.mkdir(parents=True)
    record.write_text("kept")
    code, said = run("dry_run=true")
    assert code == 2 and "already holds a record" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model=qwen3_vl_8b pruner=sparsevlm pruner.layers=[1,6,15]", "Cut at layer 3 or later"),
        ("model=qwen2_5_vl_7b pruner=fastv compressor=none budget=64tok", "vary in their visual tokens"),
        ("model=qwen3_vl_2b compressor=flowcut", "compressor=FlowCut drops patches inside the vision tower"),
        ("model=qwen2_5_vl_7b compressor=resized", "its images have any size; give smaller ones"),
        ("model=qwen3_vl_8b model.num_frames=4 model.fps=1", "set one of them"),
        ("model=llava15_7b model.fps=1", "has no video tower and takes images only"),
        ("model=llava15_7b budget.scope=video", "one budget for all frames of a video"),
        ("model=qwen2_5_vl_3b model.preprocess=llava", "must be one of hf"),
        ("model=llava_next_7b eval=video_choice", "takes no videos as files, and videomme_frames, egoschema_subset,"),
        ("model=llava15_7b pruner=fastv model.compile=[decode]", "a pruner drops tokens through hooks"),
        ("model=qwen3_vl_2b model.compile=[prefill]", "takes rows of the vision tower at deeper layers"),
        (
            "model=llava15_7b model.positions=original model.attn_implementation=flash_attention_2",
            "flash attention reads a gap",
        ),
    ],
)
def test_a_published_familys_refusals_need_no_checkpoint(words: str, message: str, run: Run) -> None:
    code, said = run("dry_run=true", *words.split())
    assert code == 2 and message in said and "the plan:" not in said


def test_tasks_of_ones_own_are_looked_for(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "mine.yaml").write_text("task: mine\ndataset_path: json\noutput_type: generate_until\n")
    code, said = run("dry_run=true", f"eval.include_path={folder}", "eval.tasks=[mine]")
    assert code == 0 and "1 with an unknown number of questions: mine unknown" in said
    code, said = run("dry_run=true", f"eval.include_path={folder}", "eval.tasks=[mines]")
    assert code == 2 and "did you mean 'mine'" in said
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]


def test_of_several_processes_the_first_tells(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    code, said = run("dry_run=true")
    assert code == 0 and "the plan:" not in said


def test_every_task_of_an_evaluation_has_a_count_or_a_reason() -> None:
    from vzip.config.options import config_dir, option_values, options
    from vzip.demo.benchmark import QUESTIONS_PER_TASK, TASK_NAMES
    from vzip.evaluation.benchmarks.question_counts import known_counts, num_questions
    from vzip.evaluation.benchmarks.video_qa import VIDEO_SETS

    known = known_counts()
    for name in options(config_dir(), "eval"):
        assert set(option_values(config_dir(), "eval", name)["tasks"]) <= set(known), name
    for task, entry in known.items():
        assert set(entry) == {"num_questions", "exact", "source"} and entry["source"], task
        assert entry["num_questions"] is not None or not entry["exact"], task
    assert {num_questions(task) for task in TASK_NAMES} == {QUESTIONS_PER_TASK}
    for task, video_set in VIDEO_SETS.items():
        assert video_set.num_questions in (None, num_questions(task))
    assert num_questions("gqa", 500) == 500 and num_questions("llava_bench_wild", 500) == 60
    assert num_questions("mine", 500) is None
    assert json.dumps(known)  # plain data

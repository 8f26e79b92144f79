"""Each wrong setting has one clear message, before any model is loaded, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.config.kit import Run

from vzip.config.run_directory import _safe

MESSAGES = {
    ("eval.limt=3",): ["eval.limt: no such key (did you mean 'eval.limit'?); keys of eval:"],
    ("+eval.limt=3",): ["eval.limt: no such key (did you mean 'eval.limit'?)"],
    ("-m", "budget=32tok,64tok", "--cfg", "job"): [
        "-m with --cfg: the configuration of one job can be shown; leave out -m"
    ],
    ("budgt=64tok",): ["budgt: no such key or group (did you mean 'budget'?)"],
    ("budget=64",): ["budget=64: no such option (did you mean '64tok'?). Available options in 'budget':", "192tok"],
    ("compressor=vision_zip",): ["compressor=vision_zip: no such option (did you mean 'visionzip'?)", "uniform"],
    ("model=llava_next_14b",): [
        "model=llava_next_14b: no such option (did you mean 'llava_next_13b'?). Available options in 'model':",
        "llava15_13b",
        "llava_local",
        "tiny",
    ],
    # What users of the published code ran into: the paper's 640 tokens are of five crops together.
    ("model=llava_next_7b", "budget.num_dominant=540", "budget.num_contextual=100"): [
        "= 640 visual tokens a crop, but the vision tower of model=llava_next_7b produces 577",
        "A budget is for each crop",
        "budget=128tok",
    ],
    ("exp=llava15_7b_64tok",): ["write +exp=NAME"],
    ("+exp=llava15_7b_64",): ["no such option (did you mean 'llava15_7b_64tok'?)"],
    ("visionzip",): ["'visionzip': not a setting; write group=option or key=value."],
    ("eval.tasks=[pope",): ["'eval.tasks=[pope': cannot be read"],
    ("compressor=none",): [
        "compressor=none keeps every visual token, but budget=64tok asks for 54 dominant + 10 contextual: set"
        " budget=full"
    ],
    ("budget=full",): ["compressor=visionzip needs a budget, but budget=full names no counts: set budget=64tok"],
    ("budget.num_dominant=0",): ["budget.num_dominant=0: must be a whole number of tokens a crop, 1 or more"],
    ("budget.num_dominant=-3",): ["budget.num_dominant=-3: must be a whole number of tokens a crop, 1 or more"],
    ("budget.num_dominant=0.5",): ["budget.num_dominant=0.5: must be a whole number of tokens a crop", "not a ratio"],
    ("budget.num_contextual=-1",): ["budget.num_contextual=-1: must be a whole number of tokens a crop, 0 or more"],
    ("budget.num_dominant=true",): ["budget.num_dominant=true: must be a whole number"],
    ("budget.num_dominant=600",): [
        "budget.num_dominant=600 + budget.num_contextual=10 = 610 visual tokens a crop, but the vision tower of"
        " model=tiny produces 577 (CLS included)"
    ],
    ("model.dtype=bf16",): [
        "model.dtype=bf16: must be one of auto, float32, bfloat16, float16 (did you mean 'bfloat16'?)"
    ],
    ("model.quantization=4",): ["model.quantization=4: must be one of 8bit, 4bit, or null"],
    ("model.preprocess=pad",): ["model.preprocess=pad: must be one of llava, hf"],
    ("model.compile=[towr]",): ["must be a list of at least one of tower, prefill, decode, each once"],
    ("model.attn_implementation=flash",): ["must be one of sdpa, eager, flash_attention_2"],
    ("model=llava_local",): ["model.name_or_path: must be given, as model.name_or_path=VALUE"],
    ("model=llava_local", "model.name_or_path=./nowhere"): ["model.name_or_path=./nowhere: no such directory"],
    ("eval.batch_size=0",): ["eval.batch_size=0: must be a whole number, 1 or more"],
    ("eval.limit=0",): ["eval.limit=0: must be a whole number, 1 or more, or null"],
    ("eval.limit=0.5",): ["eval.limit=0.5: must be a whole number"],
    ("eval.tasks=[]",): ["eval.tasks=[]: must be a list of at least one task name"],
    ("eval.tasks=pope",): ["eval.tasks=pope: must be a list of at least one task name, as eval.tasks=[pope,gqa]"],
    ("eval.include_path=nowhere",): ["eval.include_path=nowhere: no such directory"],
    ("+eval.gen_kwargs.max_new_token=5",): ["(did you mean 'eval.gen_kwargs.max_new_tokens'?)"],
    ("eval.gen_kwargs.num_beams=0",): ["eval.gen_kwargs.num_beams=0: must be a whole number, 1 or more, or null"],
    ("compressor.merge_rule=max",): ["merge_rule='max': must be one of sum, mean"],
    ("+compressor.merge_rul=mean",): ["compressor.merge_rul: vzip.VisionZip has no such argument (did you mean"],
    ("compressor.merge_rul=mean",): ["compressor.merge_rul: no such key (did you mean 'compressor.merge_rule'?)"],
    ("compressor._target_=vzip.Nothing",): ["compressor._target_=vzip.Nothing: cannot be imported"],
    ("seed=-1",): ["seed=-1: must be a whole number, 0 or more"],
    ("seed=4294967296",): ["seed=4294967296: must be a whole number, 0 or more and at most 4294967295"],
    ("compressor=random", "compressor.seed=4294967296"): ["compressor.seed=4294967296: must be a whole number, 0 or"],
    ("eval.tasks=[pope,gqa,pope]",): ["eval.tasks=['pope', 'gqa', 'pope']: must be a list of", "each once"],
    ("compressor._target_=os.getcwd",): ["compressor._target_=os.getcwd: is no Compressor; it must be a class"],
    ("compressor._target_=builtins.dict",): ["compressor._target_=builtins.dict: is no Compressor"],
    ("compressor._target_=vzip.FastV",): ["compressor._target_=vzip.FastV: is no Compressor"],
    ("compressor._target_=vzip",): ["compressor._target_=vzip: cannot be imported"],
    ("compressor._target_='..x.y'",): ["compressor._target_=..x.y: cannot be imported"],
    ("pruner=fastv", "pruner._target_=vzip.Identity"): ["pruner._target_=vzip.Identity: is no Pruner"],
    ("train=projector", "train.learning_rate=inf"): ["train.learning_rate=inf: must be a number, 0 or more"],
    ("eval.gen_kwargs.temperature=nan",): ["eval.gen_kwargs.temperature=nan: must be a number, 0 or more"],
    ("model=llava_local", f"model.name_or_path=./{'x' * 300}"): ["no such directory"],
    ("model=llava_local", "model.name_or_path='~nobody-of-this-name/x'"): ["no such directory"],
    ("model.projector=" + "x" * 5000,): ["no such directory"],
    ("eval.include_path=" + "x" * 5000,): ["no such directory"],
    ("overwrite=1",): ["overwrite=1: must be true or false"],
    ("eval.limit=${nowhere}",): ["Interpolation key 'nowhere' not found"],
    ("launcher.num_threads=0",): ["launcher.num_threads=0: must be a whole number, 1 or more, or null"],
    ("model=llava15_7b_untuned",): [
        "CheckpointError: model.name_or_path=checkpoints/llava15_7b_untuned: no such directory.",
        "python scripts/assemble_llava.py openai/clip-vit-large-patch14-336 lmsys/vicuna-7b-v1.5 checkpoints/llava",
    ],
    ("recipe=mine",): ["recipe=mine: no such recipe"],
    ("data=llava_json",): ["data.json: must be given, as data.json=VALUE: a file in LLaVA's format"],
    ("train=projector", "train.parts=[projektor]"): ["train.parts=['projektor']: must be a list of at least one of"],
    ("train=projector", "train.warmup_fraction=3"): ["train.warmup_fraction=3: must be a number from 0 to 1"],
    ("train=projector", "train.lora.r=8"): [
        "train.lora.r: train=projector has no such setting; options of train that have it: projector_lora."
    ],
    ("train.learning_rate=1",): [
        "train.learning_rate: train=none has no such setting; options of train that have it: instruct, instruct_next,",
    ],
    ("data=scenes_dialogues", "data.json=FILE"): ["data.json: data=scenes_dialogues has no such setting; options"],
    ("compressor=uniform", "compressor.merge_rule=mean"): [
        "compressor.merge_rule: compressor=uniform has no such setting; options of compressor that have it:"
    ],
    ("pruner=fastw",): ["pruner=fastw: no such option (did you mean 'fastv'?). Available options in 'pruner':"],
    ("pruner=fastv", "pruner.keep=2.5", "pruner.K=0"): [
        "pruner.keep=2.5: must be a whole number of visual tokens",
        "pruner.K=0: must",
    ],
    ("pruner=fastv", "pruner.K=5"): ["cuts at the input of layer 5, but the language model has the layers 0 to 4"],
    ("pruner=fastv", "+pruner.kep=3"): ["pruner.kep: vzip.FastV has no such argument (did you mean 'keep'?)"],
    ("pruner=fastv", "pruner._target_=vzip.Nothing"): ["cannot be imported", "it must be a class, as vzip.FastV"],
    ("pruner.keep=3",): ["pruner.keep: pruner=none has no such setting; options of pruner that have it: fastv,"],
    ("pruner=pyramiddrop",): ["cuts at the input of layer 8, 16, 24,", "0 to 4", "pruner.K or pruner.layers sets them"],
    ("pruner=vscan_stage2", "pruner.keep=[0]"): ["pruner.keep=[0]: must be whole numbers"],
    ("pruner=sparsevlm", "pruner.layers=[1,0,2]"): ["pruner.layers=[1, 0, 2]: must be whole numbers, 0 or more"],
    ("+pruner.keep=3",): ["pruner.keep: pruner=none has no settings; add pruner=NAME, one of dart, fastv, "],
    ("pruner=3",): ["pruner=3: no such option"],
    ("model.projector=nowhere",): ["model.projector=nowhere: no such directory"],
    ("model.projector=trained",): ["model.projector=trained: train=none trains no projector"],
    ("+exp=tiny_64tok_tuned",): ["visionzip-64tok/seed0/final is not there. Run `python train.py +exp=tiny_64tok"],
}


@pytest.mark.parametrize("words", list(MESSAGES), ids=" ".join)
def test_message(words: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    code, message = run(*words)
    assert code == 2
    for part in MESSAGES[words]:
        assert part in message
    assert "problems in the configuration" not in message, "one slip is one message"
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_all_problems_at_once(run: Run) -> None:
    code, message = run("eval.limt=3", "budgt=x", "model=nope", "model.dtype=bf16", "budget.num_dominant=0", "seed=-1")
    assert code == 2 and "6 problems in the configuration:" in message
    for part in ("eval.limt", "budgt", "model=nope", "model.dtype=bf16", "budget.num_dominant=0", "seed=-1"):
        assert part in message


def test_a_setting_that_one_option_of_a_sweep_lacks(run: Run) -> None:
    code, message = run("-m", "train=projector_lora,projector", "train.lora.r=8", "seed=-1")
    assert code == 2 and "2 problems in the configuration:" in message
    assert "train.lora.r: train=projector has no such setting" in message and "seed=-1" in message


def test_a_sweep_is_judged_before_its_first_job(run: Run, tmp_path: Path) -> None:
    code, message = run("-m", "budget=64tok,full", "compressor=none", "eval.batch_size=1,0")
    assert code == 2 and "2 problems in the configuration:" in message
    assert "compressor=none keeps every visual token" in message and "eval.batch_size=0" in message
    assert list(tmp_path.iterdir()) == []


def test_an_existing_record_is_refused_before_the_model_is_loaded(run: Run, tmp_path: Path) -> None:
    record = tmp_path / "runs/scenes/tiny/visionzip-64tok/seed0/run.json"
    record.parent.mkdir(parents=True)
    record.write_text("kept")
    code, message = run()
    assert code == 2 and message.startswith("RunExistsError: runs/scenes/tiny/visionzip-64tok/seed0 already holds")
    assert "overwrite=true" in message and record.read_text() == "kept"


def test_a_budget_is_held_against_a_local_checkpoints_own_tower(run: Run, tmp_path: Path) -> None:
    # 28 px, patch 14: four patches and CLS. Only the configuration is there, no weights.
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    vision = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "num_hidden_layers": 2}
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    local = ("model=llava_local", f"model.name_or_path={folder}")
    code, message = run(*local)
    assert code == 2 and "64" in message and "budget" in message
    # The same folder gives no complaint about a budget that fits: what stops it then is another error.
    code, message = run(*local, "budget.num_dominant=2", "budget.num_contextual=1", "eval.batch_size=0")
    assert code == 2 and "eval.batch_size=0" in message and "budget" not in message


def test_a_model_class_without_adapter(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    code, message = run("model=llava_local", f"model.name_or_path={folder}")
    assert code == 2 and "Llama" in message and "LlavaForConditionalGeneration" in message


def test_training_says_what_it_cannot_do(run: Run, tmp_path: Path) -> None:
    code, message = run(name="train")
    assert code == 2 and "nothing to train: model=tiny goes with train=none" in message
    code, message = run("train=projector", name="train")
    assert code == 2 and "train=projector needs data to train on, but data=none" in message
    code, message = run("+exp=llava15_7b_64tok_stage1", name="train")
    assert code == 2 and "checkpoints/llava15_7b_untuned: no such directory" in message
    code, message = run("train=projector", "data=scenes_dialogues", "pruner=fastv", name="train")
    assert code == 2 and "pruner=fastv: nothing is dropped inside the language model while it trains" in message
    code, message = run("train=projector", "data=scenes_dialogues", "model.compile=[tower]", name="train")
    assert code == 2 and "model.compile=tower: is of answering" in message
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_cannot_be(run: Run, tmp_path: Path) -> None:
    code, message = run(f"paths.run_dir={tmp_path}/{'x' * 300}")
    assert code == 2 and "longer than a path may be" in message and "Traceback" not in message
    code, message = run(r'model.system_prompt="a\0b"'.replace("\\0", "\0"))
    assert code == 2 and "model.system_prompt" in message and "Traceback" not in message


def test_long_names_of_different_runs_stay_different() -> None:
    names = {_safe("same-" * 30 + end) for end in ("a", "b")}
    assert len(names) == 2 and all(len(name) <= 120 for name in names)

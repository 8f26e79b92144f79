"""`lmms-eval --model vzip --model_args ...`: the registered name, in this process and as a command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager
from scripts import make_random_model

import vzip
from vzip.config import model_args
from vzip.config.options import config_dir, options
from vzip.errors import ConfigError, UnsupportedModelError
from vzip.evaluation.lmms_eval.model import VzipLmms
from vzip.evaluation.lmms_eval.plugin import manifests
from vzip.evaluation.run import evaluate
from vzip.methods import method_files
from vzip.results.record import read_samples


@pytest.fixture
def checkpoint(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_the_entry_point_is_declared():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"vzip": "vzip.evaluation.lmms_eval.plugin:manifests"}


def test_registered_name_equals_instance(checkpoint, include_path, vlm, tmp_path):
    for manifest in manifests():  # what lmms-eval does with the entry point of an installed vzip
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    output = simple_evaluate(
        model="vzip",
        model_args=f"pretrained={checkpoint},compressor=visionzip,num_dominant=5,num_contextual=2,dtype=float32",
        tasks=["own_exact"],
        batch_size=2,
        task_manager=TaskManager(include_path=str(include_path), include_defaults=False),
        verbosity="ERROR",
    )
    evaluate(vlm, tasks=["own_exact"], include_path=include_path, run_dir=tmp_path / "run", progress=False)
    by_instance = {row["doc_id"]: row["answer"] for row in read_samples(tmp_path / "run")["own_exact"]}
    by_name = {sample["doc_id"]: sample["filtered_resps"][0] for sample in output["samples"]["own_exact"]}
    assert by_name == by_instance and len(set(by_name.values())) > 1


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_a_modern_family_in_fractions(family, include_path, tmp_path):
    make_random_model.save(family, tmp_path / "model")
    for manifest in manifests():
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    output = simple_evaluate(
        model="vzip",
        model_args=f"pretrained={tmp_path / 'model'},dominant=0.25,contextual=0.125,dtype=float32",
        tasks=["own_exact"],
        batch_size=2,
        task_manager=TaskManager(include_path=str(include_path), include_defaults=False),
        verbosity="ERROR",
    )
    vlm = vzip.load_vlm(tmp_path / "model", compressor=vzip.VisionZip(vzip.FractionBudget(0.25, 0.125)))
    evaluate(vlm, tasks=["own_exact"], include_path=include_path, run_dir=tmp_path / "run", progress=False)
    by_instance = {row["doc_id"]: row["answer"] for row in read_samples(tmp_path / "run")["own_exact"]}
    by_name = {sample["doc_id"]: sample["filtered_resps"][0] for sample in output["samples"]["own_exact"]}
    assert by_name == by_instance and len(by_name) > 1


def test_arguments_reach_the_loader(monkeypatch):
    seen = {}

    def load(name, **kwargs):
        seen.update(kwargs, name=name)
        return "vlm"

    monkeypatch.setattr(vzip, "load_vlm", load, raising=False)
    line = "pretrained=X,compressor=visionzip,num_dominant=54,num_contextual=10,merge_rule=mean"
    line += ",score=key_norms,score_layer=-3,targets=random,keep_cls=False,seed=4"
    line += ",dtype=bfloat16,preprocess=hf"
    got = model_args.load_from_arg_string(line, {"batch_size": "4", "max_batch_size": None, "device": "cuda:1"})
    assert got == {"vlm": "vlm", "batch_size": 4, "system_prompt": None}
    assert model_args.load_from_arg_string(line, {"batch_size": "auto"})["batch_size"] == "auto"
    assert model_args.load_from_arg_string(f"{line},visual_cache_gib=0", {})["visual_cache_gib"] == 0
    assert seen.pop("compressor") == vzip.VisionZip(
        vzip.TokenBudget(54, 10), "mean", "key_norms", score_layer=-3, targets="random", keep_cls=False, seed=4
    )
    assert seen == {"name": "X", "dtype": "bfloat16", "preprocess": "hf", "device_map": "cuda:1"}


@pytest.mark.parametrize(
    ("line", "outside", "message"),
    [
        ("pretrained=X,compresor=visionzip", {}, "did you mean 'compressor'"),
        ("compressor=none", {}, "pretrained is missing"),
        ("pretrained=X", {}, "compressor is missing, and so are counts"),
        ("compresor=none,num_dominant=5", {"max_batch_size": 8}, "3 problems"),
        ("pretrained=X,compressor=visionzap", {}, "did you mean 'visionzip'"),
        ("pretrained=X,compressor=none,visual_cache_gib=-1", {}, "visual_cache_gib=-1.0: must be a number of GiB"),
        ("pretrained=X,compressor=none,num_dominant=5", {}, "keeps every token"),
        ("pretrained=X,compressor=visionzip,num_dominant=5", {}, "needs num_contextual"),
        ("pretrained=X,dominant=0.5", {}, "needs contextual"),
        ("pretrained=X,dominant=0.9,contextual=0.2", {}, "together they must be above 0 and at most 1"),
        ("pretrained=X,dominant=0.5,contextual=0.1,num_dominant=5", {}, "give counts or fractions"),
        ("pretrained=X,compressor=none,dominant=0.5,contextual=0.1", {}, "keeps every token"),
        ("pretrained=X,compressor=uniform,num_dominant=5,num_contextual=1,merge_rule=sum", {}, "no meaning"),
        ("pretrained=X,compressor=visionzip,num_dominant=0.5,num_contextual=1", {}, "whole number"),
        ("pretrained=X,compressor=none,pruner=fastw", {}, "pruner='fastw' is not known.*did you mean 'fastv'"),
        ("pretrained=X,compressor=none,keep=3", {}, "keep=3 has no meaning for pruner=none"),
        ("pretrained=X,compressor=none,pruner=fastv,keep=1.5", {}, "pruner.keep=1.5"),
        ("pretrained=X,compressor=none,pruner=fastv,kep=3", {}, "did you mean 'keep'"),
        ("pretrained=X,compressor=none", {"batch_size": "most"}, "whole number, 1 or more, or auto"),
        ("pretrained=X,compressor=none", {"max_batch_size": 8}, "max_batch_size=8"),
        ("pretrained=X,compressor=none,device_map=auto", {"device": "cpu"}, "give one of them"),
    ],
)
def test_bad_arguments(line, outside, message):
    with pytest.raises(ConfigError, match=message):
        model_args.load_from_arg_string(line, outside)


def test_counts_alone_are_visionzip_and_the_files_are_the_list(monkeypatch):
    seen = {}
    monkeypatch.setattr(vzip, "load_vlm", lambda name, **kwargs: seen.update(kwargs, name=name), raising=False)
    model_args.load_from_arg_string(
        "pretrained=X,compressor=vscan,num_dominant=54,num_contextual=10,local_layer=-3", {}
    )
    assert seen.pop("compressor") == vzip.VScan(vzip.TokenBudget(54, 10), local_layer=-3)
    model_args.load_from_arg_string("pretrained=X,num_dominant=54,num_contextual=10,projector=DIR", {})
    assert seen == {"name": "X", "compressor": vzip.VisionZip(vzip.TokenBudget(54, 10)), "projector": "DIR"}
    known = method_files()
    assert list(known) == options(config_dir(), "compressor")
    for name in known:
        counts = {"num_dominant": 5, "num_contextual": 2} if known[name].has_budget else {}
        assert model_args.build_compressor({"compressor": name, **counts}) is not None


def test_pruners_are_those_of_the_files(monkeypatch):
    seen = {}
    monkeypatch.setattr(vzip, "load_vlm", lambda name, **kwargs: seen.update(kwargs, name=name), raising=False)
    model_args.load_from_arg_string("pretrained=X,compressor=none,pruner=fastv,keep=30", {})
    assert seen == {"name": "X", "compressor": vzip.Identity(), "pruner": vzip.FastV(2, 30)}
    model_args.load_from_arg_string("pretrained=X,num_dominant=54,num_contextual=10,pruner=fastv,K=3,keep=0.25", {})
    assert seen["pruner"] == vzip.FastV(3, 0.25) and seen["compressor"].budget.num_tokens == 64
    shared = "pretrained=X,compressor=none,pruner=sparsevlm,layers=2,keep=30,seed=3"  # random has a seed too
    model_args.load_from_arg_string(shared, {})
    assert seen["pruner"] == vzip.SparseVLM(2, 30, seed=3)
    model_args.load_from_arg_string("pretrained=X,compressor=random,num_dominant=5,num_contextual=1,seed=3", {})
    with pytest.raises(ConfigError, match="seed=3 has no meaning for pruner=dart"):
        model_args.load_from_arg_string("pretrained=X,compressor=none,pruner=dart,seed=3", {})
    assert ["none", *method_files("pruner")] == sorted(options(config_dir(), "pruner"), key=lambda name: name != "none")
    for name in method_files("pruner"):
        assert isinstance(model_args.build_pruner({"pruner": name}), vzip.Pruner)
    assert model_args.build_pruner({}) is model_args.build_pruner({"pruner": "none"}) is None


# What ends `lmms-eval` with which code, and a line that it prints.
COMMANDS = {
    "pretrained=vzip/tiny,num_dominant=54,num_contextual=10": (0, r"\|own_exact\s*\|.*\|exact_match\s*\|"),
    "pretrained=vzip/tiny,num_dominent=54": (2, r"ConfigError: .*num_dominent=54.*did you mean 'num_dominant'"),
    "pretrained=vzip/tiny,num_dominant=54": (2, r"ConfigError: .*compressor=visionzip needs num_contextual"),
    "pretrained=vzip/tiny,num_dominant=570,num_contextual=10": (2, r"ConfigError: .*577 to choose from"),
    "pretrained=./no-such-folder,num_dominant=54,num_contextual=10": (2, r"CheckpointError: .*no-such-folder"),
}


@pytest.mark.parametrize("line", [line for line, (code, _) in COMMANDS.items() if code])
def test_what_the_command_ends_with(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        model_args.VzipByArguments.create_from_arg_string(line, {"batch_size": 1})
    code, pattern = COMMANDS[line]
    said = capsys.readouterr().err
    assert ended.value.code == code and re.match(pattern, said)
    assert said.count("\n") == 1 + ("Did you mean" in said)  # behind a long list the nearest name comes once more


@pytest.mark.whole
def test_the_command_scores_and_ends_with_an_error_where_there_is_one(include_path, tmp_path):
    """As the README writes it; offline, all at once."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    started = {}
    for line in COMMANDS:
        command = [sys.executable, "-m", "lmms_eval", "--model", "vzip", "--model_args", line, "--tasks", "own_exact"]
        started[line] = subprocess.Popen(
            [*command, "--include_path", str(include_path), "--limit", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
    for line, process in started.items():
        said, _ = process.communicate(timeout=600)
        code, pattern = COMMANDS[line]
        assert process.returncode == code, said
        assert re.search(pattern, said), said
        if code:
            assert "Traceback" not in said and len(re.findall(r"^\w+Error: ", said, re.M)) == 1, said


def test_needs_a_processor_with_a_chat_template(model, processor):
    with pytest.raises(UnsupportedModelError, match="no processor"):
        VzipLmms(vzip.CompressedVlm(model, vzip.Identity()))
    template, processor.chat_template = processor.chat_template, None
    try:
        with pytest.raises(UnsupportedModelError, match="no chat template"):
            VzipLmms(vzip.CompressedVlm(model, vzip.Identity(), processor))
    finally:
        processor.chat_template = template


def test_other_request_types_are_refused(vlm):
    from lmms_eval.api.instance import Instance

    request = Instance("loglikelihood", (), 0, {"task": "t", "doc_id": 0, "repeats": 1})
    with pytest.raises(UnsupportedModelError, match="task t scores answers by likelihood"):
        VzipLmms(vlm).loglikelihood([request])
    with pytest.raises(UnsupportedModelError, match="several rounds"):
        VzipLmms(vlm).generate_until_multi_round([request])

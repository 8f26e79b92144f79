"""`lmms-eval --model vzip --model_args ...`: the registered name, in this process."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager

import vzip
from vzip.errors import ConfigError, UnsupportedModelError
from vzip.evaluation import model_args
from vzip.evaluation.lmms import VzipLmms
from vzip.evaluation.plugin import manifests
from vzip.evaluation.run import evaluate
from vzip.report.record import read_samples


@pytest.fixture
def checkpoint(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_the_entry_point_is_declared():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"vzip": "vzip.evaluation.plugin:manifests"}


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
    assert seen.pop("compressor") == vzip.VisionZip(
        vzip.TokenBudget(54, 10), "mean", "key_norms", score_layer=-3, targets="random", keep_cls=False, seed=4
    )
    assert seen == {"name": "X", "dtype": "bfloat16", "preprocess": "hf", "device_map": "cuda:1"}


@pytest.mark.parametrize(
    ("line", "outside", "message"),
    [
        ("pretrained=X,compresor=visionzip", {}, "did you mean 'compressor'"),
        ("compressor=none", {}, "pretrained is missing"),
        ("pretrained=X", {}, "compressor is missing"),
        ("pretrained=X,compressor=visionzap", {}, "did you mean 'visionzip'"),
        ("pretrained=X,compressor=none,num_dominant=5", {}, "keeps every token"),
        ("pretrained=X,compressor=visionzip,num_dominant=5", {}, "needs num_contextual"),
        ("pretrained=X,compressor=uniform,num_dominant=5,num_contextual=1,merge_rule=sum", {}, "no meaning"),
        ("pretrained=X,compressor=visionzip,num_dominant=0.5,num_contextual=1", {}, "whole number"),
        ("pretrained=X,compressor=none", {"batch_size": "most"}, "whole number, 1 or more, or auto"),
        ("pretrained=X,compressor=none", {"max_batch_size": 8}, "max_batch_size=8"),
        ("pretrained=X,compressor=none,device_map=auto", {"device": "cpu"}, "give one of them"),
    ],
)
def test_bad_arguments(line, outside, message):
    with pytest.raises(ConfigError, match=message):
        model_args.load_from_arg_string(line, outside)


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

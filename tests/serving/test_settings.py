"""What ``--hf-overrides`` may say, and what is refused before anything is loaded."""

from __future__ import annotations

import json

import pytest
import torch
from tests import tiny

import vzip
from vzip.errors import CheckpointError, ConfigError, UnsupportedModelError
from vzip.models.families import LlavaAdapter
from vzip.models.weights.tuned import describe, save_tuned
from vzip.serving import ARCHITECTURES
from vzip.serving.settings import check_settings, read_settings

VALUES = {"compressor": {"name": "visionzip"}, "budget": {"num_dominant": 12, "num_contextual": 4}}


@pytest.fixture(scope="module")
def config():
    config = tiny.llava().config
    config.architectures = ["VzipLlavaForConditionalGeneration"]
    return config


def test_a_method_by_name_with_its_own_settings(config):
    values = {**VALUES, "compressor": {"name": "visionzip", "merge_rule": "mean", "_target_": "os.system", "budget": 1}}
    settings = check_settings(config, json.loads(json.dumps(values)))
    assert settings.compressor == vzip.VisionZip(vzip.TokenBudget(12, 4), merge_rule="mean")
    assert settings.preprocess == "llava" and settings.projector is None


def test_of_a_configuration_as_vllm_leaves_it(config):
    config.vzip = VALUES
    assert read_settings(config).compressor == vzip.VisionZip(vzip.TokenBudget(12, 4))
    del config.vzip
    with pytest.raises(ConfigError, match="vzip=None: must be a mapping"):
        read_settings(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgt": 1}, r"vzip\.budgt: no such key \(did you mean 'budget'\?\)"),
        ({"compressor": {"name": "vizionzip"}}, "compressor=vizionzip: not known"),
        ({"compressor": {"name": "visionzip", "rule": 1}}, "compressor.rule: compressor=visionzip has no such setting"),
        ({"budget": None}, "vzip.budget=None: compressor=visionzip needs a budget"),
        ({"compressor": {"name": "none"}}, "compressor=none takes no budget"),
        ({"budget": {"num_dominant": 60, "num_contextual": 10}}, "70 visual tokens per crop"),
        ({"budget": {"num_tokens": 16}}, "must be counts"),
        ({"budget": {"num_dominant": 2.5}}, "whole number of tokens"),
        ({"preprocess": "pad"}, "vzip.preprocess='pad'"),
        ({"row_newline": True}, "LlavaForConditionalGeneration has no tiles"),
        ({"compressor": {"name": "mmtok"}}, "mmtok is text-aware.*python -m vzip embed"),
        ({"compressor": {"name": "cdpruner"}}, "cdpruner is text-aware.*python -m vzip embed"),
        ({"compressor": {"name": "flowcut"}}, "flowcut acts inside the vision tower.*python -m vzip embed"),
        ({"compressor": {"name": "visionzip", "score_layer": 9}}, "compressor.score_layer=9"),
        ({"projector": "/nowhere"}, "model.projector=/nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused(config, change, message):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        check_settings(config, {**VALUES, **change})


def test_a_model_of_another_family_is_refused():
    config = tiny.llava().config
    config.architectures = ["InternVLForConditionalGeneration"]
    with pytest.raises(UnsupportedModelError, match="InternVLForConditionalGeneration: not served by vLLM with vzip"):
        check_settings(config, VALUES)


def test_a_request_has_its_own_budget_up_to_the_servers(config):
    settings = check_settings(config, VALUES)
    assert settings.asked_for({}) == vzip.TokenBudget(12, 4)
    fewer = settings.asked_for({"vzip": {"num_dominant": 5, "num_contextual": 1}})
    assert settings.with_budget(fewer) == vzip.VisionZip(vzip.TokenBudget(5, 1))
    assert settings.with_budget(fewer) is settings.with_budget(vzip.TokenBudget(5, 1))
    with pytest.raises(ConfigError, match="asks for 17 visual tokens per crop: this server keeps 16 at most"):
        settings.asked_for({"vzip": {"num_dominant": 17}})
    with pytest.raises(ConfigError, match=r"mm_processor_kwargs\.vzip='64tok': must be counts"):
        settings.asked_for({"vzip": "64tok"})
    vanilla = check_settings(config, {"compressor": "none"})
    assert vanilla.asked_for({}) is None and vanilla.compressor.is_vanilla
    with pytest.raises(ConfigError, match="compressor=none takes no budget"):
        vanilla.asked_for({"vzip": {"num_dominant": 4}})


def test_the_identity_tells_apart_whatever_changes_the_tokens(config):
    changes = [
        {},
        {"budget": {"num_dominant": 11, "num_contextual": 5}},
        {"compressor": {"name": "visionzip", "merge_rule": "mean"}},
        {"compressor": "divprune"},
        {"preprocess": "hf"},
    ]
    found = {check_settings(config, {**VALUES, **change}).identity for change in changes}
    assert len(found) == len(changes)


def tuned(directory, seed=0, **header):
    """Weights tuned from the tiny model, as a training writes them."""
    model, compressor = tiny.llava(), vzip.VisionZip(vzip.TokenBudget(12, 4))
    described = describe(LlavaAdapter(model), compressor, "base", None, ["projector"]) | header
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if "multi_modal_projector" in name
    }
    save_tuned(directory, tensors, described)
    return model, tensors


def test_a_tuned_projector_is_held_against_the_model(config, tmp_path):
    model, tensors = tuned(tmp_path / "a")
    tuned(tmp_path / "b", seed=1)
    settings = [check_settings(config, {**VALUES, "projector": str(tmp_path / name)}) for name in ("a", "b")]
    assert settings[0].identity != settings[1].identity
    projector = settings[0].projector
    assert {name: t.tolist() for name, t in projector.tensors().items()} == {n: t.tolist() for n, t in tensors.items()}
    weights = model.state_dict()
    assert dict(projector.of_base(weights.items())).keys() == weights.keys()
    other = {name: value + 1 if name.endswith("embed_tokens.weight") else value for name, value in weights.items()}
    for wrong in (other, {"lm_head.weight": weights["lm_head.weight"]}):
        with pytest.raises(CheckpointError, match=r"tuned from base .*text embedding is not the same"):
            list(projector.of_base(wrong.items()))
    next_config = tiny.llava_next().config
    next_config.architectures = [ARCHITECTURES["LlavaNextForConditionalGeneration"]]
    with pytest.raises(CheckpointError, match="tuned from a LlavaForConditionalGeneration"):
        check_settings(next_config, {**VALUES, "projector": str(tmp_path / "a")})

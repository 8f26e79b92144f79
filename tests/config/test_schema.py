"""The schema and the YAML files say the same; so do the schema and the code behind it."""

from __future__ import annotations

import inspect
from typing import get_args

from omegaconf import OmegaConf

import vzip
from vzip.config import schema
from vzip.config.options import config_dir, groups
from vzip.data.conversations import TEMPLATES
from vzip.evaluation.answering.generation import FORWARDED
from vzip.evaluation.run import evaluate
from vzip.keys import keys_of, whole_number
from vzip.train.settings import Template


def test_every_group_has_rules_and_base_lists_it() -> None:
    names = {*schema.GROUPS, *schema.OPEN_GROUPS}
    assert set(groups(config_dir())) == names
    base = OmegaConf.to_container(OmegaConf.load(config_dir() / "base.yaml"))
    assert isinstance(base, dict)
    assert {next(iter(entry)) for entry in base["defaults"] if isinstance(entry, dict)} == names
    assert set(base) - {"defaults", "hydra"} == set(schema.TOP)


def test_model_settings_are_those_of_load_vlm() -> None:
    accepted = set(inspect.signature(vzip.load_vlm).parameters) - {"compressor", "pruner"}
    assert set(schema.GROUPS["model"]) - {"name", "num_tower_tokens", "system_prompt", "assembled_from"} == accepted


def test_generation_settings_are_known_to_the_evaluation() -> None:
    assert set(keys_of(schema.GenerationSettings)) <= {*FORWARDED, "until"}
    assert {"tasks", "limit", "batch_size", "include_path", "gen_kwargs"} <= set(inspect.signature(evaluate).parameters)


def test_templates_are_those_that_conversations_have() -> None:
    assert set(get_args(Template)) == set(TEMPLATES)


def test_whole_numbers_exclude_booleans_and_fractions() -> None:
    rule = whole_number(1)
    assert [rule.allows(v) for v in (1, 2, 0, True, 1.0, "1", None)] == [True, True, False, False, False, False, False]

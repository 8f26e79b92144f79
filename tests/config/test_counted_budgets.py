"""``budget=48tok``, ``budget=tokens budget.num_tokens=48``: any number of tokens, without a file for it."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import vzip
from vzip.cli.prefetch import composed
from vzip.config.build import evaluation_plan, model_plan, resolved
from vzip.config.full_budget import full_is_vanilla
from vzip.config.memory_plan import memory_plan
from vzip.config.options import config_dir, option_values
from vzip.config.overrides import check_overrides
from vzip.config.run_directory import recipe_changes, run_directory, training_directory
from vzip.errors import ConfigError
from vzip.option_files import counted_budget
from vzip.report.table_files import read_table
from vzip.sweep.plan import plan

COUNTS = {"num_dominant": 40, "num_contextual": 8}


@pytest.mark.parametrize("name", ["17tok", "32tok", "64tok", "128tok", "192tok"])
def test_the_paper_s_splits_follow_from_the_ratio(name: str) -> None:
    assert counted_budget(name) == option_values(config_dir(), "budget", name)


@pytest.mark.parametrize("name", ["1tok", "0tok", "048tok", "48", "tokens", "full"])
def test_what_is_no_number_of_tokens(name: str) -> None:
    assert counted_budget(name) is None


def test_where_eval_ask_memory_and_prefetch_take_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vzip")
    assert "num_dominant=40, num_contextual=8" in repr(model_plan(["model=tiny", "budget=48tok"])[1])
    assert "budget=48tok: 40 dominant + 8 contextual tokens" in caplog.messages
    assert memory_plan(["model=tiny", "budget=52tok"], inference=True).num_visual == 52
    (config,) = composed(["model=tiny", "budget=56tok"])
    assert config["budget"] == {"name": "56tok", "num_dominant": 47, "num_contextual": 9, "scope": "crop"}


def test_no_split_is_told_of_a_pruner_s_average(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vzip")
    check_overrides(["compressor=none", "budget=300tok", "pruner=fastv"], config_dir(), "eval")
    assert caplog.messages == []
    check_overrides(["compressor=visionzip", "budget=300tok"], config_dir(), "eval")
    assert caplog.messages == ["budget=300tok: 253 dominant + 47 contextual tokens"]


@pytest.mark.parametrize("words", [["budget=48tok"], ["budget=tokens", "budget.num_tokens=48"]])
@pytest.mark.parametrize("primary", ["eval", "train"])
def test_both_spellings_are_one_run(words: list[str], primary: str, tmp_path: Path) -> None:
    check_overrides(words, config_dir(), primary)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose(primary, [*words, f"paths.runs_dir={tmp_path}"])
        config = resolved(cfg)
        recorded = evaluation_plan(cfg).evaluation["resolved_config"]["budget"]
    assert {key: config["compressor"]["budget"][key] for key in COUNTS} == COUNTS
    assert run_directory(config, config_dir()) == tmp_path / "scenes/tiny/visionzip-48tok/seed0"
    assert training_directory(config, config_dir()).parent.name == "visionzip-48tok"
    assert recorded == {"name": "48tok", **COUNTS, "scope": "crop"}, "the record's, whichever way it was said"


def test_a_sweep_s_list_and_a_table_s_rows(tmp_path: Path) -> None:
    check_overrides(["-m", "budget=full,44tok,64tok"], config_dir(), "eval")
    content = json.loads((config_dir().parent / "src/vzip/report/tables/scenes.json").read_text())
    rows = [{"tokens": 44, "method": "VisionZip", "run": "budget=44tok"}]
    (tmp_path / "own.json").write_text(json.dumps(content | {"rows": rows}))
    (planned,) = plan(read_table(str(tmp_path / "own.json")), [], tmp_path).values()
    assert planned.config["budget"] == {"name": "44tok", "num_dominant": 37, "num_contextual": 7, "scope": "crop"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("budget=1tok", "budget=1tok: no such option"),
        ("-m budget=44tok,1tok", "budget=1tok: no such option"),
        ("budget=tokens budgt=1", "budget.num_tokens=null: must be a whole number of tokens a crop, 2 or more"),
        ("budget=tokens budget.num_tokens=1 budgt=1", "as budget.num_tokens=48"),
        ("budget.num_tokens=48", "options of budget that have it: tokens"),
        ("budget=9999tok budgt=1", "= 9999 visual tokens a crop"),
    ],
)
def test_refusals(line: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_overrides(shlex.split(line), config_dir(), "eval")
    assert said in str(caught.value)
    assert "needs a budget" not in str(caught.value), "said once"


FRACTIONS = ["budget=fraction", "budget.dominant=0.25", "budget.contextual=0.125"]


def test_fractions_wherever_a_budget_is_named(tmp_path: Path) -> None:
    assert model_plan(["model=tiny", *FRACTIONS])[1].budget == vzip.FractionBudget(0.25, 0.125)
    of_video = model_plan(["model=tiny", *FRACTIONS, "budget.scope=video"])[1]
    assert of_video.budget == vzip.FractionBudget(0.25, 0.125, "video")
    assert memory_plan(["model=tiny", *FRACTIONS], inference=True).num_visual == 576 // 4 + 576 // 8
    (config,) = composed(["model=tiny", *FRACTIONS])
    assert run_directory(config, config_dir()).parent.name == "visionzip-0.25+0.125"
    assert training_directory(config, config_dir()).parent.name == "visionzip-0.25+0.125"
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("eval", [*FRACTIONS, f"paths.runs_dir={tmp_path}"])
    evaluation = evaluation_plan(cfg).evaluation
    of_record = {"num_dominant": None, "num_contextual": None, "scope": "crop", "dominant": 0.25, "contextual": 0.125}
    assert evaluation["resolved_config"]["budget"] == {"name": "0.25+0.125", **of_record}
    config["budget"] |= {"dominant": 1, "contextual": 0}
    assert run_directory(config, config_dir()).parent.name == "visionzip-1.0+0.0", "not one token, as 1+0"
    other = {**config, "budget": {**config["budget"], "dominant": 0.5}}
    assert recipe_changes(config, other) == ["budget.dominant=1 (recipe: 0.5)"]


def test_a_sweep_over_fractions_and_full_has_one_vanilla_run() -> None:
    jobs = [["budget=full"], FRACTIONS, [*FRACTIONS[:2], "budget.contextual=0.0"]]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        configs = [full_is_vanilla(resolved(compose("eval", words)), config_dir()) for words in jobs]
    assert [config["compressor"]["name"] for config in configs] == ["none", "visionzip", "visionzip"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("budget=fraction budgt=1", "budget.dominant=null: must be a fraction of the patches, 0 to 1, as"),
        ("budget=fraction budget.dominant=2 budget.contextual=0 budgt=1", "budget.dominant=2: must be a fraction"),
        ("budget=fraction budget.dominant=0.9 budget.contextual=0.3 budgt=1", "at most 1, the fraction"),
        ("budget.dominant=0.5", "options of budget that have it: fraction"),
        (" ".join([*FRACTIONS, "budget.num_dominant=3", "budgt=1"]), "budget.num_dominant"),
        (" ".join([*FRACTIONS, "compressor=none", "budgt=1"]), "set budget=full, or a compressor that takes a budget"),
        (" ".join([*FRACTIONS, "compressor=none", "pruner=fastv", "budgt=1"]), "it is pruner.keep=0.5"),
    ],
)
def test_fractions_that_are_refused(line: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_overrides(shlex.split(line), config_dir(), "eval")
    assert str(caught.value).count(said) == 1, "once"


def test_without_a_compressor_the_budget_is_the_pruners_average() -> None:
    """And a compressor's otherwise, so that a pruner behind it keeps its own arguments."""
    from vzip.config.build import chat_plan

    words = ["pruner=fastv", "pruner.K=1"]
    assert chat_plan([*words, "compressor=none", "budget=192tok"])[0]["pruner"] == vzip.FastV(1, budget=192)
    assert chat_plan([*words, "budget=48tok"])[0]["pruner"] == vzip.FastV(1, 0.5)
    assert chat_plan([*words, "compressor=none", "budget=full"])[0]["pruner"] == vzip.FastV(1, 0.5)
    for wrong, message in (
        ([*words, "budget=64tok"], "cannot be below 116.0"),
        ([*words, "budget=192tok", "pruner.keep=30"], "pruner.keep=30: with compressor=none the budget"),
        (["budget=64tok"], "or a pruner"),
    ):
        with pytest.raises(ConfigError, match=message):
            chat_plan(["compressor=none", *wrong])

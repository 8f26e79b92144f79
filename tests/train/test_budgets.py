"""One training for several budgets: the seed draws one for each step, for all processes and batches of it."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tests.config.kit import run
from tests.train.kit import BUDGET, SETTINGS, Samples, dying_at, load_model, make_plan
from tests.train.runs import curve, finish, metrics

import vzip
from vzip.config.memory_plan import memory_plan
from vzip.config.options import config_dir
from vzip.config.overrides import check_overrides
from vzip.config.run_directory import training_directory
from vzip.config.several_budgets import spelled_out
from vzip.config.training import checked, tuning_plan
from vzip.errors import ConfigError
from vzip.models.weights.tuned import apply_tuned
from vzip.train.loop import train
from vzip.train.stepping import StepSchedule

__all__ = ["run"]
NAMES = ("3tok", "9tok", "5tok")
SEVERAL = tuple(vzip.VisionZip(vzip.TokenBudget(num - 1, 1)) for num in (3, 9, 5))


def several(plan: Any, name: str = "run", **changes: Any) -> Any:
    """Of three budgets, the tokens of an image 3, 9 and 5."""
    return plan(name, budgets=NAMES, compressors=SEVERAL, num_steps=8, **changes)


def drawn(seed: int, num_steps: int) -> list[int]:
    """The rule, said again: of three budgets the one that the seed and the step's number draw."""
    return [(3, 9, 5)[np.random.RandomState([seed, 45270, step]).randint(3)] for step in range(num_steps)]


@pytest.mark.usefixtures("fresh_accelerate")
def test_steps_are_at_the_budgets_that_the_seed_draws(plan: Any) -> None:
    """The tokens are measured: an image has as many as its step's budget, whichever batch it is in."""
    setup = several(plan)
    final = train(setup)
    rows, data = metrics(setup.run_dir), Samples()
    schedule = StepSchedule(data, np.arange(24), setup.train, seed=0)
    assert [row["budget_tokens"] for row in rows] == drawn(0, 8)
    assert {*drawn(0, 8)} == {3, 5, 9} and drawn(0, 8) != drawn(1, 8)
    for step, row in enumerate(rows):
        num_images = sum(data.has_images[number] for number in schedule[step])
        assert row["num_visual_tokens"] == num_images * row["budget_tokens"]
    header = json.loads((final / "tuned.json").read_text())
    assert header["compressors"] == [repr(each) for each in SEVERAL]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_step_is_that_of_a_training_at_its_budget(plan: Any) -> None:
    """A second way: one step each of three trainings at one budget, from the same weights."""
    (first,) = drawn(0, 1)
    setup = several(plan)
    train(dataclasses.replace(setup, train=dataclasses.replace(setup.train, num_steps=1)))
    for number in (3, 9, 5):

        def load(precision: str, number: int = number) -> Any:
            vlm = load_model()
            vlm.compressor = vzip.VisionZip(vzip.TokenBudget(number - 1, 1))
            return vlm

        single = plan(f"at {number}", num_steps=1, load_model=load)
        train(single)
        assert (curve(single.run_dir) == curve(setup.run_dir)) is (number == first)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_goes_on_to_the_same_bits(plan: Any, num_workers: int) -> None:
    whole = several(plan, "whole", num_workers=num_workers)
    train(whole)
    with dying_at(5):
        train(several(plan, "killed", num_workers=num_workers))
    final = train(several(plan, "killed", num_workers=num_workers))
    assert curve(final.parent) == curve(whole.run_dir)
    assert (final / "tuned.safetensors").read_bytes() == (whole.run_dir / "final/tuned.safetensors").read_bytes()


@pytest.mark.usefixtures("fresh_accelerate")
def test_processes_and_batches_of_a_step_share_its_budget(plan: Any, tmp_path: Path) -> None:
    """Of other launchers each step has as many visual tokens and the same loss."""
    setup = several(plan, batch_size=8)
    train(setup)
    changes: dict[str, Any] = {"budgets": NAMES, "num_steps": 4, "strategy": "ddp", "batch_size": 2}
    of_num = "__import__('vzip').VisionZip(__import__('vzip').TokenBudget(num - 1, 1))"
    finish(tmp_path / "two", 2, compressors=_Code(f"tuple({of_num} for num in (3, 9, 5))"), **changes)
    for one, two in zip(curve(setup.run_dir), curve(tmp_path / "two"), strict=False):
        assert one[5] == two[5] and one[4] == two[4]
    assert [row["budget_tokens"] for row in metrics(tmp_path / "two")] == drawn(0, 4)
    assert metrics(tmp_path / "two")[0]["loss"] == pytest.approx(metrics(setup.run_dir)[0]["loss"], rel=1e-5)


class _Code(str):
    """An argument that the other process makes: its repr is code."""

    def __repr__(self) -> str:
        return str(self)


@pytest.mark.usefixtures("fresh_accelerate")
def test_validation_is_at_each_budget(plan: Any) -> None:
    setup = several(plan, num_validation_samples=6, learning_rate=0.0)
    train(setup)
    rows = [row for row in metrics(setup.run_dir) if "validation_loss" in row]
    losses = [[row[f"validation_loss_{name}"] for name in NAMES] for row in rows]
    assert len(rows) == 4 and all(len(set(of_step)) == 3 for of_step in losses)
    assert losses[0] == losses[-1], "nothing is learned at a rate of 0"
    assert rows[0]["validation_loss"] == pytest.approx(sum(losses[0]) / 3)
    for number, loss in zip((3, 9, 5), losses[0], strict=True):

        def load(precision: str, number: int = number) -> Any:
            vlm = load_model()
            vlm.compressor = vzip.VisionZip(vzip.TokenBudget(number - 1, 1))
            return vlm

        single = plan(f"at {number}", num_steps=1, learning_rate=0.0, num_validation_samples=6, load_model=load)
        train(single)
        assert metrics(single.run_dir)[0]["validation_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_weights_are_of_each_of_their_budgets(plan: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "vzip")
    final = train(several(plan))
    for compressor in SEVERAL:
        apply_tuned(load_model().adapter, compressor, final)
    assert "the numbers are of neither" not in caplog.text
    apply_tuned(load_model().adapter, vzip.VisionZip(BUDGET), final)
    assert "the numbers are of neither" in caplog.text


def composed(*words: str, primary: str = "train") -> Any:
    given = spelled_out(words, primary)
    check_overrides(given, config_dir(), primary)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(primary, given)


def test_a_list_of_budgets_is_one_training() -> None:
    config = checked(composed("+exp=tiny_32tok", "budget=[32,48,64tok]", "launcher=inline"))
    plan = tuning_plan(config)
    assert plan.train.budgets == ("32tok", "48tok", "64tok")
    assert [each.budget.num_tokens for each in plan.compressors] == [32, 48, 64]
    assert plan.compressors[0].budget == vzip.TokenBudget(27, 5)
    assert plan.run_dir == Path("runs/train/tiny_projector/tiny_32tok/visionzip-32tok+48tok+64tok/seed0")
    assert config["compressor"]["budget"]["num_dominant"] == 54, "memory and lengths are the largest's"
    assert all(repr(each) in plan.identity["compressor"] for each in plan.compressors)


@pytest.mark.parametrize("budget", ["32tok", "64tok", "128tok", "96tok"])
def test_an_evaluation_at_any_budget_finds_it(budget: str) -> None:
    from vzip.config.build import resolved

    evaluated = resolved(composed("+exp=tiny_budgets_tuned", f"budget={budget}", primary="eval"))
    trained = checked(composed("+exp=tiny_budgets"))
    assert training_directory(evaluated, config_dir()) == training_directory(trained, config_dir())
    assert sum(evaluated["compressor"]["budget"][f"num_{part}"] for part in ("dominant", "contextual")) == int(
        budget.removesuffix("tok")
    )


def test_a_recipe_is_itself_at_each_of_its_budgets() -> None:
    from vzip.config.build import unchanged_recipe

    for budget, recipe in (("32tok", "tiny_budgets_tuned"), ("128tok", "tiny_budgets_tuned"), ("96tok", None)):
        config = OmegaConf.to_container(
            composed("+exp=tiny_budgets_tuned", f"budget={budget}", primary="eval"), resolve=True
        )
        assert isinstance(config, dict)
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            assert unchanged_recipe({str(key): value for key, value in config.items()}, "eval") == recipe


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.budgets=[64tok,full]"], "train.budgets: full keeps every visual token"),
        (["train.budgets=[64tok,fraction]"], "train.budgets: fraction is in fractions"),
        (["train.budgets=[64tok,tokens]"], "train.budgets: tokens names no number of tokens"),
        (["train.budgets=[64tok,63token]"], "train.budgets: 63token is no budget"),
        (["train.budgets=[64tok,64tok]"], "each once"),
        (["budget=[64]"], "a list of two budgets or more"),
        (["budget=[64,9000]"], "9000 visual tokens a crop"),
        (["budget=32tok"], "budget=32tok is none of train.budgets=[48tok,64tok]"),
        (["budget=fraction", "budget.dominant=0.1", "budget.contextual=0"], "budget=fraction is none of"),
        (["compressor=none", "budget=full"], "budget=full is none of train.budgets"),
    ],
)
def test_refusals(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(composed("+exp=tiny_64tok", "train.budgets=[48tok,64tok]", *words))
    assert said in str(caught.value)


def test_memory_is_of_one_of_them_too() -> None:
    with pytest.raises(ConfigError, match=r"budget=96tok is none of train\.budgets=\[48tok,64tok\]"):
        memory_plan(["+exp=tiny_64tok", "train.budgets=[48tok,64tok]", "budget=96tok"])


def test_an_evaluation_is_at_one(run: Any) -> None:
    code, said = run("budget=[64,128]")
    assert code == 2 and "-m budget=64tok,128tok" in said and "a run is at one budget" in said


def test_the_plan_of_one_budget_is_as_ever() -> None:
    assert tuning_plan(checked(composed("+exp=tiny_64tok", "launcher=inline"))).compressors == ()
    assert StepSchedule(Samples(), np.arange(24), SETTINGS, 0).budget(5) == 0
    assert make_plan(Path("x")).compressors == ()

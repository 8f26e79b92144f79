"""``budget=48tok``: any count, without a file for it."""

from __future__ import annotations

import pytest

from vzip.config.build import model_plan
from vzip.config.options import config_dir, option_values
from vzip.config.overrides import counted_budgets


@pytest.mark.parametrize("name", ["17tok", "32tok", "64tok", "128tok", "192tok"])
def test_the_paper_s_splits_follow_from_the_ratio(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = option_values(config_dir(), "budget", name)
    monkeypatch.setattr("vzip.config.overrides.options", lambda *_: [])  # as if there were no file
    dominant, contextual = (f"budget.num_{half}={values[f'num_{half}']}" for half in ("dominant", "contextual"))
    assert counted_budgets([f"budget={name}"], config_dir()) == [dominant, contextual]


def test_any_count_is_a_budget_and_a_file_goes_first(caplog: pytest.LogCaptureFixture) -> None:
    assert counted_budgets(["model=tiny", "budget=64tok"], config_dir()) == ["model=tiny", "budget=64tok"]
    compressor = model_plan(["model=tiny", "budget=48tok"])[1]
    assert "num_dominant=40, num_contextual=8" in repr(compressor)
    assert counted_budgets(["budget=1tok"], config_dir()) == ["budget=1tok"], "refused as an unknown option"

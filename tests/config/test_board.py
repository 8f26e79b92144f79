"""What a leaderboard is made of; what is wrong with its words is said before torch loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vzip.config.board import board
from vzip.errors import ConfigError


def test_floors_are_added_and_a_budget_out_of_reach_is_a_cell_without_a_run(tmp_path) -> None:
    words = ["methods=fastv:K=1,random", "budgets=64,192", f"paths.runs_dir={tmp_path}", "eval.limit=4"]
    found = board(words)
    assert found.added == ("uniform",) and str(found.name) == "tiny/scenes_limit-4"
    assert [(cell.method, cell.budget, cell.plan is None) for cell in found.cells] == [
        ("vanilla", "full", False),
        ("fastv_K-1", "192tok", False),
        ("random", "192tok", False),
        ("uniform", "192tok", False),
        ("fastv_K-1", "64tok", True),
        ("random", "64tok", False),
        ("uniform", "64tok", False),
    ]
    assert "cannot be below 116.0" in found.cells[4].reason
    pruned = found.cells[1].plan
    assert pruned is not None and pruned.pruner is not None and pruned.pruner.average(576, 5) == 192
    assert all(cell.plan is None or cell.plan.tower_cache_gib > 0 for cell in found.cells), "one pass of the tower"


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            ["methods=fastvv,random,random", "budgets=64,x", "compressor=random", "eval.limt=2"],
            [
                "methods=fastvv: not known",
                "methods=random: named twice",
                "budgets=64,x: must be whole numbers",
                "compressor=random: is what the table goes through",
                "eval.limt",
            ],
        ),
        (["methods=fastv:K=0"], ["pruner.K=0: must be a whole number"]),
        (["methods=scope,scope:alpha=1.0", "budgets=64"], ["methods=scope: named twice, with settings"]),
        (["methods=fastv:L=0"], ["pruner.L"]),
        (["methods=fastv:K"], ["write NAME:KEY=VALUE"]),
        (["eval.tasks=[mmvet_direct]", "eval.include_path=null"], ["mmvet_direct need a judge model"]),
        (["budgets=1000"], ["budgets=1000: budget.num_dominant=844"]),
    ],
)
def test_wrong_words_are_named_together(words: list[str], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        board(words)
    for message in messages:
        assert message in str(error.value)


def test_an_unknown_method_is_said_before_torch_loads() -> None:
    code = (
        "import sys\nfrom vzip.config.board import board\nfrom vzip.errors import ConfigError\n"
        "try: board(['methods=fastvv'])\nexcept ConfigError: print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

"""`python -m vzip agreement` on records made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.records import COMPRESSED, VANILLA, put, record

from vzip import cli


def test_runs_beside_vanilla_and_on_hard_and_easy_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "vanilla", record("Identity"), VANILLA)
    ours = put(tmp_path, "ours", record("VisionZip"), COMPRESSED)
    control = put(tmp_path, "control", record("Pooled"), [0.0] * 30 + [1.0] * 20)
    assert cli.main(["agreement", str(ours.path.parent), "--easy-from", str(control.path)]) == 0
    shown = [line.split("gqa")[1].split() for line in capsys.readouterr().out.splitlines() if " gqa " in line]
    assert [line[0] for line in shown] == ["50", "50"], "vanilla is found and shown first"
    assert shown[0][1] == "100.0" and shown[1][1] == "60.0"
    # COMPRESSED is right on the first 20 of the 30 hard ones, and on none of the others.
    assert "30 66.7" in " ".join(shown[1]) and "20 0.0" in " ".join(shown[1])
    assert "30 100.0" in " ".join(shown[0]) and "20 50.0" in " ".join(shown[0])


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = put(tmp_path, "ours", record("VisionZip"), COMPRESSED)
    assert cli.main(["agreement", str(ours.path)]) == 2
    assert "--vanilla RUN" in capsys.readouterr().err
    assert cli.main(["agreement", str(ours.path), "--vanilla", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err
    vanilla = put(tmp_path, "vanilla", record("Identity"), VANILLA)
    (vanilla.path.parent / "samples.jsonl").unlink()
    assert cli.main(["agreement", str(ours.path)]) == 2
    assert "were not kept" in capsys.readouterr().err

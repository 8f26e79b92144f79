"""Where nothing can be written is said before any work; what is written is there whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from vzip.errors import RunWriteError
from vzip.results.files import check_writable, make_folder, write_json


def test_a_folder_that_cannot_be_written_is_known_without_making_it(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "there" / "yet")
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("x")
    for act in (check_writable, make_folder):
        with pytest.raises(RunWriteError, match=r"file.runs: cannot be written \((Permission denied|Not a directory)"):
            act(tmp_path / "file" / "runs")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {("no", "key"): 2})
    assert path.read_text() == '{\n  "a": 1\n}\n' and [file.name for file in tmp_path.iterdir()] == ["run.json"]

"""Where nothing can be written is said before any work; what is written is there whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.records import record
from tests.writing import no_room

from vzip.errors import ManifestError, RunWriteError
from vzip.json_files import read_json
from vzip.results.files import check_writable, make_folder, write_json, write_jsonl, written_aside
from vzip.results.record import SAMPLES_NAME, read_record, read_samples


def test_a_folder_that_cannot_be_written_is_known_without_making_it(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "there" / "yet")
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("x")
    for act in (check_writable, make_folder):
        with pytest.raises(RunWriteError, match=r"file.runs: cannot be written \((Permission denied|Not a directory)"):
            act(tmp_path / "file" / "runs")


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y", "/sys/x", "/dev/full", "/dev/full/x", "/dev/null/x"])
def test_no_rights_are_taken_for_a_place_to_write(place: str) -> None:
    for folder in (Path(place), Path(place, "runs")):
        with pytest.raises(RunWriteError, match=rf"{place}.*: cannot be written"):
            check_writable(folder)


def test_a_try_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunWriteError, match=r"file: cannot be written \(Not a directory"):
        check_writable(tmp_path / "file")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {("no", "key"): 2})
    assert path.read_text() == '{\n  "a": 1\n}\n' and [file.name for file in tmp_path.iterdir()] == ["run.json"]


UNUSUAL = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh\x00i\ud83dj\ufeffk😀"  # line ends of Python's, NUL, half a pair, BOM


def test_no_text_makes_a_file_unreadable(tmp_path: Path) -> None:
    rows = [{"task": "t", "answer": UNUSUAL, UNUSUAL: 1}, {"task": "t", "answer": "z"}]
    write_jsonl(tmp_path / SAMPLES_NAME, rows)
    write_json(tmp_path / "run.json", {"name": UNUSUAL})
    assert read_samples(tmp_path / "run.json") == {"t": rows}
    assert read_json(tmp_path / "run.json") == {"name": UNUSUAL}
    (tmp_path / SAMPLES_NAME).write_bytes(b"\xef\xbb\xbf" + (tmp_path / SAMPLES_NAME).read_bytes() + b"\n\n")
    assert read_samples(tmp_path / "run.json") == {"t": rows}


@pytest.mark.parametrize("line", ["{", "[1]", '{"task": 3}', '"text"', "[" * 100_000, '{"task": "caf\xe9"}'])
def test_answers_that_are_none_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / SAMPLES_NAME).write_bytes(b'{"task": "t"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ManifestError, match=r"samples.jsonl: not the answers of a run \("):
        read_samples(tmp_path / "run.json")


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": ["gqa"]},
        {"tasks": {"gqa": None}},
        {"tasks": {"gqa": {"metrics": [], "num_samples": 1}}},
        {"tasks": {"gqa": {"metrics": {"exact_match": 0.5}, "num_samples": 1}}},
        {"tasks": {"gqa": {"metrics": {"exact_match": {"value": "0.5"}}, "num_samples": 1}}},
        {"compressor": "VisionZip"},
        {"compressor": {"name": None}},
        {"compressor": None},
        {"model": "m"},
        {"visual_tokens": 64},
        {"judge": []},
        {"config": "x"},
    ],
    ids=str,
)
def test_a_record_of_another_shape_is_none(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "run.json"
    write_json(path, record())
    assert read_record(tmp_path)["kind"] == "evaluation"
    write_json(path, record() | change)
    with pytest.raises(ManifestError, match=f"is not an evaluation record: .*{next(iter(change))}"):
        read_record(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b"", b"null", b"3"])
def test_a_file_that_is_no_record_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ManifestError, match=r"run\.json is not (JSON|an evaluation record)"):
        read_record(tmp_path)


def test_a_full_disk_leaves_the_old_file_and_nothing_half(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"a": 1})
    for name in ("run.json", "other.json"):
        with no_room(), pytest.raises(RunWriteError, match=f"{name}: cannot be written"):
            write_json(tmp_path / name, {"b": "x" * 100_000})
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"] and read_json(tmp_path / "run.json") == {"a": 1}


def test_a_plot_takes_its_place_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError), written_aside(tmp_path / "plot.png") as aside:
        assert aside.suffix == ".png"  # by which a plot's format is told
        aside.write_bytes(b"half")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with written_aside(tmp_path / "plot.png") as aside:
        aside.write_bytes(b"whole")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("plot.png", b"whole")]

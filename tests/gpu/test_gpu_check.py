"""scripts/gpu_check.sh: what it makes of its parts, and all of it in small on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import gpu_records

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gpu_check.sh"
PASSED = '<testcase classname="a" name="good" time="0.1"/>'
SKIPPED = '<testcase classname="a" name="left" time="0"><skipped message="no device"/></testcase>'
FAILED = '<testcase classname="a" name="bad" time="1"><failure message="1 != 2"/></testcase>'


def work(folder: Path, parts: str, cases: str | None = None, **logs: str) -> Path:
    (folder / "parts").write_text(parts)
    for name, text in logs.items():
        (folder / f"{name}.log").write_text(text)
    if cases is not None:
        (folder / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return folder


def test_a_part_that_failed_or_ran_too_long_is_told(tmp_path: Path) -> None:
    folder = work(tmp_path, "one 0 5\ntwo 1 3\nthree 124 60\n", two="warning\nerror: no room\n", three="")
    parts, records = gpu_records.gather(folder)
    assert records == {} and {name: part["seconds"] for name, part in parts.items()} == {
        "one": 5,
        "two": 3,
        "three": 60,
    }
    assert parts["one"]["failure"] is None and "error: no room" in parts["two"]["failure"]
    assert parts["three"]["failure"] == "ran past its time"


@pytest.mark.parametrize(("cases", "failure"), [(PASSED, None), (PASSED + SKIPPED, "1 of 2"), ("", "no test")])
def test_a_test_that_did_not_run_counts_as_failed(cases: str, failure: str | None, tmp_path: Path) -> None:
    parts, records = gpu_records.gather(work(tmp_path, "tests 0 9\n", cases))
    told = parts["tests"]["failure"]
    assert told is None if failure is None else failure in told
    assert records["tests"]["num_passed"] == cases.count("good")


def test_failed_tests_and_a_missing_pytest_are_named(tmp_path: Path) -> None:
    parts, records = gpu_records.gather(work(tmp_path, "tests 1 9\n", PASSED + FAILED, tests="..F"))
    assert "a::bad" in parts["tests"]["failure"] and records["tests"]["not_passed"] == {"a::bad": "failure: 1 != 2"}
    (tmp_path / "tests.xml").unlink()
    (tmp_path / "tests.log").write_text("/usr/bin/python3: No module named pytest\n")
    parts, records = gpu_records.gather(tmp_path)
    assert "wheels of pytest" in parts["tests"]["failure"] and records == {}


def test_records_are_written_with_the_commit_that_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    work(tmp_path, "tests 0 9\nbroken 2 1\n", PASSED, broken="error: why")
    lost = {"commit": None, "dirty": None, "source_sha256": "0"}
    monkeypatch.setattr(gpu_records, "environment", lambda _device: {"code": dict(lost)})
    monkeypatch.setenv("COMMIT", "abc")
    monkeypatch.setattr(sys, "argv", ["gpu_records.py", str(tmp_path), str(out), "--small"])
    assert gpu_records.main() == 1
    assert sorted(path.name for path in out.iterdir()) == ["summary.json", "tests.json"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["environment"]["code"]["commit"] == "abc" and summary["parts"]["broken"]["failure"] == "error: why"
    assert "FAILED broken: error: why" in capsys.readouterr().out


def test_parts_share_files() -> None:
    records = {"tests": {}, "llava_next_7b": {"a": 1}, "llava_next_13b": {"a": 2}, "qwen3_vl_8b": {"a": 3}}
    assert gpu_records.as_files(records) == {
        "tests": {},
        "llava_next": {"llava_next_7b": {"a": 1}, "llava_next_13b": {"a": 2}},
        "qwen_vl": {"qwen3_vl_8b": {"a": 3}},
    }


def test_the_limits_together_are_eight_minutes() -> None:
    limits = [int(limit) for limit in re.findall(r"\$\{long:-(\d+)\}", SCRIPT.read_text())]
    assert len(limits) == 10 and sum(limits) <= 460  # the table at the end needs the rest


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    done = subprocess.run([SCRIPT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "is not empty" in done.stderr
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2 and "--small OUTDIR" in done.stderr


@pytest.mark.whole
def test_everything_in_small(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([SCRIPT, "--small", tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert len(records) == 8 and all(re.fullmatch(r"[A-Za-z0-9._-]+\.json", path.name) for path in tmp_path.iterdir())
    for shared in ("llava_next", "qwen_vl", "llava15_7b_batch"):
        records |= records.pop(shared)
    for record in records.values():
        about = record["environment"]
        assert (
            about["command"] and about["hardware"]["cpu"] and about["versions"]["torch"] and "commit" in about["code"]
        )
    assert all(part["failure"] is None for part in records["summary"]["parts"].values())
    assert records["tests"]["num_passed"] == records["tests"]["num_tests"] > 50

    def tokens(name: str) -> dict[str, int]:
        methods = records[name]["methods"].items()
        return {method: found.get("training", found)["num_visual_tokens"] for method, found in methods}

    assert tokens("llava15_7b") == {"vanilla": 576, "vzip": 64, "eager_maps": 64}
    assert tokens("llava15_7b_batch") == tokens("llava15_7b_batch64") == {"vanilla": 576, "vzip": 64}
    assert tokens("llava_next_7b") == {"vanilla": 2880 + 48, "vzip": 160, "eager_maps": 160}
    assert tokens("llava_next_13b") == {"vzip": 160}
    assert tokens("qwen2_5_vl_7b") == tokens("qwen3_vl_8b") == {"vanilla": 1024, "vzip": 128}
    assert tokens("train_llava15_7b") == {"vanilla": 576, "vzip": 64}
    assert tokens("memory_llava15_7b") == {"vzip": 64}
    assert "gpu_check" in done.stdout.splitlines()[-60:][0] or "8 files in" in done.stdout

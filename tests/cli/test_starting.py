"""What a command does before its work begins: torch is not imported to say no, and ctrl-C is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vzip.cli import COMMANDS
from vzip.config.options import config_dir

ROOT = config_dir().parent
HEAVY = ("torch", "transformers", "lmms_eval", "datasets")
# Runs a program as it is typed, and says at its end which of them were imported.
PROBE = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr))
sys.argv = sys.argv[1:]
if sys.argv[0] == "vzip":
    runpy.run_module("vzip", run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
DOORS = [("eval.py",), ("train.py",), ("vzip", "eval"), ("vzip", "train"), *(("vzip", name) for name in COMMANDS)]


def started(*words: str, cwd: Path, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A program's end, with modules of a folder found before all others."""
    words = (str(ROOT / words[0]), *words[1:]) if words[0].endswith(".py") else words
    path = os.pathsep.join([*([str(first)] if first else []), str(ROOT / "src")])
    command = [sys.executable, "-c", PROBE, *words]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("door", DOORS, ids=" ".join)
def test_help_imports_nothing_heavy(door: tuple[str, ...], tmp_path: Path) -> None:
    done = started(*door, "--help", cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout) > 100, done.stderr
    assert done.stderr == "imported:\n"


@pytest.mark.parametrize(
    "line",
    [
        "eval.py modell=tiny",
        "eval.py budget=64",
        "eval.py +exp=llava15_7b_64",
        "train.py modell=tiny",
        "vzip eval budgt=64tok",
        "vzip bench modell=tiny",
        "vzip bench --train repeats=0",
        "vzip bench budget=64",
        "vzip chat bugdet=64tok",
        "vzip memory +exp=llava15_7b_64",
        "vzip prefetch +exp=llava15_7b_64",
        "vzip table 99",
        "vzip demo --limit 0",
        "vzip bnch",
    ],
)
def test_refusals_import_nothing_heavy(line: str, tmp_path: Path) -> None:
    done = started(*line.split(), cwd=tmp_path)
    assert done.returncode == 2 and "Error: " in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.endswith("\nimported:\n"), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("eval.py", "runs/scenes/tiny/visionzip-64tok/seed0/run.json"),
        ("eval.py budget=48tok +exp=tiny_64tok seed=1", "runs/scenes/tiny_64tok/visionzip-48tok/seed1/run.json"),
        ("train.py +exp=tiny_64tok", "runs/train/tiny_projector/tiny_64tok/visionzip-64tok/seed0/final/x"),
        ("vzip bench out=there", "there/bench.json"),
    ],
)
def test_an_existing_run_is_refused_first(line: str, file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    done = started(*line.split(), cwd=tmp_path)
    assert done.returncode == 2 and "RunExistsError: " in done.stderr and "overwrite=true" in done.stderr
    assert ("imported: torch" in done.stderr) == (line.startswith("vzip bench")), done.stderr


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("eval.py", "hydra"),
        ("eval.py", "rich"),
        ("eval.py", "torch"),
        ("train.py +exp=tiny_64tok", "hydra"),
        ("train.py +exp=tiny_64tok", "torch"),
        ("vzip eval", "hydra"),
        ("vzip list", "rich"),
        ("vzip bench", "torch"),
        ("vzip demo", "torch"),
        ("vzip chat", "hydra"),
    ],
)
def test_ctrl_c_while_a_module_is_imported(line: str, module: str, tmp_path: Path) -> None:
    slow = tmp_path / "slow" / module
    slow.mkdir(parents=True)
    (slow / "__init__.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    done = started(*line.split(), cwd=tmp_path, first=slow.parent)
    told = [text for text in done.stderr.splitlines() if not text.startswith("imported:")]
    assert done.returncode == 130 and told[-1].startswith("interrupted: nothing new is kept"), done.stderr
    assert done.stderr.count("interrupted:") == 1 and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["slow"]

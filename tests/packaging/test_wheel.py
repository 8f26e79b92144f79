"""The library alone: what the wheel holds, and what it does where nothing but its core requirements is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from vzip.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("configs", "data_manifests", "eval.py", "train.py")


def needed_files() -> set[str]:
    """What git knows of the folders and scripts that commands read, as it lies in the wheel."""
    listed = subprocess.run(["git", "ls-files", *NEEDED], cwd=ROOT, capture_output=True, text=True, check=True)
    return {f"vzip/_checkout/{name}" for name in listed.stdout.splitlines()}


def test_what_is_built_holds_every_recipe_and_manifest(tmp_path: Path) -> None:
    (tmp_path / "tree" / "src").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", *NEEDED, "src/vzip"):
        source, target = ROOT / name, tmp_path / "tree" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")]
    subprocess.run(command, cwd=tmp_path / "tree", check=True, capture_output=True)
    built = {str(path.relative_to(tmp_path / "built")) for path in (tmp_path / "built").rglob("*") if path.is_file()}
    package = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "vzip").rglob("*") if path.is_file()}
    lost = {name for name in package if "__pycache__" not in name} | needed_files()
    assert len(needed_files()) > 100 and not lost - built


def bare_environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def readme_lines() -> str:
    """README's ten lines of Python, on the built-in model."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search("## Ten lines of Python\n\n```python\n(.+?)```", text, re.DOTALL)
    assert found is not None and found[1].count("llava-hf/llava-1.5-7b-hf") == 1
    return found[1].replace("llava-hf/llava-1.5-7b-hf", "vzip/tiny")


HELP = f"""
from vzip.cli import main
for name in {list(COMMANDS)}:
    try:
        main([name, "--help"])
    except SystemExit as end:
        assert end.code == 0, name
"""
TRAINING = "+exp=tiny_64tok train.num_steps=2 train.samples_per_step=2 launcher.batch_size=1 data.num_images=50"
PROCESSES = "launcher=ddp launcher.device=cpu launcher.num_processes=2"

# In this order, in one empty folder: the words after `vzip`, the exit code, what must be printed.
SHOWN = [
    ("", 2, "usage: python -m vzip COMMAND"),
    ("--help", 0, "usage: python -m vzip COMMAND"),
    ("runs", 2, "runs: no such folder"),
    ("list", 0, "vzip eval +exp=..."),
    ("ask photo.jpg What budget=32tok", 0, "(32 visual tokens, 576 without compression)"),
    ("bench budget=64tok repeats=2 warmup=1", 0, "wrote runs/bench/tiny/"),
    ("demo --limit 1", 0, "written to runs/demo/"),
    ("table 1", 0, "vzip eval +exp=llava15_7b_64tok"),
    ("memory +exp=tiny_64tok", 0, "activations"),
    ("data download --list", 0, "gqa/images.zip"),
    ("data download --root .", 2, "needs the package httpx, which is not installed: pip install 'vzip[train]'."),
    ("data verify llava_v1_5_mix665k --root .", 2, "python -m vzip data download llava_v1_5_mix665k --root ."),
    ("eval --cfg job --resolve +exp=llava15_7b_64tok", 0, "num_dominant: 54"),
    ("eval --help", 0, "compressor: cdpruner, "),
    ("eval", 2, "the package lmms-eval, which is not installed: pip install 'vzip[eval]' && pip install --no-deps"),
    ("eval budgt=64tok", 2, "did you mean 'budget'?"),
    ("eval -m hydra/launcher=joblib budget=64tok,32tok", 2, "hydra-joblib-launcher, which is not installed: pip inst"),
    ("memory model=llava_local model.name_or_path=nowhere/at_all", 2, "nowhere/at_all"),
    (f"train {TRAINING} train.trackers=[wandb]", 2, "package wandb, which is not installed: pip install 'vzip[train]'"),
    (
        f"train {TRAINING} launcher=zero2_2cpu",
        2,
        "package deepspeed, which is not installed: pip install 'vzip[train]'",
    ),
    (f"train {TRAINING} {PROCESSES}", 0, "vzip/_checkout/train.py"),
]


@pytest.mark.whole
def test_the_wheel_in_a_fresh_environment(tmp_path: Path) -> None:
    """One test, so that the environment is made once however many processes run the tests."""

    def done(*command: object) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        environment = bare_environment()
        return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)

    def must(*command: object) -> str:
        ended = done(*command)
        assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}"
        return ended.stdout

    folder = tmp_path / "empty"
    folder.mkdir()
    must(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT)  # by way of the source distribution
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert not needed_files() - set(zipfile.ZipFile(wheel).namelist())
    venv.create(tmp_path / "venv", with_pip=True)
    python, vzip = (tmp_path / "venv" / "bin" / name for name in ("python", "vzip"))
    install = ("-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-compile")  # what is used is compiled
    must(python, *install, "-c", ROOT / "lock.txt", wheel)
    Image.new("RGB", (60, 40), "red").save(folder / "photo.jpg")
    assert "64" in must(python, "-c", readme_lines()).split()[-1]
    assert must(python, "-c", HELP).count("usage: python -m vzip ") == len(COMMANDS)
    wrong = []
    for words, code, said in SHOWN:
        ended = done(vzip, *words.split())
        told = ended.stdout + ended.stderr
        if ended.returncode != code or said not in told or "Traceback" in told:
            wrong.append(f"vzip {words}: code {ended.returncode}, {told[-1500:]}")
    assert not wrong, "\n\n".join(wrong)

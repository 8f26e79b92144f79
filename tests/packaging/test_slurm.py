"""scripts/slurm with a SLURM that runs everything here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one machine: srun starts the program, scontrol notes what it is asked."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (
        ("srun", f'echo "$SRUN_CPUS_PER_TASK" > {tmp_path}/cpus; exec "$@"'),
        ("scontrol", f'echo "$@" >> {tmp_path}/scontrol.log'),
    ):
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": sys.executable, "SLURM_CPUS_PER_TASK": "6"}
    return {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src"), **job}


def start(script: Path, words: list[str], slurm: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", str(script), *words], env=slurm, cwd="/")


def wait_for(is_so: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_time_limit_and_requeue(script: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    text = script.read_text()
    for option in ("--time=", "--requeue", "--signal=B:USR1@120", "--open-mode=append"):
        assert f"#SBATCH {option}" in text
    for file in (script, script.with_name("run.sh")):
        assert subprocess.run(["bash", "-n", str(file)]).returncode == 0

    program = tmp_path / "count.py"  # counts up to 5 and goes on where it was stopped
    program.write_text(
        "import sys, time, pathlib\n"
        "kept = pathlib.Path(sys.argv[1])\n"
        "while len(kept.read_text() if kept.exists() else '') < 5:\n"
        "    kept.open('a').write('.')\n"
        "    time.sleep(float(sys.argv[2]))\n"
    )
    kept = tmp_path / "kept"
    job = start(script, [str(program), str(kept), "60"], slurm)
    wait_for(lambda: kept.exists() and kept.read_text() == ".", 30)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n" and kept.read_text() == "."
    assert (tmp_path / "cpus").read_text() == "6\n"

    assert start(script, [str(program), str(kept), "0"], slurm).wait(timeout=30) == 0
    assert kept.read_text() == "....." and (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    assert start(script, [str(tmp_path / "fails.py")], slurm).wait(timeout=30) == 3


@pytest.mark.slow
def test_an_evaluation_goes_on_after_its_time_limit(slurm: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["eval.py", "eval.limit=40", "eval.batch_size=1", "eval.num_workers=0", f"paths.run_dir={run_dir}"]
    words += ["eval.tasks=[scenes_reading]"]
    kept = run_dir / "answers.partial.jsonl"
    job = start(ROOT / "scripts/slurm/one_node.sbatch", words, slurm)
    wait_for(lambda: kept.exists() and kept.read_text().count("\n") > 3, 240)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0 and not (run_dir / "run.json").exists()
    assert start(ROOT / "scripts/slurm/one_node.sbatch", words, slurm).wait(timeout=300) == 0
    record = json.loads((run_dir / "run.json").read_text())
    assert record["num_resumed_answers"] >= 3 and record["tasks"]["scenes_reading"]["num_samples"] == 40

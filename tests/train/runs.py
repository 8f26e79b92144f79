"""Trainings in processes of their own, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CURVE = ("step", "loss", "learning_rate", "grad_norm", "num_target_tokens", "num_visual_tokens")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in CURVE) for row in metrics(run_dir)]


SCRIPT = """
import sys
from pathlib import Path
from tests.train.kit import make_plan
from vzip.train.loop import train
from vzip.train.settings import LoraSettings

train(make_plan(Path(sys.argv[1]), **eval(sys.argv[2])))
"""


def run_processes(run_dir: Path, count: int, **changes: Any) -> subprocess.Popen[str]:
    script = run_dir.parent / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        [*command, str(run_dir), repr(changes)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(run_dir: Path, count: int, **changes: Any) -> None:
    """Runs the training in processes of its own, to its end."""
    ended = run_processes(run_dir, count, **changes)
    assert ended.wait(timeout=600) == 0, ended.stderr.read()[-3000:]  # type: ignore[union-attr]  # a pipe


def kill_after(run_dir: Path, count: int, checkpoint: str, **changes: Any) -> None:
    """Starts the training and ends all its processes by SIGKILL as soon as the checkpoint is there."""
    process = run_processes(run_dir, count, **changes)
    while process.poll() is None and not (run_dir / "checkpoints" / checkpoint).exists():
        time.sleep(0.001)
    # torchrun gives its workers sessions of their own: killing its group alone would let them finish the run.
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, workers)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (run_dir / "final").exists(), "it was too fast to be killed"

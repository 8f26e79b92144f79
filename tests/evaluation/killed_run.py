"""A run in processes of its own, one of which may be killed.

`killed_run.py CHECKPOINT TASKS RUN_DIR [RANK BATCHES]`: process RANK kills itself (SIGKILL) when it is about to
generate after BATCHES batches.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import vzip
from vzip.evaluation.run import evaluate
from vzip.results import provenance

TASKS = ("own_exact", "own_yesno", "own_text")
BATCH_SIZE = 3


class Runs:
    """Starts this file on a checkpoint of ``model`` in ``folder``."""

    def __init__(self, folder: Path, model: Any, processor: Any, include_path: Path) -> None:
        self.folder, self.include_path = folder, include_path
        model.save_pretrained(folder / "checkpoint")
        processor.save_pretrained(folder / "checkpoint")

    def __call__(
        self, name: str, *kill: str, processes: int = 1, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A run into ``folder / name``; it must succeed if ``check``."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = [__file__, str(self.folder / "checkpoint"), str(self.include_path), str(self.folder / name), *kill]
        done = subprocess.run(
            [sys.executable, *(torchrun if processes > 1 else []), *words],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stderr[-3000:]
        return done


def main(checkpoint: str, tasks: str, run_dir: str, rank: str = "none", num_batches: str = "0") -> None:
    provenance.source_sha256 = lambda: "the checkout may be worked on while the tests run"
    vlm = vzip.load_vlm(checkpoint, compressor=vzip.VisionZip(vzip.TokenBudget(5, 2)))
    generate, num_done = vlm.generate, 0
    dies = os.environ.get("RANK", "0") == rank

    def dying(**kwargs: Any) -> Any:
        nonlocal num_done
        if dies and num_done == int(num_batches):
            os.kill(os.getpid(), signal.SIGKILL)
        num_done += 1
        return generate(**kwargs)

    vlm.generate = dying  # type: ignore[method-assign]
    evaluate(vlm, tasks=TASKS, batch_size=BATCH_SIZE, include_path=Path(tasks), run_dir=Path(run_dir), progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])

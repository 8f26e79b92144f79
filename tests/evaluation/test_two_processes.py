"""Two processes share the questions and write one record."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vzip.evaluation.run import evaluate

SCRIPT = """
import sys
import vzip
from vzip.evaluation.run import evaluate

checkpoint, tasks, run_dir = sys.argv[1:]
vlm = vzip.load_vlm(checkpoint, compressor=vzip.VisionZip(vzip.TokenBudget(5, 2)))
evaluate(vlm, tasks=["own_exact"], limit=3, include_path=tasks, run_dir=run_dir, progress=False)
"""


@pytest.mark.slow
def test_equal_to_one_process(model, processor, vlm, include_path, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "script.py")]
    command += [str(tmp_path / "checkpoint"), str(include_path), str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    evaluate(vlm, tasks=["own_exact"], limit=3, include_path=include_path, run_dir=tmp_path / "one", progress=False)
    one, two = (tmp_path / name / "samples.jsonl" for name in ("one", "two"))
    assert one.read_text() == two.read_text()  # 3 questions: one rank has a padding request, which must not show
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert records[0]["tasks"] == records[1]["tasks"]
    assert records[0]["visual_tokens"] == records[1]["visual_tokens"]

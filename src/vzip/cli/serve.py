"""An OpenAI-compatible server of a compressed model: writes the `vllm serve` line for vzip's plug-in and runs it.

python -m vzip serve tiny budget=64tok
python -m vzip serve llava15_7b budget=64tok dry_run=true                           shows the line only
python -m vzip serve llava-hf/llava-1.5-7b-hf compressor=divprune budget=128tok --port 8000 --max-model-len 2048
python -m vzip serve DIR model.projector=runs/train/.../final budget=64tok          with a tuned projector

MODEL is a name in configs/model, a directory or a hub id. `key=value` words are as for eval.py: compressor, budget,
and of the model what a server has. From the first word that begins with a dash, everything is vLLM's and handed on.
It needs vLLM 0.31 or newer (`make .venv-vllm` installs one for CPUs). docs/serve.md has the rest.
"""

from __future__ import annotations

import argparse
import os
import sys

from vzip.config import serving


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name in configs/model, a directory or a hub id")
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="KEY=VALUE ... --VLLM-OPTION ...",
        help="budget=64tok, compressor=NAME, dry_run=true; then vLLM's own options",
    )


def main(arguments: argparse.Namespace) -> int:
    """Prints the line and becomes vLLM; everything that can be wrong is checked before."""
    plan = serving.serve_plan(arguments.model, arguments.words)
    if not plan.dry_run:
        serving.check_vllm()
    print(plan.shown(), flush=True)
    if plan.dry_run:
        return 0
    # In this process's place: signals reach vLLM alone, which ends its engine by them. This Python's, whose vzip it is.
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *plan.words])

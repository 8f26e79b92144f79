"""How many questions a second an evaluation answers: compressed in batches, vanilla one by one, transformers alone.

python scripts/bench_eval.py                   the built-in model on all of scenes, 64 tokens; minutes on two cores
python scripts/bench_eval.py --limit 40        a try

Four sides in one run, on the same questions:

  vanilla          eval.py without compression, eval.batch_size=1, each question encoding its own image
  transformers     a plain loop of transformers over batches of the compressed side's size, images in the file's order
  compressed_1     eval.py at 64 tokens, one by one: the answers that the next side must give
  compressed       eval.py at 64 tokens, eval.batch_size=auto

Times are from the first image opened to the last answer; the model's loading and lmms-eval's own work are left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import vzip
from vzip import log
from vzip.demo import benchmark
from vzip.demo.questions import TASKS
from vzip.demo.sweep import MAX_NEW_TOKENS, turns
from vzip.errors import RunExistsError, VzipError
from vzip.evaluation.answering.batching import cut, planned_size
from vzip.evaluation.run import evaluate
from vzip.progress import Progress
from vzip.results import provenance
from vzip.results.files import make_folder, write_json
from vzip.results.record import read_samples

BUDGET = vzip.TokenBudget(num_dominant=54, num_contextual=10)
GOALS = {"vanilla": 3.0, "transformers": 2.0}

Answers = dict[tuple[str, int], str]


def by_eval(vlm: vzip.CompressedVlm, folder: Path, limit: int | None, **settings: Any) -> tuple[float, Answers]:
    """Seconds and answers of one evaluation."""
    with TemporaryDirectory() as run_dir:
        tasks = list(benchmark.TASK_NAMES)
        record = evaluate(vlm, tasks=tasks, include_path=folder, run_dir=run_dir, limit=limit, **settings)
        rows = [row for of_task in read_samples(Path(run_dir)).values() for row in of_task]
    return record["answering_time_s"], {(row["task"], row["doc_id"]): row["answer"] for row in rows}


def by_transformers(vlm: vzip.CompressedVlm, folder: Path, limit: int | None, batch_size: int) -> tuple[float, Answers]:
    """The same of Hugging Face's processor and model alone."""
    model: Any = vlm.model
    processor: Any = vlm.processor
    answers: Answers = {}
    rows = [(f"scenes_{t}", n, row) for t in TASKS for n, row in enumerate(benchmark.load_rows(folder, t)[:limit])]
    started = time.perf_counter()
    with Progress("answering with transformers", "questions", len(rows)) as progress, torch.no_grad():
        for part in cut(range(len(rows)), batch_size):
            batch = [rows[number] for number in part]
            texts = [processor.apply_chat_template(turns(row), add_generation_prompt=True) for _, _, row in batch]
            images = [Image.open(folder / row["image"]).convert("RGB") for _, _, row in batch]
            inputs = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
            inputs = inputs.to(model.device)
            new = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            said = processor.batch_decode(new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers |= {(task, n): text.strip() for (task, n, _), text in zip(batch, said, strict=True)}
            progress.advance(len(batch))
    return time.perf_counter() - started, answers


def measure(vlm: vzip.CompressedVlm, folder: Path, limit: int | None) -> Iterator[tuple[str, float, Answers]]:
    """Each side's seconds and answers."""
    one_by_one: dict[str, Any] = {"batch_size": 1, "visual_cache_gib": 0}
    for name, compressor, settings in (
        ("vanilla", vzip.Identity(), one_by_one),
        ("transformers", vzip.Identity(), None),
        ("compressed_1", vzip.VisionZip(BUDGET), one_by_one),
        ("compressed", vzip.VisionZip(BUDGET), {"batch_size": "auto"}),
    ):
        vlm.compressor = compressor
        if settings is None:
            yield name, *by_transformers(vlm, folder, limit, planned_size("auto", vlm.device))
        else:
            yield name, *by_eval(vlm, folder, limit, **settings)


def share_equal(one: Answers, other: Answers) -> float:
    """Share of the questions of ``one`` that both answer alike."""
    return sum(other[key] == answer for key, answer in one.items()) / len(one)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=None, help="questions a task (default: all 400)")
    parser.add_argument("--model", default="vzip/tiny", help="checkpoint (default: the built-in model)")
    parser.add_argument("--device", default=None, help="as model.device_map (default: the CPU)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_eval.json"), help="the record to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the record")
    args = parser.parse_args(words)
    if args.out.exists() and not args.overwrite:
        raise RunExistsError(f"{args.out} exists: name another file with --out, or replace it with --overwrite.")
    make_folder(args.out.parent)
    vlm = vzip.load_vlm(args.model, compressor=vzip.Identity(), device_map=args.device)
    folder, seconds, answers = benchmark.prepare(), dict[str, float](), dict[str, Answers]()
    for name, took, said in measure(vlm, folder, args.limit):
        seconds[name], answers[name] = took, said
    rates = {name: len(answers[name]) / took for name, took in seconds.items()}
    record = {
        "kind": "bench_eval",
        "model": args.model,
        "num_questions": len(answers["vanilla"]),
        "batch_size": planned_size("auto", vlm.device),
        "seconds": seconds,
        "samples_per_s": rates,
        "ratios": {name: rates["compressed"] / rates[name] for name in GOALS},
        "equal_answers": {
            "compressed_to_compressed_1": share_equal(answers["compressed"], answers["compressed_1"]),
            "vanilla_to_transformers": share_equal(answers["vanilla"], answers["transformers"]),
        },
        "code": provenance.code_state(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
    }
    write_json(args.out, record)
    show(record)
    print(f"wrote {args.out}")
    return 0


def show(record: dict[str, Any]) -> None:
    """Prints a record."""
    table = Table(title=f"{record['num_questions']} questions, batches of {record['batch_size']}", title_justify="left")
    for column in ("side", "seconds", "questions/s", "compressed is"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, took in record["seconds"].items():
        ratio = record["samples_per_s"]["compressed"] / record["samples_per_s"][name]
        goal = f" (goal {GOALS[name]:g}x)" if name in GOALS else ""
        table.add_row(name, f"{took:.1f}", f"{record['samples_per_s'][name]:.2f}", f"{ratio:.2f}x{goal}")
    console = Console()
    console.print(table)
    for name, share in record["equal_answers"].items():
        console.print(f"equal answers, {name.replace('_to_', ' to ')}: {share:.2%}", highlight=False)


if __name__ == "__main__":
    log.setup()
    try:
        sys.exit(main())
    except VzipError as error:
        sys.exit(log.tell_error(error))

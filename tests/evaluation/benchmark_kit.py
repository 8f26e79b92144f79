"""Runs one benchmark on a few questions in its data set's own schema, with given answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lmms_eval import tasks as lmms_eval_tasks

from vzip.evaluation.benchmarks.catalog import OWN_TASKS
from vzip.evaluation.benchmarks.protocols import PROTOCOLS
from vzip.evaluation.run import evaluate
from vzip.results.record import read_samples

INSTALLED = Path(lmms_eval_tasks.__file__).parent


@dataclass
class Outcome:
    """What came of it: the record, its entry, the rows of samples.jsonl, and the images shown with each prompt."""

    record: dict[str, Any]
    entry: dict[str, Any]
    rows: list[dict[str, Any]]
    pictures: dict[str, list[Any]]

    def value(self, metric: str) -> float:
        return self.entry["metrics"][metric]["value"]

    def error(self, metric: str) -> tuple[float, str]:
        metrics = self.entry["metrics"][metric]
        return metrics["standard_error"], metrics["standard_error_source"]


def task_file(task: str) -> Path:
    """vzip's file of a task, or lmms-eval's."""
    return [*OWN_TASKS.glob(f"*/{task}.yaml"), *INSTALLED.glob(f"*/{task}.yaml")][0]


@dataclass
class Benchmarks:
    """``run`` evaluates a task that is the given one in everything but its name and its data."""

    scripted: Callable[..., Any]
    write_parquet: Callable[..., None]
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def run(
        self,
        task: str,
        questions: list[dict[str, Any]],
        said: Mapping[str, str],
        extra: str = "",
        member: str = "tag",
        **kwargs: Any,
    ) -> Outcome:
        """``said`` is the answer by a piece of the prompt; ``extra`` further lines of the task file; ``member``: what
        the included file calls what it belongs to; the rest goes to ``evaluate``."""
        tasks = self.folder / "tasks"
        tasks.mkdir(exist_ok=True)
        data, name = tasks / "data.parquet", f"own_{task}"
        self.write_parquet(questions, data)
        split = PROTOCOLS[task].split.rpartition("/")[2]
        (tasks / f"{name}.yaml").write_text(
            f"include: {task_file(task)}\ntask: {name}\n{member}: []\ndataset_path: parquet\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{{split}: {data}}}}}\n{extra}"
        )
        self.monkeypatch.setitem(PROTOCOLS, name, PROTOCOLS[task])
        vlm = self.scripted(lambda prompt: next(answer for piece, answer in said.items() if piece in prompt))
        run_dir = self.folder / "run"
        record = evaluate(
            vlm, tasks=[name], include_path=tasks, run_dir=run_dir, progress=False, overwrite=True, **kwargs
        )
        shown = dict(zip(vlm.prompts, vlm.pictures, strict=True))
        return Outcome(record, record["tasks"][name], read_samples(run_dir)[name], shown)

"""An evaluation in Weights & Biases: its scores as a table, retention as a plot, a few answers with their images.

It is told after the record is on disk, on a thread of its own: an evaluation neither fails with it nor waits long.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vzip.analysis.kept import draw_kept
from vzip.analysis.plots import plot_retention
from vzip.errors import VzipError
from vzip.results.method_label import method_labels
from vzip.results.record import RECORD_NAME, Run, is_vanilla_of, metrics_of, runs_beside, score_of
from vzip.results.sweep_summary import Job, plot_points, summarise
from vzip.results.wandb_runs import CLOSE_SECONDS, start_wandb, trouble

if TYPE_CHECKING:
    from vzip.evaluation.answering.questions import Key
    from vzip.models.vlm import CompressedVlm

logger = logging.getLogger(__name__)

PLOT_NAME = "retention.png"
_SCORES = ("task", "metric", "value", "standard_error", "unit", "questions")


@dataclass(frozen=True)
class ShownSample:
    """One answer with the image it is about, kept and merged patches drawn on it."""

    task: str
    question: str
    target: str
    answer: str
    image: Image.Image

    @property
    def caption(self) -> str:
        return f"{self.task}: {self.question}\nanswer: {self.answer}\nright: {self.target}"


def report_evaluation(
    vlm: CompressedVlm,
    run_dir: Path,
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    images: Mapping[Key, Image.Image],
) -> None:
    """Tells wandb of a finished evaluation; what goes wrong is a warning.

    Args:
        vlm: that was evaluated.
        run_dir: of the record; wandb's files go below it.
        record: of the evaluation.
        rows: of ``samples.jsonl``.
        images: of some of the questions.
    """
    samples = shown_samples(vlm, rows, images)
    try:
        plot = draw_retention(Run(run_dir / RECORD_NAME, record))
    except (OSError, VzipError) as error:
        logger.warning("no plot of retention (%s: %s)", type(error).__name__, error)
        plot = None
    thread = threading.Thread(target=_report, args=(run_dir, record, samples, plot), name="wandb", daemon=True)
    thread.start()
    thread.join(2 * CLOSE_SECONDS)
    if thread.is_alive():
        logger.warning("wandb did not finish within %g s and is left behind; the record is whole", 2 * CLOSE_SECONDS)


def shown_samples(
    vlm: CompressedVlm, rows: Sequence[Mapping[str, Any]], images: Mapping[Key, Image.Image]
) -> list[ShownSample]:
    """The answers to the questions whose images were kept, each image with what the compressor keeps of it."""
    by_id = {(row["task"], row["doc_id"]): row for row in rows if row["filter_index"] == 0}
    found = []
    for (task, doc_id, _), image in images.items():
        row = by_id.get((task, doc_id))
        if row is None:
            continue
        try:
            drawn = draw_kept(vlm, image, row["question"], answer=str(row["answer"]))
        except VzipError as error:
            logger.warning("task %s, question %d: no overlay (%s)", task, doc_id, error)
            continue
        found.append(ShownSample(task, row["question"], str(row["target"]), str(row["answer"]), drawn))
    return found


def draw_retention(run: Run) -> Path | None:
    """Draws retention against visual tokens over the runs beside this one that the same vanilla run is for.

    Returns:
        the image, beside the record; None where there is no vanilla run on the same questions.
    """
    beside = [other for other in runs_beside(run) if other.record["tasks"].keys() == run.record["tasks"].keys()]
    vanilla = next((other for other in reversed(beside) if is_vanilla_of(other.record, run.record)), None)
    if vanilla is None:
        return None
    others = [r for r in beside if r.path != vanilla.path and is_vanilla_of(vanilla.record, r.record)]
    drawn = [vanilla, *others]
    jobs = [Job(n, (label,), r) for n, (label, r) in enumerate(zip(method_labels(drawn), drawn, strict=True))]
    points = plot_points(summarise(jobs))
    if not points:
        return None
    out = run.path.with_name(PLOT_NAME)
    plot_retention(points, out, Path(str(run.record["model"].get("name_or_path") or run.record["model"]["class"])).name)
    return out


def _report(run_dir: Path, record: Mapping[str, Any], samples: Sequence[ShownSample], plot: Path | None) -> None:
    # What is not named here ends this thread alone, with a traceback.
    try:
        run = start_wandb(run_dir, record.get("config") or {})
        run.log(_content(record, samples, plot))
        run.finish(exit_code=0)
    except trouble() as error:
        logger.warning("wandb stopped (%s: %s); the record is whole", type(error).__name__, error)


def _content(record: Mapping[str, Any], samples: Sequence[ShownSample], plot: Path | None) -> dict[str, Any]:
    import wandb

    scores: list[list[Any]] = []
    numbers: dict[str, Any] = {}
    for task, entry in record["tasks"].items():
        for metric in metrics_of(record, task):
            score = score_of(record, task, metric)
            assert score is not None
            scores.append([task, metric, score.value, score.standard_error, entry["unit"], score.num_samples])
            numbers[f"{task}/{metric}"] = score.value
    content: dict[str, Any] = {**numbers, "scores": wandb.Table(columns=list(_SCORES), data=scores)}
    if samples:  # images with captions: those inside a table are not kept beside an offline run
        content["samples"] = [wandb.Image(sample.image, caption=sample.caption) for sample in samples]
    if plot is not None:
        content["retention"] = wandb.Image(str(plot))
    return content

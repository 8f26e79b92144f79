"""How long each row of a table takes on a GPU: measured where a record of that GPU tells it, else estimated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vzip.bench.forecast import Assumptions, Gpu, ModelWork, gpus, question_seconds, sample_seconds
from vzip.config.validate import build_pruner
from vzip.data.manifest import load_manifest, manifest_folder
from vzip.errors import ConfigError, ManifestError, nearest
from vzip.evaluation.answering.batching import AUTO
from vzip.evaluation.benchmarks.question_counts import num_questions
from vzip.evaluation.benchmarks.video_qa import VIDEO_SETS
from vzip.report.paper_tables import PaperTable
from vzip.results.record import Run
from vzip.sweep.plan import Planned, Todo, hours

if TYPE_CHECKING:
    from vzip.models.vlm import CompressedVlm

# Tokens of an answer where nothing was measured: a word or a letter; a sentence about a video; a paragraph.
SHORT, SENTENCE, PARAGRAPH = 4, 20, 150
_PARAGRAPHS = ("mmvet_direct", "llava_bench_wild")
MEASURED, ESTIMATED = "measured", "estimate"


@dataclass(frozen=True)
class Line:
    """One evaluation or training.

    Attributes:
        label: of its row.
        what: in words.
        count: questions or samples.
        hours: None where too little is known.
        source: ``MEASURED`` or ``ESTIMATED``.
        note: what is not in the hours.
    """

    label: str
    what: str
    count: int
    hours: float | None
    source: str
    note: str = ""


def find_gpu(name: str | None) -> Gpu:
    """Raises ConfigError for a GPU that is not known."""
    if name is None or name not in gpus():
        given = "is missing" if name is None else f"{name}: not known{nearest(name, gpus())}"
        raise ConfigError(f"--gpu {given}; with --hours give one of {', '.join(gpus())} (src/vzip/bench/gpus.json).")
    return gpus()[name]


def forecast(
    table: PaperTable,
    planned: Mapping[str, Planned],
    runs: Sequence[Run],
    gpu: Gpu,
    num_gpus: int,
    assumed: Assumptions,
) -> Iterator[Line]:
    """Each row's trainings and its evaluation, on ``num_gpus`` that share the work without loss."""
    told: set[Path] = set()
    for label, entry in planned.items():
        for training in entry.trainings:
            if training.final not in told:
                told.add(training.final)
                yield _training(label, training.config, gpu, num_gpus, assumed)
        wanted = [column.task for column in table.columns if column.task is not None]
        tasks = tuple(dict.fromkeys(wanted)) or tuple(entry.config["eval"]["tasks"])
        yield _evaluation(label, entry.config, tasks, runs, gpu, num_gpus, assumed)


def _evaluation(
    label: str,
    config: Mapping[str, Any],
    tasks: tuple[str, ...],
    runs: Sequence[Run],
    gpu: Gpu,
    num_gpus: int,
    assumed: Assumptions,
) -> Line:
    limit = config["eval"]["limit"]
    counts = {task: num_questions(task, limit) for task in tasks}
    known = {task: count for task, count in counts.items() if count is not None}
    measured = hours(Todo(label, "eval.py", (), config, tasks), runs, gpu.title)
    total, missing = sum(known.values()), [task for task in tasks if task not in known]
    if measured is not None:
        return Line(label, "evaluation", total, measured / num_gpus, MEASURED)
    note = f"without {', '.join(missing)}: number of questions unknown" if missing else ""
    if not known:
        return Line(label, "evaluation", 0, None, ESTIMATED, note)
    batch = config["eval"]["batch_size"]
    work = model_work(config)
    seconds = {
        length: question_seconds(work, gpu, assumed, length, 1 if batch == AUTO else batch)
        for length in {answer_tokens(task) for task in known}
    }
    total_s = sum(count * seconds[answer_tokens(task)] for task, count in known.items())
    return Line(label, "evaluation", total, total_s / 3600 / num_gpus, ESTIMATED, note)


def answer_tokens(task: str) -> int:
    """Tokens of an answer, assumed."""
    if task in VIDEO_SETS:
        return SENTENCE
    return PARAGRAPH if task in _PARAGRAPHS else SHORT


def _training(label: str, config: Mapping[str, Any], gpu: Gpu, num_gpus: int, assumed: Assumptions) -> Line:
    count, train = _num_samples(config), config["train"]
    if count is None:
        return Line(label, "training", 0, None, ESTIMATED, "number of samples unknown")
    tunes_language_model = "language_model" in train["parts"]
    # Back for the activations; for the weights too where they train; activations are computed twice.
    seconds = sample_seconds(model_work(config), gpu, assumed, 4 if tunes_language_model else 3)
    return Line(label, f"training ({', '.join(train['parts'])})", count, count * seconds / 3600 / num_gpus, ESTIMATED)


def _num_samples(config: Mapping[str, Any]) -> int | None:
    """Samples over all epochs; None where no manifest counts the data."""
    data, train = config["data"], config["train"]
    if train.get("num_steps") is not None:
        return int(train["num_steps"] * train["samples_per_step"])
    if data.get("kind") != "llava_json":
        return None
    for path in manifest_folder().glob("*.json"):
        try:
            manifest = load_manifest(path)
        except ManifestError:
            continue
        if Path(manifest.annotations).name == Path(data["json"]).name and manifest.num_samples is not None:
            return round(manifest.num_samples * _share(data["fraction"]) * train["num_epochs"])
    return None


def _share(fraction: float | str) -> float:
    numerator, _, denominator = str(fraction).partition("/")
    return float(numerator) / float(denominator or 1)


_WORK: dict[str, ModelWork] = {}


def model_work(config: Mapping[str, Any]) -> ModelWork:
    """What a configuration's model does for one prompt; from shapes alone."""
    from vzip.bench.memory.workload import blank_images, num_visual_tokens
    from vzip.config.memory_plan import model_shape
    from vzip.models.load import DTYPES

    model, compressor = {**config["model"], "projector": None}, config["compressor"]
    key = json.dumps([model, compressor, config["pruner"]], sort_keys=True, default=str)
    if key not in _WORK:
        shape = model_shape(model, compressor)
        vlm = shape.on_meta_device(DTYPES["float16"])  # type: ignore[arg-type]  # a dtype, not "auto"
        images = blank_images(vlm.adapter, num_frames=model["num_frames"])
        num_visual = num_visual_tokens(vlm, model["num_frames"])
        weights = sum(p.numel() * p.element_size() for p in vlm.adapter.language_model.parameters())
        text = vlm.model.config.get_text_config()
        vision = _vision_operations(vlm, images, num_visual)
        if (pruner := build_pruner(config["pruner"])) is not None:  # what its layers attend to on average
            num_visual = round(pruner.average(num_visual, text.num_hidden_layers) or num_visual)
        _WORK[key] = ModelWork(text, vision, num_visual, weights)
    return _WORK[key]


def _vision_operations(vlm: CompressedVlm, images: Mapping[str, Any], num_visual: int) -> int:
    from vzip.bench import flops
    from vzip.models.families import MiniGeminiAdapter, Qwen2_5VlAdapter
    from vzip.models.families.llava_base import LlavaBase

    adapter, config = vlm.adapter, vlm.model.config
    if isinstance(adapter, Qwen2_5VlAdapter):
        return adapter.tower.num_operations(images["image_grid_thw"].tolist())
    assert isinstance(adapter, LlavaBase)
    geometry = adapter.geometry
    num_crops = sum(shape.num_crops for shape in adapter.read_inputs(**images).shapes)
    num_layers = geometry.num_layers_to_run(adapter.select_layer)
    operations = flops.tower_formula(
        config.vision_config,
        num_layers=num_layers,
        num_crops=num_crops,
        has_cls=geometry.has_cls,
    )
    width = config.vision_config.hidden_size
    text_width = config.get_text_config().hidden_size
    of_unit = width * geometry.unit_side**2
    operations += flops.projector_formula(num_tokens=num_visual, vision_dim=of_unit, text_dim=text_width)
    if isinstance(adapter, MiniGeminiAdapter):
        side, tower = config.high_res_image_size, config.high_res_config
        operations += flops.convnext_formula(tower, image_size=side, num_images=1)
        operations += flops.mining_formula(
            num_patches=geometry.num_patches,
            window=(side // tower.patch_size) ** 2 // geometry.num_patches,
            patch_dim=width,
            num_channels=sum(tower.hidden_sizes),
            num_images=1,
        )
    return operations


def print_hours(lines: Sequence[Line], name: str, gpu: Gpu, num_gpus: int, assumed: Assumptions) -> None:
    """The lines, their sum, and everything that was assumed."""
    table = Table("row", "what")
    for heading in ("questions or samples", "hours"):
        table.add_column(heading, justify="right")
    table.add_column("by")
    table.add_column("")
    for line in lines:
        shown = "unknown" if line.hours is None else f"{line.hours:.2f}" if line.hours < 1 else f"{line.hours:.1f}"
        table.add_row(line.label, line.what, f"{line.count:,}" if line.count else "", shown, line.source, line.note)
    table.add_section()
    table.add_row("all", "", "", f"{sum(line.hours or 0 for line in lines):.1f}", "", "")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"estimate: {num_gpus} x {name} ({gpu.title}: {gpu.tflops:g} TFLOPS, {gpu.gb_per_s:g} GB/s, by {gpu.source});"
        f" {assumed.utilisation:.0%} of the operations and {assumed.bandwidth_share:.0%} of the bandwidth are reached;"
        f" {assumed.text_tokens} text tokens a prompt, {assumed.sample_text_tokens} a training sample; answers of"
        f" {SHORT} tokens, {SENTENCE} about a video, {PARAGRAPH} of mmvet_direct and llava_bench_wild; batches as"
        " eval.batch_size says (auto: counted as 1); trainings compute activations twice; several GPUs share without"
        " loss; weights in 16 bits, also where they are quantized. Not in it: loading, reading images, CPU work."
        " Whether it fits the memory says python -m vzip memory.",
    )

"""lmms-eval's results as rows and as a record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.results import provenance
from vzip.results.record import SCHEMA_VERSION

from .answering.answers import count_sizes
from .answering.generation import settings_for
from .benchmarks.catalog import shown_file, task_config
from .benchmarks.protocols import protocol_of
from .benchmarks.standard_errors import by_group, complete

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

    from vzip.models.vlm import CompressedVlm

    from .answering.answers import SampleLog
    from .answering.questions import Key
    from .lmms_eval.model import VzipLmms

# What lmms-eval logs about a sample beside its scores.
_NOT_SCORES = frozenset(
    {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media"}
)


def sample_rows(output: Mapping[str, Any], logs: Mapping[Key, SampleLog]) -> list[dict[str, Any]]:
    """One row a question: task, doc_id, question, prompt, target, answer, scores, num_visual_tokens.

    Where the data set names its questions, question_id too.
    A task with several answer filters has several rows a question, told apart by ``filter_index``. Where the
    data names the image that several questions are about (``Protocol.cluster``), ``cluster`` does too, and ``group``
    where it says what the score is told by (``Protocol.groups``).
    """
    rows: list[dict[str, Any]] = []
    for task, samples in output["samples"].items():
        protocol = protocol_of(task)
        named = {} if protocol is None else {"cluster": protocol.cluster, "group": protocol.groups}
        seen: dict[int, int] = {}
        of_task = []
        for sample in samples:
            doc_id = sample["doc_id"]
            log = logs[task, doc_id, 0]
            filter_index = seen.get(doc_id, 0)
            seen[doc_id] = filter_index + 1
            answers = sample["filtered_resps"]
            of_task.append(
                {
                    "task": task,
                    "doc_id": doc_id,
                    **({"question_id": sample["doc"]["question_id"]} if "question_id" in sample["doc"] else {}),
                    "filter_index": filter_index,
                    "question": next((text for text in sample["arguments"] if isinstance(text, str)), ""),
                    "prompt": log.prompt,
                    "target": sample["target"],
                    "answer": answers[0] if len(answers) == 1 else answers,
                    "scores": {key: value for key, value in sample.items() if key not in _NOT_SCORES},
                    "num_visual_tokens": log.num_visual_tokens,
                    **{key: sample["doc"][field] for key, field in named.items() if field in sample["doc"]},
                }
            )
        if protocol is not None and protocol.verdicts is not None:
            entries = [row["scores"][protocol.primary] for row in of_task]
            for entry, verdict in zip(entries, protocol.verdicts(entries), strict=True):
                entry |= verdict
        rows += sorted(of_task, key=lambda row: (row["filter_index"], row["doc_id"]))
    return rows


def build_record(
    *,
    vlm: CompressedVlm,
    lm: VzipLmms,
    manager: TaskManager,
    output: Mapping[str, Any],
    rows: list[dict[str, Any]],
    wall_time_s: float,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of ``run.json``; see ``vzip.results.record`` for its fields."""
    tasks: dict[str, Any] = {}
    data: dict[str, Any] = {}
    # lmms-eval sorts by name; a table reads best in the order that was asked for.
    asked = {name: order for order, name in enumerate(run["requested_tasks"])}
    for name, result in sorted(output["results"].items(), key=lambda item: asked.get(item[0], len(asked))):
        of_task = [row for row in rows if row["task"] == name]
        config = task_config(manager, name) if name in manager.all_tasks else {}
        tasks[name] = _task_entry(name, result, of_task, config)
        tasks[name]["protocol"] = _protocol_entry(
            name, manager, output["configs"].get(name) or config, run["gen_kwargs"]
        )
        if name in lm.task_dict:
            data[name] = provenance.data_of(config or output["configs"][name], lm.task_dict[name], of_task)

    code = provenance.code_state()
    reasons = []
    if run["limit"] is not None:
        reasons.append(f"limit={run['limit']}: only the first questions of each task were asked")
    if code["dirty"]:
        reasons.append("the checkout had changes that are not committed")
    if code["commit"] is None:
        reasons.append("not run from a checkout, so the code's commit is not known")
    if lm.problems:
        reasons.append(f"{len(lm.problems)} questions left out: their images or videos cannot be read")
    counts = [count for row in rows if row["filter_index"] == 0 for count in row["num_visual_tokens"]]
    budget = getattr(vlm.compressor, "budget", None)
    num_tokens = None if vlm.compressor.is_vanilla else vlm.adapter.tokens_per_crop(vlm.compressor)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluation",
        **run,
        "model": _model_entry(vlm),
        "compressor": {
            "name": type(vlm.compressor).__name__,
            "settings": repr(vlm.compressor),
            "num_dominant": getattr(budget, "num_dominant", None),
            "num_contextual": getattr(budget, "num_contextual", None),
            "num_tokens": num_tokens,
        },
        "visual_tokens": {
            "budget_per_crop": num_tokens,
            "measured_min": min(counts, default=None),
            "measured_max": max(counts, default=None),
            "num_images": len(counts),
        },
        "pruner": _pruner_entry(vlm, [log.layers for log in lm.samples.values()]),
        "tasks": tasks,
        "data": data,
        "code": code,
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "wall_time_s": round(wall_time_s, 3),
        "answering_time_s": round(lm.answering_time_s, 3),
        "tower_cache": None if vlm.adapter.tower_cache is None else vlm.adapter.tower_cache.counts,
        "visual_cache": {"num_encoded": lm.cache.num_encoded, "num_shown": lm.cache.num_shown},
        "num_processes": lm.processes.count,
        "batch_sizes": count_sizes(lm.batch_sizes),
        "num_resumed_answers": 0 if lm.store is None else len(lm.store.kept.answers),
        "num_damaged_lines": 0 if lm.store is None else lm.store.kept.num_damaged,
        "left_out": [
            {"task": task, "doc_id": doc_id, "problem": problem}
            for (task, doc_id, _), problem in sorted(lm.problems.items())
        ],
        "peak_memory_gib": provenance.peak_memory_gib(),
        "provisional": bool(reasons),
        "provisional_reasons": reasons,
    }


def _pruner_entry(vlm: CompressedVlm, layers: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What was dropped inside the language model; None without a pruner."""
    if vlm.pruner is None:
        return None
    schedules = sorted({tuple(image) for one in layers if one is not None for image in one["visual_tokens"]})
    averages = [sum(schedule) / len(schedule) for schedule in schedules]
    lengths = list(zip(*(one["cache_lengths"] for one in layers if one is not None), strict=True))
    return {
        "name": type(vlm.pruner).__name__,
        "settings": repr(vlm.pruner),
        "schedule": {
            "least": [min(counts) for counts in zip(*schedules, strict=True)],
            "most": [max(counts) for counts in zip(*schedules, strict=True)],
        },
        "average_min": min(averages, default=None),
        "average_max": max(averages, default=None),
        "cache_lengths": {"least": [min(layer) for layer in lengths], "most": [max(layer) for layer in lengths]},
    }


def _model_entry(vlm: CompressedVlm) -> dict[str, Any]:
    model = vlm.model
    return {
        "name_or_path": vlm.name_or_path,
        "revision": vlm.revision,
        "weights_sha256": provenance.weights_sha256(vlm.name_or_path),
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "num_parameters": model.num_parameters(),
        "preprocess": vlm.preprocess,
        "positions": vlm.positions,
        **({"compile": list(vlm.compiled_parts)} if vlm.compiled_parts else {}),
    }


def _task_entry(
    name: str, result: Mapping[str, Any], rows: list[dict[str, Any]], config: Mapping[str, Any]
) -> dict[str, Any]:
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in result.items():
        metric, _, answer_filter = key.partition(",")
        if not answer_filter or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if any(f"{metric},{answer_filter}".startswith(f"{other}_stderr") for other in _metric_names(result)):
            continue
        label = metric if answer_filter == "none" else f"{metric},{answer_filter}"
        given = result.get(f"{metric}_stderr,{answer_filter}")
        error = float(given) if isinstance(given, int | float) and math.isfinite(given) else None
        metrics[label] = {
            "value": float(value),
            "standard_error": error,
            "standard_error_source": None if error is None else "lmms-eval",
        }
    protocol = protocol_of(name)
    if protocol is not None:
        # Where the primary metric is a judge's, it comes later; the others stand in for it until then.
        waits = protocol.judge is not None and protocol.primary not in metrics
        for metric in list(metrics) if waits else [protocol.primary]:
            complete(metrics, metric, rows)
    listed = [str(entry["metric"]) for entry in config.get("metric_list") or []]
    primary = protocol.primary if protocol else next((m for m in [*listed, *metrics] if m in metrics), None)
    groups = by_group(primary, metrics[primary]["value"], rows) if primary in metrics else {}
    return {
        "primary_metric": primary if primary in metrics else None,
        "unit": protocol.unit if protocol else None,
        "chance": protocol.chance if protocol else None,
        "cluster": protocol.cluster if protocol and any("cluster" in row for row in rows) else None,
        "num_samples": len({row["doc_id"] for row in rows}),
        "metrics": metrics,
        **({"grouped_by": protocol.groups, "groups": groups} if protocol and groups else {}),
    }


def _protocol_entry(
    name: str, manager: TaskManager, config: Mapping[str, Any], overrides: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How a task was asked and scored, and by which file."""
    protocol, file = protocol_of(name), manager.task_index.get(name, {}).get("yaml_path")
    settings = settings_for(name, config.get("generation_kwargs") or {}, overrides or {})
    return {
        "task_file": shown_file(file) if isinstance(file, str | Path) else None,
        "split": protocol.split if protocol else config.get("test_split"),
        "prompt": protocol.prompt if protocol else None,
        "judge": protocol.judge if protocol else None,
        "difference": protocol.difference if protocol else None,
        "generation": {**dict(settings.kwargs), "until": list(settings.until)},
    }


def _metric_names(result: Mapping[str, Any]) -> list[str]:
    names = {key.partition(",")[0] for key in result if "," in key}
    return [name for name in names if "_stderr" not in name]

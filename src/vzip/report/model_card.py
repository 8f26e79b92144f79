"""The model card of tuned weights: what they were made from and how, what they reach, how they are used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import vzip
from vzip.models.hub import BUILT_IN_NAME, is_hub_id
from vzip.models.weights.tuned import tuned_with
from vzip.results.record import metrics_of, score_of, title_of, unit_factor
from vzip.results.stats import score_interval

_TASK_TYPE = "visual-question-answering"  # the hub's name for what the benchmarks are
# Of a training's settings those that concern its bookkeeping alone.
_NOT_TOLD = ("parts", "save_every", "keep_last", "trackers", "lora")


def model_card(
    name: str,
    header: Mapping[str, Any],
    training: Mapping[str, Any] | None,
    records: Sequence[Mapping[str, Any]],
    licence: str | None,
) -> str:
    """The card as Markdown, with the metadata that the hub reads.

    Args:
        name: the hub id, with ``@REVISION`` where the weights are on a branch.
        header: of the tuned weights, as it is published.
        training: the settings of the training (``train.json``), or None where they were not kept.
        records: of evaluations with these weights.
        licence: of the weights, as the hub names it; None: none is named.
    """
    base = header["base"]
    hub_id = name.partition("@")[0]
    # The hub shows its metadata without any remark, so what needs one stands in the text alone.
    plain = [record for record in records if not record["provisional"] and not _other_method(record, header)]
    results = [result for record in plain for result in eval_results(record)]
    data = ModelCardData(
        library_name="vzip",
        license=licence,
        base_model=None if base["name_or_path"] == BUILT_IN_NAME else base["name_or_path"],
        pipeline_tag="image-text-to-text",
        tags=["vzip", "visual-token-compression", *(["lora"] if header.get("lora_sha256") else [])],
        eval_results=results or None,
        model_name=hub_id.partition("/")[2] if results else None,
    )
    text = "\n".join(_body(name, header, training, records, licence))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    """The metrics of a record as the hub's metadata has them; fractions in percent."""
    found = []
    for task in record["tasks"]:
        source = (record.get("data") or {}).get(task) or {}
        path, revision = source.get("path"), source.get("revision")
        for metric, value, _, unit, _ in _scores(record, task):
            found.append(
                EvalResult(
                    task_type=_TASK_TYPE,
                    dataset_type=path if isinstance(path, str) and is_hub_id(path) else task,
                    dataset_name=task,
                    dataset_revision=revision if isinstance(revision, str) and revision else None,
                    metric_type=metric,
                    metric_name=f"{metric}, {unit}" if unit else metric,
                    metric_value=value,
                )
            )
    return found


def _scores(
    record: Mapping[str, Any], task: str
) -> Iterator[tuple[str, float, tuple[float, float] | None, str | None, int]]:
    """Of each metric: name, value, its 95 % interval by the standard error, unit, number of questions."""
    entry = record["tasks"][task]
    for metric in metrics_of(record, task):
        score = score_of(record, task, metric)
        assert score is not None
        unit = entry.get("unit") if metric == entry["primary_metric"] else None
        factor = unit_factor(unit, "percent", task) if unit == "fraction" else 1.0
        # The other metrics of a task in shares are shares too, as far as their values can be any.
        of = "fraction" if unit is None and entry.get("unit") == "fraction" else unit
        found = score_interval(score.value, score.standard_error, score.num_samples, of)
        interval = None if found is None else (factor * found[0], factor * found[1])
        shown = "percent" if unit == "fraction" else unit
        yield metric, round(factor * score.value, 4), interval, shown, score.num_samples


def _body(
    name: str,
    header: Mapping[str, Any],
    training: Mapping[str, Any] | None,
    records: Sequence[Mapping[str, Any]],
    licence: str | None,
) -> Iterator[str]:
    base, parts = header["base"], [*header.get("parts", []), *(["LoRA layers"] if header.get("lora_sha256") else [])]
    yield f"# {name.partition('@')[0].partition('/')[2]}"
    yield ""
    what = " and ".join(part.replace("_", " ") for part in parts) or "weights"
    yield (
        f"The tuned {what} of {_code(base['name_or_path'])} for compressed images: {_code(header['compressor'])}. This"
        " is not a whole model: vzip puts these weights into the base model, which is loaded as always."
    )
    yield from ("", "## Use", "", "```python", *_usage(name, header, _lora_under(header, training)), "```", "")
    under = _lora_under(header, training)
    also = f" model.adapter_path={under}" if under else ""
    command = f"python eval.py model.projector={name}{also}"
    yield f"Or, with the base model's option and this compressor: {_code(command)}."
    if under:
        yield ""
        yield f"They were tuned on top of the LoRA layers {_code(under)}, which are not among these files: load both."
    yield from ("", "## What it is", "")
    yield from _table(_facts(header, training))
    yield from ("", "## Training", "")
    if training is None:
        yield "The settings of the training were not kept beside the weights."
    else:
        yield from _table(_settings(training))
    yield from ("", "## Evaluation", "")
    if not records:
        yield "No evaluation was given with these weights."
    for record in records:
        yield from _evaluation(record)
        if other := _other_method(record, header):
            yield f"Not as they were trained: evaluated with {_code(other)}."
            yield ""
    yield from ("", "## Licence", "")
    own = f"These weights: {_code(licence)}." if licence else "The authors of these weights have named no licence."
    yield f"{own} {_licence_of_base(base['name_or_path'])}"


def _lora_under(header: Mapping[str, Any], training: Mapping[str, Any] | None) -> str | None:
    """Name of the LoRA layers that the base model was loaded with, which belong to it; None: without any."""
    path = _group(header, "loaded_lora").get("name_or_path") or _group(training, "model").get("adapter_path")
    return None if path is None else str(public(str(path)))


def _usage(name: str, header: Mapping[str, Any], lora_under: str | None) -> Iterator[str]:
    base = header["base"]
    method = re.sub(r"\b([A-Z]\w*)\(", lambda m: f"vzip.{m[0]}" if m[1] in vzip.__all__ else m[0], header["compressor"])
    yield from ("import vzip", "", "vlm = vzip.load_vlm(", f"    {base['name_or_path']!r},")
    if base["revision"]:
        yield f"    revision={base['revision']!r},"
    if lora_under:
        yield f"    adapter_path={lora_under!r},"
    yield from (f"    compressor={' '.join(method.split())},", f"    projector={name!r},", ")")


def _group(settings: Mapping[str, Any] | None, key: str) -> Mapping[str, Any]:
    """A group of a training's settings, empty where it has none: who calls ``vzip.train.loop`` names what he likes."""
    group = (settings or {}).get(key)
    return group if isinstance(group, dict) else {}


def _facts(header: Mapping[str, Any], training: Mapping[str, Any] | None) -> Iterator[tuple[str, object]]:
    base, of_model = header["base"], _group(training, "model")
    yield "base model", base["name_or_path"]
    yield "its revision", base["revision"] or "not recorded"
    yield "its class", base["model_class"]
    if under := _lora_under(header, training):
        digest = _group(header, "loaded_lora").get("sha256")
        yield "LoRA layers under it", under + (f" (SHA-256 {str(digest)[:12]}...)" if digest else "")
    if of_model.get("projector"):
        yield "started from the tuned weights", public(of_model["projector"])
    yield "compressor and budget", " or ".join(tuned_with(header))
    yield "parameters", f"{header['num_parameters']:,}" if "num_parameters" in header else "not recorded"
    for key in ("step", "validation_loss", "commit", "sha256"):
        if header.get(key) is not None:
            yield key.replace("_", " "), header[key]
    versions = header.get("versions") or {}
    told = [f"{package} {versions[package]}" for package in ("vzip", "torch", "transformers") if versions.get(package)]
    if told:
        yield "made with", ", ".join(told)


def _settings(training: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for key, value in _group(training, "data").items():
        if value is not None and key != "image_root":
            yield f"data.{key}", public(value)
    if training.get("num_samples") is not None:
        yield "samples", f"{training['num_samples']:,}"
    settings = _group(training, "train")
    for key, value in settings.items():
        if value is not None and key not in _NOT_TOLD:
            yield f"train.{key}", public(value)
    for key, value in _group(settings, "lora").items():
        yield f"train.lora.{key}", public(value)
    if training.get("seed") is not None:
        yield "seed", training["seed"]


def _evaluation(record: Mapping[str, Any]) -> Iterator[str]:
    recipe = (record.get("config") or {}).get("recipe")
    yield f"{_text(title_of(record))}{f', recipe {_code(recipe)}' if recipe else ''}. Intervals:"
    yield "95 %, by the score's standard error on these questions (of shares Wilson's)."
    yield ""
    yield "| benchmark | metric | score | 95 % interval | questions |"
    yield "|---|---|---:|---:|---:|"
    for task in record["tasks"]:
        for metric, value, interval, unit, num_samples in _scores(record, task):
            between = "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"
            label = f"{_code(metric)}{f' ({unit})' if unit else ''}"
            yield f"| {_code(task)} | {label} | {value:.4g} | {between} | {num_samples:,} |"
    yield ""
    for reason in record.get("provisional_reasons") or ():
        yield f"Provisional: {_text(reason)}"
        yield ""


def _other_method(record: Mapping[str, Any], header: Mapping[str, Any]) -> str | None:
    """The compressor and budget of an evaluation where they are not those that the weights were trained with."""
    evaluated = (record.get("compressor") or {}).get("settings")
    return None if str(evaluated).startswith(tuple(tuned_with(header))) else str(evaluated)


def _licence_of_base(name: str) -> str:
    if name == BUILT_IN_NAME:
        return "The base model is part of the package vzip and under its licence, Apache-2.0."
    return f"The base model has a licence of its own, which its page ({_text(name)}) names."


def public(value: object) -> object:
    """A setting as others may read it: of a path its last part, of a list each."""
    if isinstance(value, list | tuple):
        return ", ".join(str(public(each)) for each in value)
    if not isinstance(value, str) or (is_hub_id(value.partition("@")[0]) and value[0] != "."):
        return value
    return PureWindowsPath(PurePosixPath(value).name).name if re.search(r"[/\\]", value) else value


def _table(rows: Iterator[tuple[str, object]]) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    for label, value in rows:
        yield f"| {_text(label)} | {_code(value)} |"


def _text(value: object) -> str:
    """In a line of Markdown, meaning nothing but itself."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", line)


def _code(value: object) -> str:
    """As code in a line or in a cell: fenced by more backticks than it holds."""
    line = " ".join(str(value).split())
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}".replace("|", "\\|")

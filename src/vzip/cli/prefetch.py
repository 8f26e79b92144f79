"""Fetches what runs need from the hub, where there is a network, for machines that have none.

  python -m vzip prefetch +exp=llava15_7b_64tok                   a recipe's checkpoint and data sets
  python -m vzip prefetch +exp=llava15_7b_64tok +exp=llava15_7b_vanilla 'eval.tasks=[gqa,pope_splits]'
  python -m vzip prefetch table 1                                 what all rows of a table need
  python -m vzip prefetch table 1 --dry-run                       only what that is, with sizes
  python -m vzip prefetch +exp=llava15_7b_64tok --train-data DIR  training data too, into DIR
  python -m vzip prefetch +exp=llava15_7b_64tok > offline.sh      and on a compute node: . ./offline.sh

The words are eval.py's and train.py's. Standard output is the lines that a compute node's shell needs. Everything goes
into the hub client's own cache (HF_HOME, which must be on a disk that the compute nodes see); a mirror is named by
HF_ENDPOINT. Interrupted or failed: the same command again fetches what is left. Exit code 2 if something is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from vzip.config.build import resolved
from vzip.config.options import RECIPE_GROUP, config_dir
from vzip.config.overrides import check_overrides
from vzip.config.validate import BUILT_IN, VIDEO, validate
from vzip.data.manifest import Manifest, load_manifest, manifest_folder
from vzip.errors import CheckpointError, ConfigError, ManifestError, VzipError
from vzip.installed import program
from vzip.json_files import read_json
from vzip.log import USER_ERROR
from vzip.report.table_files import read_table
from vzip.sweep.plan import plan

_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


class Unreachable(VzipError, ConnectionError):
    """The hub does not answer at all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m vzip prefetch`."""
    parser.add_argument("words", nargs="+", metavar="word", help="+exp=RECIPE, group=option, key=value; or: table N")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be fetched, with sizes")
    parser.add_argument("--train-data", type=Path, metavar="DIR", help="fetch training data too, into a folder of DIR")


def main(args: argparse.Namespace) -> int:
    """Fetches and prints. Returns 2 if something could not be had."""
    configs = composed(args.words)
    hub = Hub()
    if hub.is_off and not args.dry_run:
        raise ConfigError(
            f"{hub.is_off} is set, so nothing may be fetched. Unset it, on a machine with a network (a login node);"
            f" where all is in the cache already ({hub.cache}), runs need no prefetch."
        )
    items: list[Checkpoint | TaskData] = [*checkpoints(configs, hub), *tasks(configs, hub)]
    trainings = list(training_sets(configs, args.train_data))
    _tell(f"hub: {hub.endpoint}; cache: {hub.cache}")
    describe(items, hub)
    failed, num_asked = {}, len(items)
    if not args.dry_run:
        check_token(items, hub)
        failed = fetch_all(items)
        if args.train_data is not None:
            failed |= fetch_all(trainings)
            num_asked += len(trainings)
    if trainings and args.train_data is None:
        _tell("training data, for train.py (or --train-data DIR):")
        for training in trainings:
            _tell(f"  {training.command}")
    if failed:
        _tell(f"{len(failed)} of {num_asked} could not be fetched; the same command again tries these:")
        for name, reason in failed.items():
            _tell(f"  {name}: {reason}")
        return USER_ERROR
    if not args.dry_run:
        print("\n".join(hub.exports()))
    return 0


def composed(words: Sequence[str]) -> list[dict[str, Any]]:
    """The configurations that words mean: one for each recipe, or those of a table's rows.

    Raises:
        ConfigError: naming every problem of the words.
    """
    if words[0] == "table":
        if len(words) < 2:
            raise ConfigError("table: which one? As `python -m vzip prefetch table 1` (python -m vzip table --help).")
        return [dict(row.config) for row in plan(read_table(words[1]), words[2:], Path("runs")).values()]
    start = f"+{RECIPE_GROUP}="
    recipes = [name for word in words if word.startswith(start) for name in word.removeprefix(start).split(",")]
    others = [word for word in words if not word.startswith(start)]
    lines = [[f"{start}{name}", *others] for name in recipes] or [others]
    configs = []
    for line in lines:
        check_overrides(line, config_dir(), "eval")
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            configs.append(resolved(compose("eval", line)))
        validate(configs[-1])
    return configs


class Hub:
    """The hub that HF_ENDPOINT names and the cache that HF_HOME names, as the installed client sees them."""

    def __init__(self) -> None:
        from huggingface_hub import constants

        self.endpoint = constants.ENDPOINT
        self.cache = constants.HF_HOME
        # lmms-eval takes a folder of one machine's own instead where this one is on a network disk, unless it is named.
        default = os.environ.get("HF_DATASETS_CACHE", str(Path(constants.HF_HOME) / "datasets"))
        self.datasets_cache = os.environ.setdefault("LMMS_EVAL_DATASETS_CACHE", default)

    @property
    def is_off(self) -> str | None:
        """The switch that keeps the client from asking, as it is set; None if it may ask."""
        from huggingface_hub import constants

        set_ones = [f"{name}={os.environ[name]}" for name in _SWITCHES if os.environ.get(name)]
        return ", ".join(set_ones) if set_ones and constants.HF_HUB_OFFLINE else None

    @cached_property
    def has_token(self) -> bool:
        """Whether somebody is logged in."""
        from huggingface_hub import get_token

        return get_token() is not None

    def files(self, kind: str, name: str, revision: str | None = None) -> dict[str, int | None] | None:
        """The files of a repository, with their bytes; None while the client may not ask.

        Args:
            kind: "model" or "dataset".
            name: owner and name.
            revision: branch, tag or commit.

        Raises:
            Unreachable: there is no answer.
            CheckpointError: the hub refuses: no such repository or revision, or no right to see it.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        from vzip.models.hub import TIMEOUT_S, HttpError

        if self.is_off:
            return None
        try:
            ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
            info: Any = ask(name, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
        except HfHubHTTPError as error:
            raise CheckpointError(f"{name}: {_first_line(error)}") from error
        except (HttpError, OSError) as error:
            raise Unreachable(
                f"{self.endpoint}: the hub does not answer ({_first_line(error)}). Run this where there is a network (a"
                " login node), or name a mirror by HF_ENDPOINT. Where all is in the cache already"
                f" ({self.cache}) a run needs HF_HUB_OFFLINE=1 alone; a checkpoint that lies elsewhere is given as"
                " model.name_or_path=DIR."
            ) from error
        return {sibling.rfilename: sibling.size for sibling in info.siblings or ()}

    def exports(self) -> Iterator[str]:
        """The lines for a compute node's shell."""
        yield f"export HF_HOME={shlex.quote(str(Path(self.cache).resolve()))}"
        yield f"export LMMS_EVAL_DATASETS_CACHE={shlex.quote(str(Path(self.datasets_cache).expanduser().resolve()))}"
        for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
            if name in os.environ:
                yield f"export {name}={shlex.quote(os.environ[name])}"
        if self.endpoint != "https://huggingface.co":
            yield f"export HF_ENDPOINT={shlex.quote(self.endpoint)}"
        for switch in _SWITCHES:
            yield f"export {switch}=1"


@dataclass(frozen=True)
class Checkpoint:
    """A model's repository, or a vision tower's.

    Attributes:
        name: owner and name.
        revision: branch, tag or commit.
        files: which of its files are needed, with their bytes; None while it is not known.
    """

    name: str
    revision: str | None
    files: Mapping[str, int | None] | None

    @property
    def title(self) -> str:
        return f"checkpoint {self.name}" + (f" at {self.revision[:12]}" if self.revision else "")

    @property
    def size(self) -> int | None:
        return None if self.files is None else sum(size or 0 for size in self.files.values())

    def fetch(self) -> None:
        from vzip.models import hub

        hub.Checkpoint(self.name, self.revision).fetch_weights()


@dataclass(frozen=True)
class TaskData:
    """A benchmark's data set, loaded as lmms-eval will load it.

    Attributes:
        task: its name.
        include_path: the folder of task files of one's own, or None.
        path: of the data set on the hub, or a format of local files.
        config: of the data set.
        size: of its files on the hub, of all splits: lmms-eval loads them all. None while it is not known.
        wants_token: whether the task file says that one must be logged in.
    """

    task: str
    include_path: str | None
    path: str
    config: str | None
    size: int | None
    wants_token: bool

    @property
    def title(self) -> str:
        return f"task {self.task}: {self.path}" + (f", {self.config}" if self.config else "")

    def fetch(self) -> None:
        """Builds the task, which loads all that it and its functions need.

        Raises:
            whatever loading raised, without lmms-eval's retries around it.
        """
        from lmms_eval.tasks import get_task_dict
        from tenacity import RetryError

        from vzip.evaluation.benchmarks.catalog import find_tasks
        from vzip.evaluation.lmms_eval.harness import quiet_logger

        with quiet_logger():
            manager = find_tasks([self.task], self.include_path)
            try:
                get_task_dict([self.task], manager, "chat")
            except RetryError as error:
                raise ManifestError(_first_line(error.last_attempt.exception())) from error


@dataclass(frozen=True)
class TrainingSet:
    """A training set that a manifest names.

    Attributes:
        manifest: which.
        root: where it goes, or None.
    """

    manifest: Manifest
    root: Path | None
    size: int | None = None

    @property
    def title(self) -> str:
        return f"training data {self.manifest.name}, into {self.root}"

    @property
    def command(self) -> str:
        return f"{program('data')} download {self.manifest.name} --root data/{self.manifest.name}"

    def fetch(self) -> None:
        from vzip.data.download import Downloader

        assert self.root is not None
        Downloader(self.manifest, self.root).run(self.manifest.files)
        annotations, images = self.root / self.manifest.annotations, self.root / self.manifest.image_root
        _tell(f"train.py takes it as: data.json={annotations} data.image_root={images}")


Item = Checkpoint | TaskData | TrainingSet


def checkpoints(configs: Sequence[Mapping[str, Any]], hub: Hub) -> list[Checkpoint]:
    """The repositories that the configurations' models, adapters and text models are in; local ones are left out.

    Raises:
        Unreachable: see ``Hub.files``.
        CheckpointError: a name that is neither a directory nor a hub id.
    """
    from vzip.config.validate import build_compressor
    from vzip.models.hub import BUILT_IN_NAME
    from vzip.models.load import resolve_checkpoint
    from vzip.models.towers.text import PINNED

    wanted: dict[tuple[str, str | None], None] = {}
    for config in configs:
        model = config["model"]
        if model["name_or_path"] != BUILT_IN_NAME:
            source = resolve_checkpoint(model["name_or_path"])
            if isinstance(source, str):
                wanted[source, model["revision"]] = None
            else:
                wanted |= dict.fromkeys(_beside_directory(source))
        adapter = model["adapter_path"]
        if adapter is not None and not Path(adapter).expanduser().is_dir():
            wanted[adapter, None] = None
        encoder = config["compressor"].get("text_encoder")
        if "of" in config["compressor"]:  # of a method around another, the other's
            encoder = build_compressor(config["compressor"]).text_encoder
        if encoder is not None and not Path(encoder).expanduser().is_dir():
            wanted[encoder, PINNED.get(encoder)] = None
    found = []
    for name, revision in wanted:
        try:
            found.append(Checkpoint(name, revision, _needed(hub.files("model", name, revision))))
            found += _beside(name, revision, found[-1].files, hub)
        except CheckpointError:  # no such repository, or not for everybody: it fails when its turn comes
            found.append(Checkpoint(name, revision, None))
    return list({(item.name, item.revision): item for item in found}.values())


def _needed(files: Mapping[str, int | None] | None) -> dict[str, int | None] | None:
    """Those of the files that a run reads."""
    from vzip.models.hub import needed_files

    return None if files is None else {name: files[name] for name in needed_files(files)}


def _beside(name: str, revision: str | None, files: Mapping[str, Any] | None, hub: Hub) -> Iterator[Checkpoint]:
    """What a repository in its authors' layout needs beside it."""
    from huggingface_hub import hf_hub_download

    if not files or "config.json" not in files:
        return
    for _, hub_id, commit in _parts(name, files, lambda file: Path(hf_hub_download(name, file, revision=revision))):
        if hub_id is not None:
            yield Checkpoint(hub_id, commit, _needed(hub.files("model", hub_id, commit)))


def _beside_directory(source: Path) -> Iterator[tuple[str, str | None]]:
    """What a directory in its authors' layout needs from the hub, by name and commit: what is not around it."""
    from vzip.models.families.original.checkpoint import local_folder

    names = [path.name for path in source.iterdir()]
    if "config.json" not in names:
        return
    for named, hub_id, commit in _parts(str(source), names, source.joinpath):
        if hub_id is not None and local_folder(source, named, hub_id) is None:
            yield hub_id, commit


def _parts(
    name: str, files: Iterable[str], path_of: Callable[[str], Path]
) -> Iterator[tuple[str, str | None, str | None]]:
    """Vision towers, and the language model of LoRA layers or of a projector alone: as named, repository, commit."""
    from vzip.models.families.original.checkpoint import HUB_REVISIONS, tower_hub_id
    from vzip.models.families.original.llava import LORA_CONFIG, PROJECTOR_NAME
    from vzip.models.families.original.tensors import CHECKPOINT_FILES
    from vzip.models.hub import is_hub_id

    def read(file: str) -> dict[str, Any]:
        try:
            return dict(read_json(path_of(file)))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{name}: its {file} cannot be read ({error}).") from error

    fields, files = read("config.json"), set(files)
    towers = ("mm_vision_tower", "mm_vision_tower_aux", "mm_image_tower", "mm_video_tower")
    for named in (str(fields[key]) for key in towers if fields.get(key)):
        hub_id = tower_hub_id(named)
        yield named, hub_id, HUB_REVISIONS.get(hub_id or "")
    base = None
    if fields.get("mm_vision_tower") and LORA_CONFIG in files:
        base = read(LORA_CONFIG).get("base_model_name_or_path")
    elif fields.get("mm_vision_tower") and PROJECTOR_NAME in files and not files & set(CHECKPOINT_FILES):
        base = fields.get("_name_or_path")
    if base:
        yield str(base), str(base) if is_hub_id(str(base)) else None, None


def tasks(configs: Sequence[Mapping[str, Any]], hub: Hub) -> list[TaskData]:
    """The benchmarks that the configurations ask; those whose files are local or generated are left out.

    Raises:
        ConfigError: an unknown task.
    """
    from vzip.evaluation.benchmarks.catalog import find_tasks, task_config
    from vzip.evaluation.lmms_eval.harness import check_lmms_eval, quiet_logger

    wanted: dict[tuple[str, str | None], None] = {}
    for config in configs:
        include_path = config["eval"]["include_path"]
        if include_path == VIDEO:
            _tell("the video benchmarks are fetched by hand: data_manifests/video_qa.json says from where")
        elif include_path != BUILT_IN:
            wanted |= dict.fromkeys((task, include_path) for task in config["eval"]["tasks"])
    if not wanted:
        return []
    check_lmms_eval()
    found = []
    with quiet_logger():
        for include_path in dict.fromkeys(folder for _, folder in wanted):
            names = [task for task, folder in wanted if folder == include_path]
            manager = find_tasks(names, include_path)
            for name in names:
                fields = task_config(manager, name)
                kwargs = fields.get("dataset_kwargs") or {}
                path, part = str(fields.get("dataset_path")), fields.get("dataset_name")
                if "data_files" in kwargs or kwargs.get("load_from_disk"):
                    continue
                size = published_size(path, part) if hub.is_off else _dataset_size(path, part, hub, kwargs)
                found.append(TaskData(name, include_path, path, part, size, kwargs.get("token") is True))
    return found


def published_size(path: str, config: str | None) -> int | None:
    """Bytes of a data set by public pages; None where none was found."""
    text = (resources.files("vzip.evaluation.benchmarks") / "data_sizes.json").read_text(encoding="utf-8")
    entry = json.loads(text)["data_sets"].get(f"{path}, {config}" if config else path, {})
    size: int | None = entry.get("num_bytes")
    return size


def _dataset_size(path: str, config: str | None, hub: Hub, kwargs: Mapping[str, Any]) -> int | None:
    """Bytes of a data set's configuration, of one with videos of all its files; None where the hub does not say."""
    import datasets

    try:
        sizes = hub.files("dataset", path, kwargs.get("revision")) or {}
        if kwargs.get("video"):
            return sum(size or 0 for size in sizes.values())
        # Whether one must be logged in the hub says when the data is fetched.
        files = datasets.load_dataset_builder(path, config).config.data_files or {}
    except Unreachable:
        raise
    except (OSError, ValueError):
        return None
    names = {url.partition("@")[2].partition("/")[2] for urls in files.values() for url in urls}
    return sum(sizes.get(name) or 0 for name in names)


def training_sets(configs: Sequence[Mapping[str, Any]], folder: Path | None) -> Iterator[TrainingSet]:
    """The training sets that recipes which train name and a manifest knows."""
    names = {Path(config["data"]["json"]).name for config in configs if config["data"].get("kind") == "llava_json"}
    for path in sorted(manifest_folder().glob("*.json")):
        try:
            manifest = load_manifest(path)
        except ManifestError:  # generated, or fetched by hand
            continue
        if Path(manifest.annotations).name in names:
            yield TrainingSet(manifest, None if folder is None else folder.expanduser() / manifest.name)


def describe(items: Sequence[Checkpoint | TaskData], hub: Hub) -> None:
    """Lists what is needed, with a total."""
    shared: dict[tuple[str, str | None], int | None] = {}
    for item in items:
        key = (item.path, item.config) if isinstance(item, TaskData) else (item.name, item.revision)
        again = " (as before)" if key in shared else ""
        shared[key] = item.size
        _tell(f"  {item.title}: {_gigabytes(item.size)}{again}")
    known = [size for size in shared.values() if size is not None]
    if hub.is_off:
        _tell(f"{len(shared)} repositories; {hub.is_off}: the hub was not asked; sizes are those that its pages give")
        return
    unknown = f", and {len(shared) - len(known)} of unknown size" if len(known) < len(shared) else ""
    place = Path(hub.cache)
    while not place.exists():
        place = place.parent
    _tell(
        f"{len(shared)} repositories, {_gigabytes(sum(known))}{unknown}; data sets take about as much again once they"
        f" are unpacked. Free at {hub.cache}: {_gigabytes(shutil.disk_usage(place).free)}"
    )


def check_token(items: Sequence[Checkpoint | TaskData], hub: Hub) -> None:
    """Raises ConfigError where lmms-eval will ask for a login that is not there."""
    asking = [item.task for item in items if isinstance(item, TaskData) and item.wants_token]
    if asking and not hub.has_token:
        raise ConfigError(
            f"tasks {', '.join(asking)}: lmms-eval's task files fetch their data as a user of the hub (token: true),"
            " and nobody is logged in. Run `hf auth login`, or set HF_TOKEN; nothing was fetched. Compute nodes need no"
            " token."
        )


def fetch_all(items: Sequence[Item]) -> dict[str, str]:
    """Fetches everything, one after another; a failure loses no other.

    Returns:
        what failed, and why.
    """
    from vzip.models.hub import HttpError

    failed: dict[str, str] = {}
    for number, item in enumerate(items, 1):
        _tell(f"{number}/{len(items)} {item.title}, {_gigabytes(item.size)}")
        try:
            item.fetch()
        except (VzipError, HttpError, OSError, ValueError) as error:
            failed[item.title] = _first_line(error)
            _tell(f"  failed: {failed[item.title]}")
    return failed


def _first_line(error: BaseException | None) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def _gigabytes(size: int | None) -> str:
    if size is None:
        return "size unknown"
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

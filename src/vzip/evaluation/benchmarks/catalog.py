"""Which lmms-eval tasks there are: the built-in ones, vzip's (``tasks/``) and those of a folder of one's own."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.errors import ConfigError, MissingPackageError, UnsupportedModelError, nearest
from vzip.installed import missing_package

from .protocols import PROTOCOLS, protocol_of
from .task_names import OWN_TASKS as OWN_TASKS
from .video_qa import VIDEO_SETS

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

# Scored by a judge in the middle of the run, with a score even where the call failed -> what to run instead.
_JUDGED_BY_LMMS_EVAL = {
    "mmvet": "mmvet_direct",
    "llava_in_the_wild": "llava_bench_wild",
    "activitynetqa": "activitynet_qa_zero_shot",
    "mmbench_en_dev": "mmbench_en_dev_static",
    "hallusion_bench_image": "hallusion_bench_rules",
    **dict.fromkeys(
        (
            f"mathvista{part}"
            for part in ("", "_testmini", *(f"_testmini_{way}" for way in ("cot", "format", "solution")))
        ),
        "mathvista_rules",
    ),
}
# Of tasks that are in no list: metrics that lmms-eval names after the judge.
_OF_JUDGE = re.compile(r"gpt4?_|llm_(as_judge|match)|llmms_eval|\w*_llm_judge")
# Their files cannot be read without packages that decode videos, which vzip does by itself -> what to run instead.
_DECODED_BY_LMMS_EVAL = {"videomme": "videomme_frames", "longvideobench_val_v": "longvideobench_frames"}
# What lmms-eval reads captions with, by package: name and place among its data.
_LANGUAGE_DATA = {
    "nltk": {
        "punkt_tab": "tokenizers/punkt_tab",
        "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
        "wordnet": "corpora/wordnet.zip",
    }
}


def find_tasks(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """A task manager that knows every name in ``tasks``.

    A folder of one's own is read first, with vzip's tasks: where they hold all the names, lmms-eval's own 1,700 task
    files are not read at all, which saves seconds. A name that two of them define is refused, because lmms-eval would
    silently take its own.

    Raises:
        ConfigError: ``include_path`` is no folder or holds no task, an unknown name, a name defined twice.
        UnsupportedModelError: a task that is not answered by generated text, or that lmms-eval judges by itself.
        MissingPackageError: as ``check_packages``.
    """
    for name in tasks:
        if name in VIDEO_SETS and include_path is None:
            raise ConfigError(
                f"task {name}: its questions and videos are files of yours. Set eval.include_path=video and"
                " paths.video_root=DIR, as eval=paper_video does; data_manifests/video_qa.json says where to get them."
            )
        if name in _JUDGED_BY_LMMS_EVAL:
            raise UnsupportedModelError(
                f"task {name}: lmms-eval asks a judge model while it scores, needs its key for that, and gives a score"
                f" even where the call failed. Use eval.tasks=[{_JUDGED_BY_LMMS_EVAL[name]}]; open answers are scored"
                " after the run by python -m vzip judge RUN_DIR, which asks again and names what is missing."
            )
        if name in _DECODED_BY_LMMS_EVAL:
            raise UnsupportedModelError(
                f"task {name}: lmms-eval's file of it needs a package to decode videos with, which vzip does by itself."
                f" Use eval.tasks=[{_DECODED_BY_LMMS_EVAL[name]}], the same questions with the same scores."
            )
    check_packages(tasks)
    ours = set(_manager(str(OWN_TASKS)).all_tasks)
    theirs: set[str] = set()
    folders = [str(OWN_TASKS)]
    if include_path is not None:
        folder = Path(include_path)
        if not folder.is_dir():
            raise ConfigError(f"include_path={str(include_path)!r}: no such folder. Change eval.include_path.")
        theirs = set(_manager(str(folder)).all_tasks)
        if not theirs:
            raise ConfigError(
                f"include_path={str(include_path)!r}: no lmms-eval task file (*.yaml with a `task:`) in it or below it."
                " Change eval.include_path."
            )
        folders.append(str(folder))
    asked = set(tasks)
    built_in = ours if asked <= ours | theirs else set(built_in_tasks().all_tasks)
    known = sorted(built_in | theirs)
    for name in tasks:
        if name not in known:
            raise ConfigError(
                f"task {name!r} is not known{nearest(name, known)}. There are {len(known)} names in lmms-eval, vzip"
                + (f" and {str(include_path)!r}" if theirs else "; eval.include_path names a folder of your own tasks")
                + ". Change eval.tasks."
            )
        if name in theirs and name in built_in:
            raise ConfigError(
                f"task {name!r} of {str(include_path)!r} has the name of a built-in task, which would be run instead."
                " Give yours another name."
            )
    if asked <= ours | theirs:
        manager = _manager(*folders)
    elif asked & theirs:  # some from each
        manager = _manager(*folders, defaults=True)
    else:
        manager = built_in_tasks()
    _check_generative(manager, tasks)
    _check_not_judged(manager, [name for name in tasks if name not in ours | theirs])
    return manager


@cache
def built_in_tasks() -> TaskManager:
    """lmms-eval's own tasks and vzip's; read once a process, for it takes seconds."""
    return _manager(str(OWN_TASKS), defaults=True)


def _manager(*folders: str, defaults: bool = False) -> TaskManager:
    from lmms_eval.tasks import TaskManager

    allow_installed()
    return TaskManager(verbosity="ERROR", include_path=list(folders), include_defaults=defaults, model_name="vzip")


def allow_installed() -> None:
    """Makes lmms-eval understand ``include: !installed pope/pope.yaml`` in a task file: that file of its own."""
    import yaml

    yaml.add_constructor("!installed", _installed)


def _installed(loader: Any, node: Any) -> str:
    from lmms_eval import tasks

    return str(Path(tasks.__file__).parent / loader.construct_scalar(node))


def check_packages(tasks: Sequence[str]) -> None:
    """Refuses tasks whose scoring needs what is not here, before hours are spent on their answers.

    Raises:
        MissingPackageError: an optional package, or its data.
    """
    for name in tasks:
        protocol = protocol_of(name)
        for package in protocol.packages if protocol is not None else ():
            if importlib.util.find_spec(package) is None:
                raise missing_package(f"task {name}", package, otherwise="leave it out of eval.tasks")
            absent = [data for data, place in _LANGUAGE_DATA.get(package, {}).items() if not _has_data(place)]
            if absent:
                raise MissingPackageError(
                    f"task {name}: the package {package} lacks its data {', '.join(absent)}. Fetch it where there is a"
                    f" network, with `python -m nltk.downloader {' '.join(absent)}` (NLTK_DATA=DIR names its folder),"
                    " or leave the task out of eval.tasks."
                )


def _has_data(place: str) -> bool:
    import nltk

    try:
        nltk.data.find(place)
    except LookupError:
        return False
    return True


def members_of(manager: TaskManager, name: str) -> list[str] | None:
    """The tasks of a group or tag; None for a task."""
    from lmms_eval.utils import load_yaml_config

    entry = manager.task_index[name]
    listed = entry.get("task")
    if entry["type"] == "group" and not isinstance(listed, list):  # lmms-eval reads its file where it is asked for
        listed = load_yaml_config(entry["yaml_path"], mode="simple").get("task")
    if not isinstance(listed, list):
        return None
    names = [str(member.get("task")) if isinstance(member, dict) else str(member) for member in listed]
    return [member for member in names if member in manager.task_index and member != name]


def task_config(manager: TaskManager, name: str, mode: str = "full") -> dict[str, Any]:
    """The task's file with its includes, functions resolved (``simple``: not). Empty for tags and Python's tasks."""
    from lmms_eval.utils import load_yaml_config

    entry = manager.task_index[name]
    if entry["type"] != "task":
        return {}
    return load_yaml_config(entry["yaml_path"], mode=mode)


def shown_file(path: str | Path) -> str:
    """A task's file as a record names it: what it belongs to, and its place there."""
    from lmms_eval import tasks

    for whose, folder in (("vzip", OWN_TASKS), ("lmms-eval", Path(tasks.__file__).parent)):
        if Path(path).is_relative_to(folder):
            return f"{whose}: {Path(path).relative_to(folder).as_posix()}"
    return Path(path).name


def _check_not_judged(manager: TaskManager, tasks: Sequence[str]) -> None:
    """Refuses lmms-eval's tasks, alone or in a group, whose metrics are a judge's by their names."""
    for name in tasks:
        if name in PROTOCOLS:  # looked at: MMBench's letters are read by rules, whatever its metric is called
            continue
        if (members := members_of(manager, name)) is not None:
            _check_not_judged(manager, members)
            continue
        listed = task_config(manager, name, "simple").get("metric_list") or []
        judged = [str(entry.get("metric")) for entry in listed if _OF_JUDGE.match(str(entry.get("metric")))]
        if judged:
            raise UnsupportedModelError(
                f"task {name}: its metric {judged[0]} is a judge model's, which lmms-eval asks while it scores, with a"
                " score even where the call failed. Choose another (python -m vzip list eval), or write a task of your"
                " own with the same questions and a metric by rules (eval.include_path=DIR)."
            )


def _check_generative(manager: TaskManager, tasks: Sequence[str]) -> None:
    for name in tasks:
        output_type = task_config(manager, name).get("output_type", "generate_until")
        if output_type != "generate_until":
            raise UnsupportedModelError(
                f"task {name} has output_type {output_type}; vzip evaluates generated answers (generate_until) only."
                " Change eval.tasks."
            )

"""TGIF-QA, MSVD-QA, MSRVTT-QA and ActivityNet-QA as the paper's Table 3 has them, as local lmms-eval tasks.

The files are those that Video-LLaVA publishes (``data_manifests/video_qa.json``): one folder a benchmark, questions in
``test_q.json``, answers in ``test_a.json``, and the videos. Question and answer are joined by ``question_id``.
Video-LLaVA's own script joins them by position, which is wrong as soon as the questions are split over several GPUs.

The paper's score comes from a judge model (``python -m vzip judge``). The scores given here are made without one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import string
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vzip.data.llava_index import cache_folder
from vzip.errors import ConfigError, ManifestError
from vzip.json_files import read_json
from vzip.results.files import naming_the_file

logger = logging.getLogger(__name__)

EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
_NUM_NAMED = 5  # of many ids or files an error message names this many


@dataclass(frozen=True)
class VideoSet:
    """One benchmark's files below ``paths.video_root``.

    Attributes:
        task: its lmms-eval task here.
        title: its name.
        folder: its folder.
        videos: the folder of its videos, in ``folder``.
        prefix: what a video's file name has before ``video_name``.
        num_questions: as published; None where no source gives it.
    """

    task: str
    title: str
    folder: str
    videos: str
    prefix: str
    num_questions: int | None


# Folders and prefix: Video-LLaVA scripts/v1_5/eval/run_qa_*.sh and videollava/eval/video/run_inference_video_qa*.py.
VIDEO_SETS: Mapping[str, VideoSet] = {
    entry.task: entry
    for entry in (
        VideoSet("tgif_qa_zero_shot", "TGIF-QA", "TGIF_Zero_Shot_QA", "mp4", "", None),
        VideoSet("msvd_qa_zero_shot", "MSVD-QA", "MSVD_Zero_Shot_QA", "videos", "", 13157),
        VideoSet("msrvtt_qa_zero_shot", "MSRVTT-QA", "MSRVTT_Zero_Shot_QA", "videos/all", "", None),
        VideoSet("activitynet_qa_zero_shot", "ActivityNet-QA", "Activitynet_Zero_Shot_QA", "all_test", "v_", 8000),
    )
}


def prepare(root: str | Path | None, tasks: Sequence[str], cache: Path | None = None) -> Path:
    """Checks the files of the video benchmarks among ``tasks`` and writes them as lmms-eval tasks.

    Args:
        root, tasks: as ``check``.
        cache: where to write; by default ``$VZIP_CACHE`` or ``~/.cache/vzip``.

    Returns:
        An lmms-eval include path, named by its content; written once.

    Raises:
        ConfigError, ManifestError: as ``check``.
    """
    return _write(check(root, tasks), cache or cache_folder())


def check(root: str | Path | None, tasks: Sequence[str]) -> dict[str, str]:
    """Checks the files of the video benchmarks among ``tasks`` and reads their questions; writes nothing.

    Args:
        root: the folder that holds the benchmarks' folders (Video-LLaVA's ``eval/GPT_Zero_Shot_QA``).
        tasks: task names; others than ``VIDEO_SETS`` are left alone.

    Returns:
        By task its questions, a line of JSON each.

    Raises:
        ConfigError: no root, or no video benchmark among the tasks.
        ManifestError: a file or a video is missing, a file is broken, a question has no answer or two; all problems of
            all benchmarks at once.
    """
    wanted = [VIDEO_SETS[name] for name in tasks if name in VIDEO_SETS]
    if not wanted:
        raise ConfigError(
            f"eval.include_path=video: none of eval.tasks={list(tasks)} is a video benchmark; those are"
            f" {', '.join(VIDEO_SETS)}."
        )
    if root is None:
        raise ConfigError(
            "paths.video_root=null: the video benchmarks are not downloaded by themselves. Fetch Video-LLaVA's"
            " GPT_Zero_Shot_QA (data_manifests/video_qa.json says from where) and set paths.video_root=DIR to it."
        )
    texts: dict[str, str] = {}
    problems: list[str] = []
    for entry in wanted:
        try:
            rows = read_questions(Path(root).expanduser(), entry)
        except ManifestError as error:
            problems.append(str(error))
            continue
        if entry.num_questions not in (None, len(rows)):
            logger.warning("%s: %d questions; as published it has %d", entry.title, len(rows), entry.num_questions)
        texts[entry.task] = "".join(json.dumps(row) + "\n" for row in rows)
    if problems:
        raise ManifestError("\n".join(problems))
    return texts


def read_questions(root: Path, entry: VideoSet) -> list[dict[str, str]]:
    """A benchmark's questions in the order of its file: question_id, video_name, question, answer, video (a path).

    Raises:
        ManifestError: see ``prepare``.
    """
    folder = root / entry.folder
    if not folder.is_dir():
        raise ManifestError(
            f"{entry.title}: {folder} is not there. paths.video_root must be the folder that holds"
            f" {entry.folder}/test_q.json, test_a.json and {entry.videos}/; data_manifests/video_qa.json says where to"
            " get them."
        )
    questions = _read(folder / "test_q.json", ("question_id", "video_name", "question"))
    answers = {row["question_id"]: row["answer"] for row in _read(folder / "test_a.json", ("question_id", "answer"))}
    unanswered = [row["question_id"] for row in questions if row["question_id"] not in answers]
    if unanswered:
        raise ManifestError(f"{folder / 'test_a.json'}: no answer to {_some(unanswered)}.")
    files = _video_files(folder / entry.videos)
    names = {row["video_name"]: entry.prefix + _without_ending(row["video_name"]) for row in questions}
    missing = [name for name in names.values() if name not in files]
    if missing:
        raise ManifestError(
            f"{entry.title}: {len(missing)} of {len(names)} videos are not in {folder / entry.videos}: {_some(missing)}"
            f" ({', '.join(EXTENSIONS)}). Add them, or take their questions out of test_q.json: a question is never"
            " left out silently."
        )
    return [
        row | {"answer": answers[row["question_id"]], "video": str(files[names[row["video_name"]]])}
        for row in questions
    ]


def offline_scores(answer: str, said: str) -> dict[str, float]:
    """Scores that need no judge, each 0 or 1; neither is the paper's.

    Returns:
        ``exact_match``: the two are equal but for case, punctuation and articles; ``contains_answer``: the answer's
        words stand in what was said, in a row. A sentence that says the same in other words gets 0 by both.
    """
    wanted, given = _words(answer), _words(said)
    inside = any(given[i : i + len(wanted)] == wanted for i in range(len(given) - len(wanted) + 1))
    return {"exact_match": float(wanted == given), "contains_answer": float(bool(wanted) and inside)}


def _words(text: str) -> list[str]:
    spaced = re.sub(f"[{re.escape(string.punctuation)}]", " ", text.lower())
    return [word for word in spaced.split() if word not in ("a", "an", "the")]


def _read(path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
    """The entries' ``keys`` as texts (some answers are numbers)."""
    try:
        entries = read_json(path)
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: not there; data_manifests/video_qa.json says from where.") from error
    except ValueError as error:
        raise ManifestError(f"{path}: not readable as JSON ({error}). Fetch it again.") from error
    if not isinstance(entries, list) or not entries:
        raise ManifestError(f"{path}: must be a list of at least one entry.")
    rows = []
    for number, entry in enumerate(entries):
        values = [entry.get(key) if isinstance(entry, dict) else None for key in keys]
        if any(isinstance(value, bool) or not isinstance(value, str | int | float) for value in values):
            raise ManifestError(
                f"{path}, entry {number}: must have {', '.join(keys)}, each a text or number: {entry!r}."
            )
        rows.append({key: str(value).strip() for key, value in zip(keys, values, strict=True)})
    repeated = [key for key, times in Counter(row["question_id"] for row in rows).items() if times > 1]
    if repeated:
        raise ManifestError(
            f"{path}: question_id must be unique, but these stand there more than once: {_some(repeated)}."
        )
    return rows


def _video_files(folder: Path) -> dict[str, Path]:
    """Videos by name without ending; of several with one name the one whose ending comes first in EXTENSIONS."""
    found: dict[str, Path] = {}
    listed = [path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS] if folder.is_dir() else []
    for path in sorted(listed, key=lambda path: (EXTENSIONS.index(path.suffix.lower()), path.name)):
        found.setdefault(path.stem, path.resolve())
    return found


def _without_ending(name: str) -> str:
    return name[: name.rindex(".")] if name.lower().endswith(EXTENSIONS) else name


def _some(names: Iterable[Any]) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:_NUM_NAMED]) + (
        f" and {len(listed) - _NUM_NAMED} more" if len(listed) > _NUM_NAMED else ""
    )


def _write(texts: Mapping[str, str], cache: Path) -> Path:
    source = resources.files("vzip.evaluation.benchmarks") / "tasks" / "video"
    template = (source / "_video_qa_yaml").read_text(encoding="utf-8")
    functions = (source / "utils.py").read_text(encoding="utf-8")
    digest = hashlib.sha256(json.dumps([template, functions, texts]).encode()).hexdigest()
    folder = cache / f"video-qa-{digest[:16]}"
    if folder.is_dir():
        return folder
    with naming_the_file(folder):
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=cache, prefix=".video-qa-"))
        _fill(work, folder, texts, template, functions)
    return folder


def _fill(work: Path, folder: Path, texts: Mapping[str, str], template: str, functions: str) -> None:
    """Writes the tasks into ``work`` and gives that the folder's name."""
    try:
        (work / "utils.py").write_text(functions, encoding="utf-8")
        for task, text in texts.items():
            (work / f"{task}.jsonl").write_text(text, encoding="utf-8")
            filled = template.replace("TASK", task).replace("FOLDER", folder.resolve().as_posix())
            (work / f"{task}.yaml").write_text(filled, encoding="utf-8")
        work.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process of this run was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)

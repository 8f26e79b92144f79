"""The `scenes` benchmark: 400 generated images, 400 questions in each of four tasks, as local lmms-eval tasks.

  python -m vzip scenes                 writes it, or checks what is there
  python -m vzip scenes --out DIR       elsewhere than in the cache
  python eval.py eval=scenes            asks a model

The images are generated on first use (about a quarter of a minute) into a cache folder and compared with DIGEST, so
that a score means the same questions on every machine. Their seeds are disjoint from training's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from importlib import resources
from pathlib import Path

import numpy as np
from filelock import FileLock

from vzip.demo.questions import (
    TASKS,
    Question,
    attribute_questions,
    counting_pairs,
    existence_questions,
    reading_questions,
)
from vzip.demo.render import render
from vzip.demo.scenes import TEST_SEEDS, Scene, sample_scene
from vzip.errors import ManifestError
from vzip.json_files import read_json_lines
from vzip.progress import Progress
from vzip.results.files import make_folder, naming_the_file, replace_file

NUM_IMAGES = 400
QUESTIONS_PER_TASK = 400
# SHA-256 over all pixels and all questions; a change to scenes or render makes a new benchmark and needs a new digest.
DIGEST = "031b4f9888f15d473890908a33a5fc8b8c206e988c6b148c2cdf03d79806a772"
TASK_NAMES = tuple(f"scenes_{task}" for task in TASKS)


def test_scenes() -> list[Scene]:
    """The benchmark's scenes: those of the first test seeds that carry a sign."""
    scenes: list[Scene] = []
    seed = TEST_SEEDS[0]
    while len(scenes) < NUM_IMAGES:
        scene = sample_scene(seed)
        if scene.sign and scene.things:
            scenes.append(scene)
        seed += 1
    return scenes


def questions_of(index: int, scene: Scene) -> list[tuple[Question, str]]:
    """The questions asked about image `index`, each with its MME pair ("" outside counting)."""
    rng = np.random.RandomState(scene.seed ^ 0x7E57)
    yes_no = existence_questions(scene, rng)
    attributes = attribute_questions(scene, rng)
    asked = [(yes_no[index % 2], ""), (reading_questions(scene)[0], "")]
    asked += [(attributes[0], "")] if attributes else []
    if index % 2 == 0:
        pairs = counting_pairs(scene, rng)
        twins = pairs[(index // 2) % len(pairs)]
        asked += [(question, f"{index:04d}") for question in twins]
    return asked


def build_rows(scenes: list[Scene]) -> dict[str, list[dict]]:
    """All questions by task: `id`, `image`, `question`, `answer`, `kind`, `pair`."""
    rows: dict[str, list[dict]] = {task: [] for task in TASKS}
    for index, scene in enumerate(scenes):
        for question, pair in questions_of(index, scene):
            rows[question.task].append(
                {
                    "id": f"{question.task}-{len(rows[question.task]):04d}",
                    "image": f"images/{index:04d}.png",
                    "question": question.text,
                    "answer": question.answer,
                    "kind": question.kind,
                    "pair": pair,
                }
            )
    return rows


def write(folder: Path) -> str:
    """Writes images, questions and task files to `folder`; returns the digest of what it wrote."""
    scenes = test_scenes()
    digest = hashlib.sha256()
    (folder / "images").mkdir()
    with Progress("generating", "images", len(scenes)) as progress:
        for index, scene in enumerate(progress.track(scenes)):
            image = render(scene)
            digest.update(image.tobytes())
            image.save(folder / "images" / f"{index:04d}.png", compress_level=1)
    for task, rows in build_rows(scenes).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        digest.update(text.encode())
        (folder / f"{task}.jsonl").write_text(text)
    return digest.hexdigest()


def write_tasks(folder: Path) -> None:
    """Writes lmms-eval's task files, which need the folder's own absolute path; those that are there already stay."""
    for source in resources.files("vzip.demo").joinpath("tasks").iterdir():
        if source.is_file():
            text, target = source.read_text(encoding="utf-8"), folder / source.name
            if not source.name.endswith(".py"):
                text = text.replace("FOLDER", folder.resolve().as_posix())
            if not target.is_file() or target.read_text(encoding="utf-8") != text:  # another process may be reading it
                replace_file(target, text)


def default_folder() -> Path:
    """`$VZIP_CACHE/scenes-...`, by default under `~/.cache/vzip`."""
    root = os.environ.get("VZIP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vzip"
    return Path(root) / f"scenes-{DIGEST[:12]}"


def prepare(directory: Path | str | None = None) -> Path:
    """Returns the folder of the benchmark (an lmms-eval include path), generating it if it is not there.

    Several processes may ask at the same time: one generates it, the others wait.

    Raises:
        ManifestError: the images generated here are not the benchmark's, or the folder holds something else.
        RunWriteError: the folder cannot be written; ``paths.scenes_dir`` or ``$VZIP_CACHE`` name another.
    """
    folder = Path(directory) if directory else default_folder()
    make_folder(folder.parent)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        marker = folder / "digest.txt"
        if not marker.exists():
            with naming_the_file(folder):
                _generate(folder)
        elif marker.read_text().strip() != DIGEST:
            raise ManifestError(
                f"'{folder}' holds another version of the scenes benchmark ({marker.read_text().strip()[:12]}, wanted "
                f"{DIGEST[:12]}): remove the folder or name another one"
            )
        write_tasks(folder)
    return folder


def _generate(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ManifestError(f"'{folder}' is not empty and holds no scenes benchmark: name another folder")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".scenes-") as temporary:
        work = Path(temporary) / "scenes"
        work.mkdir()
        digest = write(work)
        if digest != DIGEST:
            raise ManifestError(
                f"the scenes generated on this machine have digest {digest}, the benchmark's is {DIGEST}: scores "
                "on them would not be comparable. If you changed vzip.demo.scenes or render, update DIGEST; "
                "if not, please report your NumPy and Pillow versions"
            )
        (work / "digest.txt").write_text(digest + "\n")
        if folder.exists():
            folder.rmdir()
        work.rename(folder)


def load_rows(folder: Path, task: str) -> list[dict]:
    """Questions of one task."""
    return list(read_json_lines(folder / f"{task}.jsonl"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=None, help="folder to write to (default: the cache folder)")


def main(arguments: argparse.Namespace) -> int:
    """Writes the benchmark and prints the lmms-eval option that uses it."""
    folder = prepare(arguments.out)
    print(f"{folder}\nuse it with: lmms-eval --include_path {folder} --tasks {','.join(TASK_NAMES)}")
    return 0

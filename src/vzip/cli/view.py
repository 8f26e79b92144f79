"""A page to look at the answers of a run, or of two runs beside each other: one HTML file that needs no server.

  python -m vzip view RUN OTHER --out answers.html       what compression broke: RUN's answers beside OTHER's
  python -m vzip view RUN --out answers.html             one run alone
  python -m vzip view RUN OTHER --out answers.html --images DIR     images of one's own, named by question

RUN and OTHER are run directories or their run.json (python -m vzip runs). Questions that both answered are compared;
what only one has is told. The built-in benchmark's images are generated, lmms-eval's opened where the data is in the
cache; nothing is downloaded. --images DIR has files named after a question's question_id, doc_id or image, with the
folders that the name has or without (of several tasks: in folders named after the tasks, at any depth there). Kept
patches are computed again with the run's own model and method: of the built-in model always, of others with --kept.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from PIL import Image

from vzip.cli.fidelity import ENDINGS
from vzip.errors import ConfigError, ImageError, ManifestError, MissingPackageError, RunExistsError, VzipError
from vzip.keys import raise_all
from vzip.media.images import load_image
from vzip.paths import expanded, is_folder, shown
from vzip.report.view.content import TaskRows, build_content, read_tasks
from vzip.report.view.page import render
from vzip.report.view.pictures import Keeper, Source, add_pictures
from vzip.results.files import check_writable, make_folder, replace_file
from vzip.results.record import Run, is_vanilla, read_record, record_path, title_of

if TYPE_CHECKING:
    from vzip.analysis.overlay import Crop
    from vzip.compressors import Compressor
    from vzip.models.vlm import CompressedVlm

logger = logging.getLogger(__name__)

LIMIT = 500
_BUILT_IN = "vzip/tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, or its run.json")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="another run of the same questions")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page")
    parser.add_argument("--images", metavar="DIR", help="images, named by question_id, doc_id or the image's own name")
    parser.add_argument(
        "--kept",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draw kept patches, with the run's model (default: of the built-in model)",
    )
    parser.add_argument(
        "--limit", type=int, default=LIMIT, metavar="N", help=f"questions that get their images ({LIMIT})"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there")


def main(args: argparse.Namespace) -> int:
    """Writes the page; what can be wrong is checked before images are opened or a model is loaded."""
    out = expanded(args.out)
    problems = _problems(args, out)
    runs: list[Run] = []
    for path in filter(None, (args.run, args.other)):
        try:
            runs.append(Run(record_path(path), read_record(path)))
        except ManifestError as error:
            problems.append(str(error))
    raise_all(problems)
    if out.exists() and not args.overwrite:
        raise RunExistsError(f"{out} exists: give another --out FILE.html, or --overwrite to replace it.")
    check_writable(out.parent)
    run, other = runs[0], runs[1] if len(runs) > 1 else None
    tasks, remarks = read_tasks(run, other)
    source, tasks, about_images = _source(tasks, runs, None if args.images is None else expanded(args.images))
    keepers, about_kept = ([None] * len(runs), []) if source is None else _keepers(runs, args.kept)
    content = build_content(run, other, tasks, [*remarks, *about_images, *about_kept])
    rows = [row for task in tasks for row in task.rows[0]]
    num_shown = 0 if source is None else add_pictures(content, rows, source, keepers, args.limit)
    make_folder(out.parent)
    replace_file(out, render(content, " against ".join(title_of(one.record) for one in runs)))
    for remark in content["remarks"]:
        print(remark)
    print(_told(content, num_shown, out))
    return 0


def _problems(args: argparse.Namespace, out: Path) -> list[str]:
    problems = []
    if args.limit < 0:
        problems.append(f"--limit {args.limit}: must be 0 or more questions.")
    if out.suffix.lower() not in (".html", ".htm"):
        problems.append(f"--out {shown(out)}: must be a file that ends in .html.")
    if is_folder(out):
        problems.append(f"--out {shown(out)}: is a folder. Name a file in it, as {shown(out / 'answers.html')}.")
    if args.images is not None and not is_folder(expanded(args.images)):
        problems.append(f"--images {shown(args.images)}: no such folder.")
    return problems


def _told(content: Mapping[str, Any], num_shown: int, out: Path) -> str:
    samples = content["samples"]
    counts = {name: sum(one["outcome"] == name for one in samples) for name in ("lost", "gained")}
    parts = [f"{len(samples):,} questions"]
    if len(content["runs"]) == 2:
        names = [run["name"] for run in content["runs"]]
        base, other = names[content["base"]], names[1 - content["base"]]
        parts += [f"{counts['lost']} only {base} right", f"{counts['gained']} only {other} right"]
    parts.append(f"{num_shown:,} with an image")
    return f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB): {', '.join(parts)}"


def _source(
    tasks: Sequence[TaskRows], runs: Sequence[Run], folder: Path | None
) -> tuple[Source | None, list[TaskRows], list[str]]:
    """What opens a question's images, None where none can be opened; the tasks, those of the built-in benchmark with
    the kinds of their questions; remarks."""
    if folder is not None:
        return _of_folder(folder), list(tasks), []
    from vzip.demo.benchmark import TASK_NAMES

    of_task: dict[str, Source] = {}
    remarks: list[str] = []
    named: list[TaskRows] = []
    for task in tasks:
        try:
            if task.name in TASK_NAMES:
                of_task[task.name], task = _of_scenes(task, runs[0].record)
            elif runs[0].record.get("include_path") is not None:
                # Its files name code that would be run; a record may come from elsewhere.
                raise ManifestError(f"task {task.name} is one of your own ({runs[0].record['include_path']})")
            else:
                from vzip.evaluation.sample_images import sample_images

                of_task[task.name] = sample_images(task.name)
        except (VzipError, OSError) as error:
            remarks.append(f"{task.name}: its images are not at hand: {error} Give --images DIR.")
        named.append(task)

    def source(row: Mapping[str, Any]) -> Sequence[Image.Image]:
        if row["task"] not in of_task:
            raise ImageError(f"give --images DIR (see the remarks beside the scores on {row['task']}).")
        return of_task[row["task"]](row)

    return source if of_task else None, named, remarks


def _of_scenes(task: TaskRows, record: Mapping[str, Any]) -> tuple[Source, TaskRows]:
    """The built-in benchmark's images, and its rows with the kinds of their questions as their groups."""
    from vzip.demo.benchmark import load_rows, prepare

    paths = (record.get("config") or {}).get("paths") or {}
    folder = prepare(paths.get("scenes_dir"))
    data = load_rows(folder, task.name.removeprefix("scenes_"))

    def source(row: Mapping[str, Any]) -> Sequence[Image.Image]:
        number = row["doc_id"]
        if not isinstance(number, int) or not 0 <= number < len(data) or data[number]["question"] != row["question"]:
            raise ImageError(f"{task.name} has no question {number} of this text.")
        return [load_image(folder / data[number]["image"])]

    def kind(row: Mapping[str, Any]) -> Mapping[str, Any]:
        number = row["doc_id"]
        known = isinstance(number, int) and 0 <= number < len(data)
        return {**row, "group": data[number]["kind"]} if known else row

    return source, TaskRows(task.name, tuple([kind(row) for row in rows] for rows in task.rows), task.whole)


def _of_folder(folder: Path) -> Source:
    """Files by their paths without ending: in the folder named after the task first, at any depth there."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    by_path: dict[str, Path] = {}
    by_name: dict[tuple[str, str], list[Path]] = {}
    for path in files:
        place = path.relative_to(folder).with_suffix("").as_posix()
        by_path.setdefault(place, path)
        by_name.setdefault((place.partition("/")[0], path.stem), []).append(path)

    def source(row: Mapping[str, Any]) -> Sequence[Image.Image]:
        names = [
            PurePosixPath(str(row[key])) for key in ("question_id", "cluster", "doc_id") if row.get(key) is not None
        ]
        # An id may have a dot of its own (1.2 is not image 1), and folders (coco/train2017/1.jpg).
        places = [(name.with_suffix("") if name.suffix.lower() in ENDINGS else name).as_posix() for name in names]
        asked = list(dict.fromkeys(way for place in places for way in (place, place.rpartition("/")[2])))
        for way in (*(f"{row['task']}/{way}" for way in asked), *asked):
            if way in by_path:
                return [load_image(by_path[way])]
        for way in asked:  # deeper, which only the task's own folder can be trusted with: others have a question 3 too
            found = by_name.get((row["task"], way), [])
            if len(found) == 1:
                return [load_image(found[0])]
        raise ImageError(
            f"{folder} has no file named {' or '.join(asked)}, and {row['task']} in it none. Deeper folders are"
            f" searched within {row['task']} alone, for a name that one file there has."
        )

    return source


class _OfRun:
    """What a run keeps, computed again."""

    def __init__(self, vlm: CompressedVlm, compressor: Compressor) -> None:
        self.vlm, self.compressor, self.reads_text = vlm, compressor, compressor.reads_text

    def __call__(self, image: Image.Image, question: str) -> Crop:
        from vzip.analysis.kept import kept_crop

        self.vlm.compressor = self.compressor  # both runs may share a model
        return kept_crop(self.vlm, image, question if self.reads_text else None)


def _keepers(runs: Sequence[Run], asked: bool | None) -> tuple[list[Keeper | None], list[str]]:
    """Of each run what computes its kept patches, or None; and why there is none."""
    from vzip.config.build import recorded_method

    plans: list[tuple[dict[str, Any], Compressor] | None] = []
    remarks: list[str] = []
    for run in runs:
        record, plan = run.record, None
        model = ((record.get("config") or {}).get("model") or {}).get("name_or_path")
        wanted = model == _BUILT_IN if asked is None else asked
        if wanted and record["compressor"]["name"] != "Identity":
            try:
                plan = recorded_method(record)
            except VzipError as error:
                remarks.append(f"{title_of(record)}: kept patches are not drawn: {error}")
        elif asked is None and not wanted and not is_vanilla(record):
            remarks.append(f"{title_of(record)}: kept patches are not drawn; --kept computes them with its model.")
        if record.get("pruner"):
            remarks.append(f"{title_of(record)}: what it drops inside the language model is not drawn.")
        plans.append(plan)
    loaded: list[tuple[dict[str, Any], CompressedVlm]] = []
    keepers: list[Keeper | None] = []
    for run, plan in zip(runs, plans, strict=True):
        if plan is None:
            keepers.append(None)
            continue
        try:
            keepers.append(_OfRun(_load(run, *plan, loaded), plan[1]))
        except (VzipError, MissingPackageError) as error:
            remarks.append(f"{title_of(run.record)}: kept patches are not drawn: {error}")
            keepers.append(None)
    return keepers, remarks


def _load(
    run: Run, arguments: dict[str, Any], compressor: Compressor, loaded: list[tuple[dict[str, Any], CompressedVlm]]
) -> CompressedVlm:
    """The run's model, one that is loaded already if it is the same.

    Raises:
        ConfigError: its weights are not those of the run, or the budget does not fit.
        VzipError: as ``vzip.load_vlm``.
    """
    import vzip
    from vzip.results.provenance import weights_sha256

    vlm = next((one for given, one in loaded if given == arguments), None)
    if vlm is None:
        vlm = vzip.load_vlm(**arguments, compressor=compressor)
        loaded.append((arguments, vlm))
    recorded = run.record["model"].get("weights_sha256")
    if recorded is not None and weights_sha256(vlm.name_or_path) != recorded:
        raise ConfigError(f"the weights in {vlm.name_or_path} are not those that the run had.")
    vlm.compressor = compressor
    return vlm

"""Fetches training data, checks it and shows what a part of it consists of.

python -m vzip data download llava_v1_5_mix665k --root DIR          about 150 GB with what is unpacked; --list shows it
python -m vzip data download llava_v1_5_mix665k --root DIR --only annotations coco
python -m vzip data verify llava_v1_5_mix665k --root DIR            every file that a manifest's annotations name
python -m vzip data verify --json FILE --root DIR                   one's own data in LLaVA's format
python -m vzip data subset llava_v1_5_mix665k --root DIR --fraction 1/10

A download that was interrupted or failed goes on when its command is given again; it ends with 1 if files are left that
must be fetched by hand. verify ends with 0 if all is well, 1 if something is missing, cut off or cannot be decoded,
2 if it could not be told.
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from vzip.data.llava_json import LlavaJson
from vzip.data.lock import Lock
from vzip.data.manifest import Manifest, addresses, file_table, load_manifest
from vzip.data.subset import choose, source_table
from vzip.data.verify import ImageProblem, find_problems
from vzip.errors import ConfigError, ManifestError
from vzip.json_files import to_json
from vzip.progress import Progress
from vzip.results.files import write_jsonl, written_aside

NUM_SHOWN = 20


@dataclass(frozen=True)
class _Source:
    """Where the data is: a manifest in a folder, or a file of one's own."""

    data: LlavaJson
    manifest: Manifest | None
    root: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="download | verify | subset")
    download = commands.add_parser("download", help="fetch what a manifest names")
    download.add_argument("manifest", nargs="?", default="llava_v1_5_mix665k", help="name in data_manifests, or a file")
    download.add_argument("--root", type=Path, help="folder to fetch into")
    download.add_argument("--only", nargs="+", metavar="SOURCE", help="these sources alone (see --list)")
    download.add_argument("--list", action="store_true", help="print what there is and fetch nothing")
    download.add_argument("--no-extract", action="store_true", help="leave the archives packed")
    download.add_argument("--delete-archives", action="store_true", help="remove each archive once it is unpacked")
    download.add_argument("--attempts", type=int, default=8, help="for each file in one run (default: 8)")
    verify = commands.add_parser("verify", help="check every file that the annotations name")
    subset = commands.add_parser("subset", help="what a part consists of, by source")
    for command in (verify, subset):
        command.add_argument("manifest", nargs="?", help="name in data_manifests, or a file")
        command.add_argument("--json", type=Path, help="a file in LLaVA's format, in place of a manifest")
        command.add_argument("--root", type=Path, help="folder of the data; with --json by default the file's own")
        command.add_argument("--fraction", default="1", help="this part alone (default: all), such as 0.1 or 1/10")
        command.add_argument("--seed", type=int, default=0, help="the part's seed (default: 0)")
        command.add_argument("--no-text-only", action="store_true", help="without the samples that have no image")
    verify.add_argument("--quick", action="store_true", help="only whether files are there and not empty")
    verify.add_argument("--workers", type=int, help="threads (default: one a core)")
    verify.add_argument("--report", type=Path, help="file for all problems, one JSON object a line")
    subset.add_argument("--ids", type=Path, help="file for the chosen samples, one JSON object a line")


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if args.action == "download":
        return _download(args)
    _check_arguments(args)
    if args.action == "subset":
        source = _open(args)
        indices = _choose(source, args)
        _console().print(source_table(source.data, indices))
        if args.ids is not None:
            _write_ids(source.data, indices, args.ids)
        return 0
    return _verify(args)


def _download(args: argparse.Namespace) -> int:
    manifest = load_manifest(args.manifest)
    files = manifest.choose(args.only)
    if args.list:
        Console().print(file_table(manifest, files))
        print(*addresses(files), sep="\n")  # not in the table, which would break them
        return 0
    if args.root is None:
        raise ConfigError("--root DIR is missing: the folder to fetch into.")
    from vzip.data.download import Downloader  # only here: it needs httpx, checking does not

    downloader = Downloader(manifest, args.root.expanduser(), num_attempts=max(1, args.attempts))
    downloader.run(files, extract=not args.no_extract, delete_archives=args.delete_archives)
    by_hand = [file for file in files if file.url is None]
    for file in by_hand:
        print(f"{file.source}: to be fetched by hand. {file.note}")
    print(f"now check what came: python -m vzip data verify {args.manifest} --root {args.root}")
    return 1 if by_hand else 0


def _verify(args: argparse.Namespace) -> int:
    source = _open(args)
    indices = _choose(source, args)
    notes = [*_format_notes(source.data), *_count_notes(source)]
    shown, counts = _check_images(source.data, indices, args)
    console = _console()
    console.print(source_table(source.data, indices))
    if source.data.num_repeated_ids:
        repeated, identical = f"{source.data.num_repeated_ids:,}", f"{source.data.num_identical:,}"
        console.print(f"{repeated} samples repeat an earlier one's id, {identical} repeat it word for word")
    for note in [*notes, *_image_notes(shown, counts, args.report)]:
        console.print(note, soft_wrap=True)
    if counts:
        console.print(_problem_table(counts))
    if counts or notes:
        console.print(f"not usable as it is: {counts.total()} image(s), {len(notes)} other problem(s)")
        return 1
    console.print(f"all images are {'there and not empty' if args.quick else 'there and can be decoded'}")
    return 0


def _console() -> Console:
    """File names may hold brackets, which are no markup."""
    return Console(markup=False, highlight=False)


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuses what would only come to light after hours of checking."""
    if (args.manifest is None) == (args.json is None):
        raise ConfigError("name either a manifest or --json FILE.")
    if args.action == "verify" and args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: must be at least 1.")
    out = args.report if args.action == "verify" else args.ids
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"{out}: the folder {out.parent} does not exist.")


def _open(args: argparse.Namespace) -> _Source:
    """Finds the annotations; a manifest's are held against its checksum first."""
    if args.json is not None:
        root = args.root or args.json.parent
        return _Source(LlavaJson(args.json, root, on_problem="skip"), None, root)
    manifest = load_manifest(args.manifest)
    if args.root is None:
        raise ConfigError("--root DIR is missing: the folder that the manifest's files were fetched into.")
    annotations = args.root / manifest.annotations
    if not annotations.is_file():
        raise ManifestError(
            f"{annotations}: no such file. Fetch it with: python -m vzip data download {args.manifest} --root"
            f" {args.root}"
        )
    Lock(manifest, args.root).check(manifest.file(manifest.annotations), annotations)
    return _Source(LlavaJson(annotations, args.root / manifest.image_root, on_problem="skip"), manifest, args.root)


def _choose(source: _Source, args: argparse.Namespace) -> np.ndarray:
    return choose(source.data, args.fraction, args.seed, keep_text_only=not args.no_text_only)


def _check_images(
    data: LlavaJson, indices: np.ndarray, args: argparse.Namespace
) -> tuple[list[ImageProblem], Counter[tuple[str, str]]]:
    """Looks at every image; returns the first problems and how many there are by source and kind."""
    shown: list[ImageProblem] = []
    counts: Counter[tuple[str, str]] = Counter()
    with ExitStack() as stack:
        aside = stack.enter_context(written_aside(args.report)) if args.report else None
        report = stack.enter_context(aside.open("wb")) if aside else None
        progress = stack.enter_context(Progress("reading", "images"))
        problems = find_problems(
            data,
            indices,
            decode=not args.quick,
            num_workers=args.workers,
            on_image=progress.update,
        )
        for problem in problems:
            counts[problem.image.source, problem.kind] += 1
            if len(shown) < NUM_SHOWN:
                shown.append(problem)
            if report is not None:
                report.write(to_json(_as_line(problem)) + b"\n")
    return shown, counts


def _as_line(problem: ImageProblem) -> dict[str, str]:
    image = problem.image
    about = {"image": image.name, "sample": image.sample_id, "source": image.source}
    return {"kind": problem.kind, **about, "reason": problem.reason}


def _image_notes(shown: list[ImageProblem], counts: Counter[tuple[str, str]], report: Path | None) -> list[str]:
    lines = [f"{problem.kind}: {problem.reason} (sample {problem.image.sample_id})" for problem in shown]
    rest = counts.total() - len(shown)
    if rest:
        lines.append(f"... and {rest} more" + (f"; all of them in {report}" if report else "; --report FILE takes all"))
    return lines


def _problem_table(counts: Counter[tuple[str, str]]) -> Table:
    table = Table("source", "problem", title="images that cannot be used", title_justify="left")
    table.add_column("images", justify="right")
    for (source, kind), count in sorted(counts.items()):
        table.add_row(source, kind, f"{count:,}")
    return table


def _format_notes(data: LlavaJson) -> list[str]:
    """Records that break LLaVA's format."""
    if not data.num_skipped:
        return []
    lines = [f"{data.num_skipped} record(s) break LLaVA's format:", *data.problems[:NUM_SHOWN]]
    rest = data.num_skipped - NUM_SHOWN
    return ["\n  ".join(lines + ([f"... and {rest} more"] if rest > 0 else []))]


def _count_notes(source: _Source) -> list[str]:
    """Where the number of samples is not what the manifest says."""
    manifest, data = source.manifest, source.data
    if manifest is None:
        return []
    notes = []
    total = len(data) + data.num_skipped
    if manifest.num_samples is not None and total != manifest.num_samples:
        notes.append(f"{data.path}: {total:,} samples, the manifest says {manifest.num_samples:,}")
    expected = manifest.num_samples_by_source
    if expected is not None and not data.num_skipped and (found := data.count_sources()) != expected:
        for name in sorted({*expected, *found}):
            if found.get(name, 0) != expected.get(name, 0):
                notes.append(f"{name}: {found.get(name, 0):,} samples, the manifest says {expected.get(name, 0):,}")
    return notes


def _write_ids(data: LlavaJson, indices: np.ndarray, path: Path) -> None:
    rows = ({"index": i, "id": data.record(i).id, "source": data.source_of(i)} for i in map(int, indices))
    write_jsonl(path, rows)

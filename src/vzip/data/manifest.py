"""What a training set consists of: ``data_manifests/NAME.json``, read and checked.

A manifest names the annotations (a file in LLaVA's format), where they and the images come from, and how to know that
they are the right ones. A checksum that no public source gives is null there; it is then recorded at the first download
(``vzip.data.lock``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from rich.table import Table

from vzip.errors import ManifestError, nearest
from vzip.installed import checkout
from vzip.json_files import read_json
from vzip.paths import expanded, is_file

_MAX_PATH, _MAX_NAME = 1000, 240  # of characters, and of bytes of one name: with ".part.json" behind it still a name


@dataclass(frozen=True)
class ManifestFile:
    """One file to fetch. Paths are relative to the data folder; ``url`` is null for what must be fetched by hand."""

    path: str
    source: str
    url: str | None
    num_bytes: int | None
    sha256: str | None
    checksum_source: str
    extract_to: str | None
    num_images: int | None
    licence: str
    note: str = ""


@dataclass(frozen=True)
class Manifest:
    """A training set. ``facts`` are the public sources of what is said here."""

    name: str
    description: str
    licence: str
    revision: str
    facts: list[str]
    annotations: str
    image_root: str
    num_samples: int | None
    num_samples_by_source: dict[str, int] | None
    files: list[ManifestFile]

    def file(self, path: str) -> ManifestFile:
        """The file of this path."""
        return next(file for file in self.files if file.path == path)

    def choose(self, only: list[str] | None) -> list[ManifestFile]:
        """The files of the sources named, or all of them.

        Raises:
            ManifestError: there is no such source.
        """
        sources = list(dict.fromkeys(file.source for file in self.files))
        for name in only or []:
            if name not in sources:
                raise ManifestError(
                    f"--only {name}: {self.name} has no such source{nearest(name, sources)}; it has:"
                    f" {', '.join(sources)}."
                )
        return [file for file in self.files if not only or file.source in only]


def manifest_folder() -> Path:
    """``data_manifests`` of the checkout, or of the wheel."""
    return checkout() / "data_manifests"


def load_manifest(name_or_path: str | Path) -> Manifest:
    """Reads a manifest.

    Args:
        name_or_path: a file, or the name of one in ``data_manifests``.

    Raises:
        ManifestError: no such manifest, or it breaks the form; all problems at once.
    """
    path = _find(name_or_path)
    try:
        raw = read_json(path)
    except ValueError as error:
        raise ManifestError(f"{path}: not readable as JSON ({error}).") from error
    if isinstance(raw, dict) and "command" in raw:
        raise ManifestError(f"{path}: nothing to download, this data is generated: {raw['command']}.")
    if isinstance(raw, dict) and "by_hand" in raw:
        raise ManifestError(f"{path}: nothing that could be downloaded from here: {raw['by_hand']}.")
    problems = _problems(raw)
    if problems:
        raise ManifestError("\n  ".join([f"{path}: {len(problems)} problem(s):", *problems]))
    return Manifest(**{**raw, "files": [ManifestFile(**file) for file in raw["files"]]})


def file_table(manifest: Manifest, files: list[ManifestFile]) -> Table:
    """What there is to fetch, to be printed."""
    table = Table("source", "file", title=f"{manifest.name}: {manifest.description}", title_justify="left")
    table.add_column("GB", justify="right")
    table.add_column("SHA-256")
    table.columns[1].overflow = "fold"
    for file in files:
        size = f"{file.num_bytes / 1e9:.2f}" if file.num_bytes else "?"
        checksum = file.sha256[:12] if file.sha256 else file.checksum_source.partition(":")[0]
        table.add_row(file.source, file.path, size, checksum)
    known = [file.num_bytes for file in files if file.num_bytes]
    unknown = len(files) - len(known)
    more = f" and {unknown} of unknown size" if unknown else ""
    table.add_section()
    table.add_row("total", f"{len(files)} files{more}", f"{sum(known) / 1e9:.2f}")
    return table


def addresses(files: list[ManifestFile]) -> list[str]:
    """Where each file comes from and each source's licence, in unbroken lines."""
    licences = dict.fromkeys(f"licence of {file.source}: {file.licence}" for file in files)
    return [*(f"{file.path}: {file.url or file.note}" for file in files), *licences]


def _find(name_or_path: str | Path) -> Path:
    path = expanded(name_or_path)
    if is_file(path):
        return path
    known = sorted(file.stem for file in manifest_folder().glob("*.json"))
    if str(name_or_path) in known:
        return manifest_folder() / f"{name_or_path}.json"
    raise ManifestError(
        f"'{name_or_path}': no such file, and no manifest of that name{nearest(path.stem, known)}; there are:"
        f" {', '.join(known)}."
    )


def _problems(raw: Any) -> list[str]:
    """Everything that keeps ``raw`` from being a manifest."""
    if not isinstance(raw, dict):
        return [f"must be an object, is a {type(raw).__name__}"]
    problems = _key_problems(raw, Manifest, "")
    if problems:
        return problems
    if not isinstance(raw["files"], list) or not all(isinstance(file, dict) for file in raw["files"]):
        return ["files: must be a list of objects"]
    for number, file in enumerate(raw["files"]):
        problems += _key_problems(file, ManifestFile, f"files[{number}].") or _file_problems(file, f"files[{number}].")
    if problems:
        return problems
    for key in ("description", "licence", "revision"):
        if not isinstance(raw[key], str):
            problems.append(f"{key}: {raw[key]!r:.80} must be a text")
    paths = [file["path"] for file in raw["files"]]
    problems += [f"files: {path!r} stands there twice" for path in sorted({p for p in paths if paths.count(p) > 1})]
    if not isinstance(raw["name"], str) or not re.fullmatch(r"\w[\w.-]{0,99}", raw["name"]):
        problems.append(f"name: {raw['name']!r:.80} must be letters, digits, '-', '_' and '.': files are called by it")
    if not is_inside(raw["image_root"]):
        problems.append(f"image_root: {raw['image_root']!r:.80} must be a relative path that stays in the data folder")
    if raw["annotations"] not in paths:
        problems.append(f"annotations: {raw['annotations']!r} is none of the files' paths")
    return problems + _count_problems(raw["num_samples"], raw["num_samples_by_source"])


def _count_problems(num_samples: Any, by_source: Any) -> list[str]:
    if num_samples is not None and (type(num_samples) is not int or num_samples < 1):
        return [f"num_samples: {num_samples!r} must be a positive whole number, or null"]
    if by_source is None:
        return []
    if not isinstance(by_source, dict) or not all(type(count) is int for count in by_source.values()):
        return ["num_samples_by_source: must be an object of whole numbers, or null"]
    total = sum(by_source.values())
    return [] if total == num_samples else [f"num_samples_by_source: adds up to {total}, num_samples is {num_samples}"]


def _key_problems(raw: Mapping[str, Any], form: type, where: str) -> list[str]:
    allowed = [field.name for field in fields(form)]
    required = [field.name for field in fields(form) if field.default is MISSING]
    problems = [f"{where}{key}: no such key{nearest(key, allowed)}" for key in raw if key not in allowed]
    return problems + [f"{where}{key}: is missing" for key in required if key not in raw]


def _file_problems(file: Mapping[str, Any], where: str) -> list[str]:
    problems = []
    for key in ("path", "extract_to"):
        inside = file[key] is None or is_inside(file[key])
        if not inside or (key == "path" and file[key] is None):
            problems.append(f"{where}{key}: {file[key]!r} must be a relative path that stays inside the data folder")
    if file["url"] is not None and not str(file["url"]).startswith(("http://", "https://")):
        problems.append(f"{where}url: {file['url']!r} must begin with http:// or https://, or be null")
    if file["sha256"] is not None and not re.fullmatch("[0-9a-f]{64}", str(file["sha256"])):
        problems.append(f"{where}sha256: {file['sha256']!r} must be 64 hexadecimal digits, or null")
    for key in ("source", "licence", "checksum_source"):
        if not isinstance(file[key], str):
            problems.append(f"{where}{key}: {file[key]!r:.80} must be a text")
    for key in ("num_bytes", "num_images"):
        if file[key] is not None and (type(file[key]) is not int or file[key] < 1):
            problems.append(f"{where}{key}: {file[key]!r} must be a positive whole number, or null")
    if file["url"] is None and not file.get("note"):
        problems.append(f"{where}note: must say where the file comes from, since there is no url")
    return problems


def is_inside(path: Any) -> bool:
    """Whether a path is a relative one that stays below the folder it starts from, on any system."""
    if not isinstance(path, str) or not path.isprintable() or not path or len(path) > _MAX_PATH or "\\" in path:
        return False
    if any(len(part.encode("utf-8", "replace")) > _MAX_NAME for part in PurePosixPath(path).parts):
        return False
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts

"""Uploads tuned weights to the hub with a model card, so that others use them by their name there.

  python -m vzip push runs/train/.../final --to HUB_ID             what would be uploaded; nothing is asked of the hub
  python -m vzip push runs/train/.../final --to HUB_ID --upload    uploads it
  python -m vzip push FINAL --to HUB_ID --record runs/eval/.../seed0 --license apache-2.0    with scores and a licence
  python -m vzip push runs/eval/.../seed0 --to HUB_ID              the weights of an evaluation, and its scores
  python -m vzip push FINAL --to HUB_ID --base BASE_ID@REVISION    where the base model was loaded from a directory

Then anywhere: vzip.load_vlm(BASE, projector=HUB_ID), or eval.py with model.projector=HUB_ID; HUB_ID@REVISION names a
branch, tag or commit.

The hub gets the weights, their header without what it says of the machine, and README.md: base model, compressor and
budget, settings of the training, data, scores with intervals, licence. No optimizer, and no path of this machine.
All of it is one commit: an upload that fails leaves the repository as it was, and may be repeated.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vzip.errors import CheckpointError, ConfigError, ManifestError
from vzip.json_files import read_json
from vzip.paths import expanded, is_file, is_folder, shown
from vzip.results.record import RECORD_NAME, read_record, record_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN_OR_CHECKPOINT", help="a training's or an evaluation's directory, or weights'"
    )
    parser.add_argument("--to", required=True, metavar="HUB_ID", help="the repository: owner and name")
    parser.add_argument("--upload", action="store_true", help="really upload; without it only tell what would be")
    parser.add_argument("--revision", metavar="BRANCH", help="upload to this branch, made if it is not there")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--replace", action="store_true", help="put these weights in the place of others there")
    parser.add_argument("--base", metavar="HUB_ID[@REVISION]", help="the base model's name on the hub")
    parser.add_argument(
        "--record", action="append", default=[], metavar="RUN", help="an evaluation with these weights; may be repeated"
    )
    parser.add_argument("--license", metavar="ID", help="of these weights, as the hub names it (apache-2.0)")


def main(args: argparse.Namespace) -> int:
    check_hub_id("--to", args.to)
    check_branch(args.revision)
    check_licence(args.license)
    found = find_tuned(args.run)
    from vzip.models.weights.upload import (
        CARD_NAME,
        Target,
        check_target,
        refuse_private,
        size_of,
        tuned_files,
        upload,
    )
    from vzip.report.model_card import model_card

    files, header = tuned_files(found.directory, public_base(found.directory, args.base))
    records = [*found.records, *(read_record(expanded(run)) for run in args.record)]
    check_records(records, [*found.sources, *args.record], header)
    target = Target(args.to, args.revision, args.private, args.replace)
    card = model_card(target.name, header, found.training, records, args.license)
    files = {CARD_NAME: card.encode(), **files}
    refuse_private(files)
    _tell(files, size_of, card, target, args)
    if not args.upload:
        print("nothing was uploaded, and the hub was not asked: --upload does it")
        return 0
    from huggingface_hub import HfApi

    api = HfApi()
    check_target(api, target, header)
    message = f"Tuned weights of {header['base']['name_or_path']}, step {header.get('step', 'unknown')}"
    address = upload(api, target, files, message)
    print(f"uploaded: {address}")
    return 0


@dataclass(frozen=True)
class Found:
    """What a directory names.

    Attributes:
        directory: of the tuned weights.
        training: the settings of their training; None where they are not beside them.
        records, sources: of the evaluation that was given, and its directory.
    """

    directory: Path
    training: Mapping[str, Any] | None
    records: Sequence[Mapping[str, Any]] = ()
    sources: Sequence[str] = ()


def find_tuned(run: str) -> Found:
    """The tuned weights that a directory of weights, of a training or of an evaluation means.

    Raises:
        CheckpointError: it is none of these, or its weights are not there.
        ManifestError: a damaged record.
    """
    folder = expanded(run)
    if not is_folder(folder):
        raise CheckpointError(
            f"{shown(run)}: no such directory. Give what train.py wrote (runs/train/.../final, or the run above it), or"
            " an evaluation with tuned weights."
        )
    folder = folder.absolute()  # "." has a name too
    if is_file(folder / "tuned.json"):
        return Found(folder, _training(folder))
    if (folder / RECORD_NAME).is_file():
        record = read_record(folder)
        named = ((record.get("config") or {}).get("model") or {}).get("projector")
        if not isinstance(named, str):
            raise CheckpointError(
                f"{run}: an evaluation without tuned weights (model.projector), so there are none to push."
            )
        weights = expanded(named)
        if not (weights / "tuned.json").is_file():
            raise CheckpointError(
                f"{run}: evaluated model.projector={named}, which is not there. Give the directory of the weights, and"
                f" --record {run}."
            )
        return Found(weights.absolute(), _training(weights.absolute()), [record], [run])
    if (folder / "final" / "tuned.json").is_file():
        return Found(folder / "final", _training(folder / "final"))
    if (folder / "train.json").is_file():
        newest = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        instead = f" To push what there is so far, name {folder / 'checkpoints' / newest[-1]}." if newest else ""
        raise CheckpointError(
            f"{run}: its training is not finished (there is no final); the same command goes on.{instead}"
        )
    if (folder / "adapter_config.json").is_file():
        up = f" It belongs to {folder.parent}: push that." if (folder.parent / "tuned.json").is_file() else ""
        raise CheckpointError(
            f"{run}: LoRA layers alone, a PEFT checkpoint.{up or ' PEFT uploads it itself (push_to_hub of its model).'}"
        )
    raise CheckpointError(
        f"{run}: no checkpoint of vzip: neither tuned.json, nor a training's train.json, nor an evaluation's"
        f" {RECORD_NAME}. Give what train.py wrote, as runs/train/.../final."
    )


def _training(weights: Path) -> Mapping[str, Any] | None:
    """The settings beside ``final`` and ``best``, or above ``checkpoints/step-N``."""
    above = weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent
    path = above / "train.json"
    if not path.is_file():
        return None
    try:
        settings = read_json(path)
    except ValueError as error:
        raise ManifestError(
            f"{path}: damaged ({error}), so the card cannot tell how the weights were trained."
        ) from error
    return settings if isinstance(settings, dict) else None


def public_base(directory: Path, given: str | None) -> tuple[str, str | None]:
    """Name and revision of the base model as others know it.

    Raises:
        ConfigError: it was loaded from a directory, and ``--base`` does not say what that is on the hub.
    """
    from vzip.models.hub import is_hub_id
    from vzip.models.weights.tuned import read_header

    if given is not None:
        name, _, revision = given.partition("@")
        check_hub_id("--base", name)
        return name, revision or None
    base = read_header(directory)[1]["base"]
    name = base["name_or_path"]
    if not isinstance(name, str) or not is_hub_id(name) or is_folder(expanded(name)):
        raise ConfigError(
            f"the base model of these weights was loaded from a directory ({name}), which others do not have. Say what"
            " it is on the hub: --base HUB_ID, or --base HUB_ID@REVISION."
        )
    return name, base["revision"]


def check_records(records: Sequence[Mapping[str, Any]], sources: Sequence[str], header: Mapping[str, Any]) -> None:
    """Refuses scores of other weights.

    Raises:
        ManifestError: naming the record.
    """
    for record, source in zip(records, sources, strict=True):
        evaluated = ((record.get("config") or {}).get("model") or {}).get("projector_sha256")
        if evaluated != header["sha256"]:
            what = "without tuned weights" if evaluated is None else f"with others (SHA-256 {str(evaluated)[:12]}...)"
            raise ManifestError(
                f"{record_path(source)}: an evaluation {what}, not with these ({header['sha256'][:12]}...). Leave it"
                f" out, or evaluate these with model.projector=DIR."
            )


def check_hub_id(option: str, name: str) -> None:
    """Raises ConfigError for what can be no repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented there

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{option} {shown(name)}: no name of a repository ({str(error).splitlines()[0]}).") from error
    if "/" not in name:
        raise ConfigError(f"{option} {shown(name)}: must be owner and name, as {option} you/{name}.")


def check_branch(branch: str | None) -> None:
    """Raises ConfigError for what can be no branch that is written to."""
    if branch is None:
        return
    if re.fullmatch(r"[0-9a-f]{40}", branch):
        raise ConfigError(f"--revision {branch}: a commit, which nothing can be added to; name a branch.")
    if (
        not re.fullmatch(r"[A-Za-z0-9](?:[\w.-]|/(?=\w))*", branch, re.ASCII)
        or ".." in branch
        or branch.endswith((".", ".lock"))
    ):
        raise ConfigError(f"--revision {shown(branch)}: no name of a branch; letters, digits and ._- as in v1.")


def check_licence(licence: str | None) -> None:
    """Raises ConfigError for what cannot be the hub's name of a licence."""
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise ConfigError(
            f"--license {shown(licence)}: must be the hub's name of a licence: small letters, digits, dots and dashes,"
            " as apache-2.0, mit, cc-by-4.0, llama2 or other."
        )


def _tell(files: Mapping[str, Path | bytes], size_of: Any, card: str, target: Any, args: argparse.Namespace) -> None:
    print(card)
    print("-" * 20)
    where = "a private repository, where it is new" if args.private else "a public repository, where it is new"
    print(f"to {target.hub_id} ({where}), {f'branch {args.revision}' if args.revision else 'main branch'}")
    width = max(map(len, files))
    for name, content in files.items():
        print(f"  {name:<{width}} {size_of(content):>14,} bytes")
    sys.stdout.flush()

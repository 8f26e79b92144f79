"""A hub in a folder: what of the client vzip calls, kept in files, with the failures that a real one has."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationDelete
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def http_error(kind: type[HfHubHTTPError], status: int, message: str) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(message, response=response)


class FakeHub:
    """``root/OWNER/NAME/COMMIT/...``, and ``refs.json``: each branch's commit, and whether it is private.

    Attributes:
        calls: names of the calls that write, in order.
        logged_in, offline: as the client would find.
        dies_in_commit: how many of a commit's files are read before the connection breaks; None: it does not.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, list[str]()
        self.logged_in, self.offline = True, False
        self.dies_in_commit: int | None = None

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Puts it in the place of the client, for writing and for reading."""
        patch.setattr("huggingface_hub.HfApi", lambda: self)
        patch.setattr("vzip.models.hub.HfApi", lambda: self)
        patch.setattr("vzip.models.hub.snapshot_download", self.snapshot_download)

    def _refs(self, hub_id: str) -> dict[str, Any]:
        path = self.root / hub_id / "refs.json"
        if not path.is_file():
            raise http_error(RepositoryNotFoundError, 404, f"404 Client Error. Repository Not Found: {hub_id}")
        return json.loads(path.read_text())

    def _commit(self, hub_id: str, revision: str | None) -> str:
        refs = self._refs(hub_id)["branches"]
        if (revision or "main") in refs:
            return refs[revision or "main"]
        if revision and (self.root / hub_id / revision).is_dir():
            return revision
        raise http_error(RevisionNotFoundError, 404, f"404 Client Error. Revision Not Found: {revision}")

    def files(self, hub_id: str, revision: str | None = None) -> dict[str, bytes]:
        folder = self.root / hub_id / self._commit(hub_id, revision)
        return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}

    def put(self, hub_id: str, files: dict[str, bytes], private: bool = False) -> None:
        """A repository as somebody else made it."""
        self.create_repo(hub_id, private=private)
        self._write(hub_id, "main", files)
        self.calls.clear()

    def _write(self, hub_id: str, branch: str, files: dict[str, bytes], deleted: Sequence[str] = ()) -> str:
        refs = self._refs(hub_id)
        whole = {name: data for name, data in {**self.files(hub_id, branch), **files}.items() if name not in deleted}
        content = repr((refs["branches"], sorted(whole.items()))).encode()
        commit = hashlib.sha1(content).hexdigest()
        for name, data in whole.items():
            path = self.root / hub_id / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        refs["branches"][branch] = commit
        (self.root / hub_id / "refs.json").write_text(json.dumps(refs))
        return commit

    # The client's own calls.

    def whoami(self) -> dict[str, str]:
        if self.offline:
            raise OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled.")
        if not self.logged_in:
            raise LocalTokenNotFoundError("Token is required, but no token found.")
        return {"name": "me"}

    def model_info(self, hub_id: str, revision: str | None = None, timeout: float | None = None) -> Any:
        commit = self._commit(hub_id, revision)
        siblings = [SimpleNamespace(rfilename=name) for name in self.files(hub_id, revision)]
        return SimpleNamespace(sha=commit, private=self._refs(hub_id)["private"], siblings=siblings)

    def hf_hub_download(self, hub_id: str, filename: str, revision: str | None = None) -> str:
        return str(self.root / hub_id / self._commit(hub_id, revision) / filename)

    def create_repo(self, hub_id: str, private: bool | None = None, exist_ok: bool = False) -> None:
        self.calls.append("create_repo")
        folder = self.root / hub_id
        if folder.exists():
            assert exist_ok
            return
        (folder / ("0" * 40)).mkdir(parents=True)
        (folder / "refs.json").write_text(json.dumps({"private": bool(private), "branches": {"main": "0" * 40}}))

    def create_branch(self, hub_id: str, branch: str, exist_ok: bool = False) -> None:
        self.calls.append("create_branch")
        refs = self._refs(hub_id)
        refs["branches"].setdefault(branch, refs["branches"]["main"])
        (self.root / hub_id / "refs.json").write_text(json.dumps(refs))

    def create_commit(
        self, hub_id: str, operations: Sequence[Any], commit_message: str, revision: str | None = None
    ) -> Any:
        self.calls.append("create_commit")
        files: dict[str, bytes] = {}
        deleted: list[str] = []
        for number, operation in enumerate(operations):
            if number == self.dies_in_commit:
                raise http_error(HfHubHTTPError, 502, "502 Bad Gateway: the connection broke")
            if isinstance(operation, CommitOperationDelete):
                deleted.append(operation.path_in_repo)
                continue
            given = operation.path_or_fileobj
            files[operation.path_in_repo] = given if isinstance(given, bytes) else Path(given).read_bytes()
        commit = self._write(hub_id, revision or "main", files, deleted)
        return SimpleNamespace(commit_url=f"https://hub/{hub_id}/commit/{commit}")

    def snapshot_download(
        self, hub_id: str, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        commit = self._commit(hub_id, revision)
        source, target = self.root / hub_id / commit, self.root / "cache" / hub_id / commit
        for name in self.files(hub_id, revision):
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / name, target / name)
        return str(target)

"""Downloads from a local server that supports ranges or not, breaks off, changes its mind or refuses."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.server
import io
import json
import re
import shutil
import stat
import threading
import zipfile
from collections import namedtuple
from dataclasses import replace

import pytest
from rich.console import Console

import vzip.data.download as download_module
from vzip.data.download import Downloader
from vzip.data.fetch import new_client
from vzip.data.manifest import Manifest, ManifestFile
from vzip.errors import ManifestError

BODY = bytes(range(256)) * 12_000  # 3 MB: several chunks
SHA = hashlib.sha256(BODY).hexdigest()


CLIENT = new_client()  # one for all: loading the certificates takes longer than most of these downloads


class Server(http.server.ThreadingHTTPServer):
    """Serves ``body`` at every path. ``script`` holds, for one GET after the other, what goes wrong with it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag, self.ranges, self.says_length = BODY, '"one"', True, True
        self.script: list[int | str | None] = []
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        server = self.server
        asked = self.headers.get("Range")
        if send:
            server.asked.append((self.path, asked))
        fault = server.script.pop(0) if send and server.script else None
        if fault in (403, 404, 503):
            return self.send_error(fault)
        start, status = 0, 200
        if asked and server.ranges and self.headers.get("If-Range") == server.etag:
            start, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
            if start >= len(server.body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        self.send_response(status)
        if status == 206:
            first = 0 if fault == "wrong range" else start
            self.send_header("Content-Range", f"bytes {first}-{len(server.body) - 1}/{len(server.body)}")
        if server.says_length:
            self.send_header("Content-Length", str(len(server.body) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if send:
            self.wfile.write(server.body[start : fault if isinstance(fault, int) else None])
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def entry(server, path="sub/file.bin", **changes) -> ManifestFile:
    known = ManifestFile(path, "coco", f"{server.url}/{path}", len(BODY), SHA, "the test", None, None, "none")
    return replace(known, **changes)


def downloader(root, *files, attempts=4) -> Downloader:
    manifest = Manifest("m", "", "", "", [], files[0].path, ".", None, None, list(files))
    console = Console(file=io.StringIO(), width=500)
    return Downloader(manifest, root, num_attempts=attempts, max_wait_s=0, console=console, client=CLIENT)


def run(root, *files, attempts=4, **options) -> str:
    """Runs a fresh downloader; returns what it printed."""
    own = downloader(root, *files, attempts=attempts)
    own.run(files, **options)
    return own.console.file.getvalue()


def lock(root) -> dict:
    return json.loads((root / "m.lock.json").read_text())


def test_a_file_is_fetched_checked_and_recorded_once(server, tmp_path):
    assert "as published" in run(tmp_path, entry(server))
    assert (tmp_path / "sub/file.bin").read_bytes() == BODY
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["file.bin"]
    assert lock(tmp_path)["sub/file.bin"] == {
        "url": f"{server.url}/sub/file.bin",
        "num_bytes": len(BODY),
        "sha256": SHA,
        "extracted": None,
    }
    assert "as recorded" in run(tmp_path, entry(server))
    assert len(server.asked) == 1


@pytest.mark.parametrize("says_length", [True, False])
def test_a_line_that_breaks_is_continued_by_ranges(server, tmp_path, says_length):
    server.script = [1_000_000, 2_500_000] if says_length else []
    server.says_length = says_length
    text = run(tmp_path, entry(server))
    assert (tmp_path / "sub/file.bin").read_bytes() == BODY
    assert text.count("trying again") == len(server.asked) - 1 == (2 if says_length else 0)
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) for _, asked in server.asked if asked]
    assert starts == sorted(starts) and all(0 < start <= 2_500_000 for start in starts)


def test_without_ranges_it_starts_afresh(server, tmp_path):
    server.ranges, server.script = False, [1_000_000]
    run(tmp_path, entry(server))
    assert (tmp_path / "sub/file.bin").read_bytes() == BODY and len(server.asked) == 2


def test_a_server_without_tags_is_never_continued(server, tmp_path):
    server.etag, server.script = None, [1_000_000]
    run(tmp_path, entry(server))
    assert (tmp_path / "sub/file.bin").read_bytes() == BODY
    assert [asked for _, asked in server.asked] == [None, None]


@pytest.mark.parametrize("size", [0, 2_000_000, len(BODY)])
def test_a_killed_run_is_continued_by_the_next(server, tmp_path, size):
    """What a killed run leaves: some bytes, and the note of which version they are."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/file.bin.part").write_bytes(BODY[:size])
    state = {"url": f"{server.url}/sub/file.bin", "version": '"one"'}
    (tmp_path / "sub/file.bin.part.json").write_text(json.dumps(state))
    run(tmp_path, entry(server))
    assert (tmp_path / "sub/file.bin").read_bytes() == BODY
    assert server.asked == [("/sub/file.bin", f"bytes={size}-" if size else None)]


@pytest.mark.parametrize("state", ['{"url": "http://else", "version": "x"}', '{"url', None])
def test_bytes_of_unknown_origin_are_not_continued(server, tmp_path, state):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/file.bin.part").write_bytes(b"x" * 1000)
    if state:
        (tmp_path / "sub/file.bin.part.json").write_text(state)
    run(tmp_path, entry(server))
    assert (tmp_path / "sub/file.bin").read_bytes() == BODY and server.asked == [("/sub/file.bin", None)]


def test_a_file_that_changes_between_attempts_is_fetched_anew(server, tmp_path):
    with pytest.raises(ManifestError, match=r"line broke|peer closed|incomplete"):
        server.script = [1_000_000]
        run(tmp_path, entry(server), attempts=1)
    server.body, server.etag = BODY[::-1], '"two"'
    run(tmp_path, entry(server, sha256=hashlib.sha256(BODY[::-1]).hexdigest()))
    assert (tmp_path / "sub/file.bin").read_bytes() == BODY[::-1]


def test_a_wrong_range_starts_afresh(server, tmp_path):
    server.script = [1_000_000, "wrong range"]
    run(tmp_path, entry(server))
    assert (tmp_path / "sub/file.bin").read_bytes() == BODY


def test_a_server_that_stays_broken_is_given_up_and_nothing_is_lost(server, tmp_path):
    server.script = [1_000_000, 503, 503]
    with pytest.raises(ManifestError, match=r"HTTP 503.*3 attempts.*file\.bin\.part: run the same command"):
        run(tmp_path, entry(server), attempts=3)
    assert (tmp_path / "sub/file.bin.part").read_bytes() == BODY[:1_000_000]
    assert not (tmp_path / "sub/file.bin").exists()
    run(tmp_path, entry(server))
    assert (tmp_path / "sub/file.bin").read_bytes() == BODY


def test_refusals_and_dead_addresses(server, tmp_path):
    server.script = [404]
    with pytest.raises(ManifestError, match=r"HTTP 404 Not Found: the server refuses"):
        run(tmp_path, entry(server))
    assert len(server.asked) == 1
    with pytest.raises(ManifestError, match=r"127\.0\.0\.1:9.*2 attempts"):
        run(tmp_path, entry(server, url="http://127.0.0.1:9/file"), attempts=2)


def test_wrong_bytes_are_refused_and_not_continued(server, tmp_path):
    server.body = BODY[:-1] + b"?"
    with pytest.raises(ManifestError, match=r"SHA-256 .* expected .* by the manifest \(the test\)"):
        run(tmp_path, entry(server))
    assert not (tmp_path / "sub/file.bin").exists()
    server.body, server.etag = BODY, '"two"'
    run(tmp_path, entry(server))
    assert (tmp_path / "sub/file.bin").read_bytes() == BODY
    server.body = BODY[:-5]
    with pytest.raises(ManifestError, match=rf"{len(BODY) - 5} bytes, {len(BODY)} by the manifest"):
        run(tmp_path / "other", entry(server))


def test_an_unpublished_checksum_is_recorded_first_and_held_against_later(server, tmp_path):
    unknown = entry(server, sha256=None, num_bytes=None)
    assert "none published, recorded in m.lock.json" in run(tmp_path, unknown)
    assert lock(tmp_path)["sub/file.bin"]["sha256"] == SHA
    damaged = bytearray(BODY)
    damaged[5] ^= 1
    (tmp_path / "sub/file.bin").write_bytes(damaged)
    with pytest.raises(ManifestError, match=r"SHA-256 .* expected .*m\.lock\.json, as it first arrived"):
        run(tmp_path, unknown)
    (tmp_path / "sub/file.bin").unlink()
    server.body = bytes(damaged)
    with pytest.raises(ManifestError, match="its origin changed it"):
        run(tmp_path, unknown)
    (tmp_path / "m.lock.json").write_text("[1]")
    with pytest.raises(ManifestError, match="not a lock file"):
        run(tmp_path, unknown)


def archive(**members: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        for name, content in members.items():
            opened.writestr(f"train/{name}.jpg", content)
    return packed.getvalue()


def zipped(server, **changes) -> ManifestFile:
    sha256 = hashlib.sha256(server.body).hexdigest()
    return entry(server, "a.zip", sha256=sha256, num_bytes=len(server.body), extract_to="coco", **changes)


def test_archives_are_unpacked_continued_and_removed(server, tmp_path):
    server.body = archive(one=b"1" * 1000, two=b"2" * 2000)
    run(tmp_path, zipped(server), extract=False)
    assert not (tmp_path / "coco").exists()
    (tmp_path / "coco/train").mkdir(parents=True)
    (tmp_path / "coco/train/one.jpg").write_bytes(b"1" * 10)  # as a killed run leaves it
    run(tmp_path, zipped(server))
    assert (tmp_path / "coco/train/one.jpg").read_bytes() == b"1" * 1000
    assert (tmp_path / "coco/train/two.jpg").read_bytes() == b"2" * 2000
    assert lock(tmp_path)["a.zip"]["extracted"] == 2
    run(tmp_path, zipped(server), delete_archives=True)
    assert not (tmp_path / "a.zip").exists()
    assert "unpacked and removed before" in run(tmp_path, zipped(server))
    assert len(server.asked) == 1


def test_a_damaged_archive_is_named(server, tmp_path):
    server.body = archive(one=b"1" * 1000)[:-30]
    with pytest.raises(ManifestError, match=r"a\.zip: not a sound zip archive"):
        run(tmp_path, zipped(server))


def test_room_is_checked_before_anything_is_fetched(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, download_module.SPARE_BYTES + 5_000_000))
    run(tmp_path / "fits", entry(server))
    server.asked.clear()
    server_says = entry(server, "b.bin", num_bytes=None)  # asked from the server: 3 MB more
    with pytest.raises(ManifestError, match=r"0\.0 GB are needed.*--only"):
        run(tmp_path / "full", entry(server), server_says)
    with pytest.raises(ManifestError, match="archives and what is in them"):
        run(tmp_path / "full", entry(server, extract_to="x"))
    assert server.asked == []


def test_a_full_disk_and_a_second_run_are_named(server, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (tmp_path / ".m.downloading").open("w") as held:  # as another process holds it
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ManifestError, match="another run is downloading m here"):
            run(tmp_path, entry(server))
    monkeypatch.setattr(download_module, "fetch", full)
    with pytest.raises(ManifestError, match="the disk is full"):
        run(tmp_path, entry(server))


def special(kind: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        opened.writestr("train/one.jpg", b"1" * 100)
        names = {"leaves": "../out.jpg", "absolute": "/out.jpg", "windows": "..\\out.jpg", "long": "x" * 300 + ".jpg"}
        info = zipfile.ZipInfo(names.get(kind, "train/two.jpg"))
        if kind == "link":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(info, b"/etc/passwd")
    content = bytearray(packed.getvalue())
    if kind == "encrypted":
        for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.rindex(signature) + offset] |= 1
    if kind == "method":
        for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
            content[content.rindex(signature) + offset] = 97
    return bytes(content)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("encrypted", "is encrypted"),
        ("link", "is a link or a device"),
        ("leaves", "would leave the folder"),
        ("absolute", "would leave the folder"),
        ("windows", "would leave the folder"),
        ("long", "too long"),
        ("method", "cannot be unpacked here"),
    ],
)
def test_an_archive_that_holds_what_it_must_not_is_named(server, tmp_path, kind, message):
    server.body = special(kind)
    (tmp_path / "root").mkdir()
    with pytest.raises(ManifestError, match=rf"a\.zip: .*{message}"):
        run(tmp_path / "root", zipped(server))
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    if kind != "method":
        assert not (tmp_path / "root" / "coco").exists()

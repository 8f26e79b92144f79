"""Checkpoints of a hub, against a small server on this machine that answers as the hub does."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tests import tiny

from vzip.models.hub import needed_files
from vzip.models.weights.tuned import save_tuned

SRC = Path(__file__).resolve().parents[2] / "src"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import vzip
vlm = vzip.load_vlm("org/tiny", revision="main")
print(vlm.name_or_path, vlm.revision, vlm.processor is not None)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, org/tiny: what the hub's client asks to learn of its files and to fetch them."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        names = sorted(file.name for file in self.folder.iterdir())
        if path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
            self._answer(
                json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})
            )
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            sizes = [(name, (self.folder / name).stat().st_size) for name in names]
            self._answer(
                json.dumps([{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes])
            )
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/") and (name := path.rpartition("/")[2]) in names:
            self._answer((self.folder / name).read_bytes(), ETag=f'"{name}"', **{"X-Repo-Commit": COMMIT})
        else:
            self.send_error(404)

    def _answer(self, body: str | bytes, **headers: str) -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "repository"
    tiny.llava(vocab_size=320).save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in the old format")
    Hub.folder, Hub.asked = folder, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load(endpoint: str, cache: Path, code: str = LOAD, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": str(SRC), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**kept, **settings, **environment}
    )


@pytest.mark.whole
def test_a_checkpoint_is_fetched_once_and_then_needs_no_hub(hub, tmp_path):
    endpoint, cache = f"http://127.0.0.1:{hub.server_port}", tmp_path / "cache"
    first = load(endpoint, cache)
    expected = f"org/tiny {COMMIT} True"
    assert first.stdout.strip().splitlines()[-1:] == [expected], first.stderr
    fetched = {path.rpartition("/")[2] for path in Hub.asked if "/resolve/" in path}
    assert "model.safetensors" in fetched and "pytorch_model.bin" not in fetched  # one format of two
    hub.shutdown()
    hub.server_close()
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):  # the hub gone; said to be gone
        again = load(endpoint, cache, **offline)
        assert again.stdout.strip().splitlines()[-1:] == [expected], again.stderr


LOAD_TUNED = """
from vzip.models.weights.tuned import read_header, read_tensors
folder, header = read_header("org/tiny@main")
print(folder.name, header["step"], sum(read_tensors(folder)["projector.weight"].tolist()))
"""


@pytest.mark.whole
def test_tuned_weights_are_fetched_once_and_then_need_no_hub(hub, tmp_path):
    Hub.folder = tmp_path / "tuned"
    base = {"name_or_path": "org/base", "revision": None, "model_class": "L", "probe": [1.0]}
    header = {"format": "vzip-tuned-1", "base": base, "compressor": "Identity()", "step": 7}
    save_tuned(Hub.folder, {"projector.weight": torch.tensor([1.0, 2.5])}, header)
    (Hub.folder / "README.md").write_text("# card")
    endpoint, cache = f"http://127.0.0.1:{hub.server_port}", tmp_path / "cache"
    first = load(endpoint, cache, LOAD_TUNED)
    assert first.stdout.strip().splitlines()[-1:] == [f"{COMMIT} 7 3.5"], first.stderr
    assert not [path for path in Hub.asked if path.endswith("README.md")]
    hub.shutdown()
    hub.server_close()
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        again = load(endpoint, cache, LOAD_TUNED, **offline)
        assert again.stdout.strip().splitlines()[-1:] == [f"{COMMIT} 7 3.5"], again.stderr


def test_of_a_repository_what_is_read_is_fetched():
    tuned = ["README.md", "digests.json", "tuned.json", "tuned.safetensors"]
    lora = ["lora/adapter_config.json", "lora/adapter_model.safetensors"]
    assert set(needed_files([*tuned, *lora])) == {*tuned[1:], *lora}
    whole = ["config.json", "model.safetensors", "pytorch_model.bin", "lora/adapter_config.json"]
    assert set(needed_files(whole)) == {"config.json", "model.safetensors"}


@pytest.mark.whole
def test_a_hub_that_never_answers_costs_one_try(tmp_path, silent_server):
    done = load(silent_server.url, tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vzip.errors.CheckpointError: model.name_or_path=org/tiny: the checkpoint at revision main")
    assert "HF_HUB_OFFLINE=1" in last and "model.name_or_path=DIR" in last and "timed out" in last
    assert [line for line in silent_server.asked if "org/tiny" in line] == [
        "GET /api/models/org/tiny/revision/main HTTP/1.1"
    ]


@pytest.mark.whole
def test_a_repository_that_is_not_there_is_said_so(hub, tmp_path):
    hub_code = LOAD.replace("org/tiny", "org/absent")
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path)}
    environment |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", hub_code], capture_output=True, text=True, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert "CheckpointError: model.name_or_path=org/absent" in last and "404" in last

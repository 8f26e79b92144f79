"""`make .venv-vllm`: what makes the CPU's vLLM usable."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from scripts import vllm_env


def test_the_alias_is_of_the_vllm_that_is_installed_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_env, "SITE", tmp_path)
    monkeypatch.setattr(vllm_env, "importable", lambda module: subprocess.CompletedProcess([], 0, "", ""))
    for version in ("0.32.0", "0.32.0", "0.33.0"):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        assert vllm_env.main() == 0
        assert [found.version for found in metadata.distributions(name="vllm", path=[str(tmp_path)])] == [
            f"{version}+cpu"
        ]

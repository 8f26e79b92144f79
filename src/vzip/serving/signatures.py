"""What the plug-in relies on of vLLM, held against the vLLM that is installed: ``signatures.json``.

Read from the source without importing it. After a change of ``models.py``, with the vLLM that it was tested with:
``python -c "from vzip.serving import signatures; signatures.write_down()"``.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from vzip.errors import UnsupportedModelError
from vzip.json_files import read_json

PATH = Path(__file__).with_name("signatures.json")


def signatures_of(source: str) -> dict[str, str]:
    """Arguments of every function of a file by ``function`` or ``Class.function``; defaults, but no annotations."""
    found: dict[str, str] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                for argument in ast.walk(node.args):
                    if isinstance(argument, ast.arg):
                        argument.annotation = None
                found[prefix + node.name] = ast.unparse(node.args)

    visit(ast.parse(source).body, "")
    return found


def committed() -> dict[str, Any]:
    """``vllm``: the version; ``signatures``: by file of vLLM and name, the arguments."""
    return read_json(PATH)


def check_signatures(folder: Path, version: str) -> None:
    """Holds what is relied on against an installation of vLLM.

    Args:
        folder: of the package.
        version: what it calls itself.

    Raises:
        UnsupportedModelError: something is gone, or is called otherwise.
    """
    known = committed()
    for file, names in known["signatures"].items():
        path = folder / file
        there = signatures_of(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name, arguments in names.items():
            if (now := there.get(name)) != arguments:
                became = "is not there any more" if now is None else f"is called with ({now})"
                raise UnsupportedModelError(
                    f"vLLM {version}: {name} of vllm/{file} {became}, and vzip was written for ({arguments}) of vLLM"
                    f" {known['vllm']}. Install vllm=={known['vllm']}, or a vzip that knows this one."
                )


def write_down(folder: Path | None = None, version: str | None = None) -> None:
    """Writes ``signatures.json`` anew, of the same names, from the installed vLLM."""
    if folder is None or version is None:
        import vllm

        folder, version = Path(vllm.__file__).parent, vllm.__version__
    signatures = {}
    for file, names in committed()["signatures"].items():
        there = signatures_of((folder / file).read_text(encoding="utf-8"))
        signatures[file] = {name: there[name] for name in names}
    content = {"vllm": version.split("+")[0], "signatures": signatures}
    PATH.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

"""What mkdocs adds to docs/: README as the first page, CONTRIBUTING and CHANGELOG, and the notebooks as pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
NOT_SHOWN = ("CITATION.cff", "AGENTS.md")  # beside docs/, and no page of the site


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=from_root((ROOT / source).read_text(encoding="utf-8"))))
    for path in sorted((Path(config.docs_dir) / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to a notebook go to its page here; on a forge they show the notebook itself."""
    return re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)


def from_root(text: str) -> str:
    """A page that lies beside docs/, as if it lay in it: its links and pictures."""
    text = text.replace("](docs/", "](")
    for name, source in PAGES.items():
        text = text.replace(f"]({source})", f"]({name})")
    for name in NOT_SHOWN:
        text = text.replace(f"[{name}]({name})", f"`{name}`")
    return text


def notebook(path: Path) -> str:
    """A notebook's words and code as a page, and the file to download. It holds no outputs; a test runs it."""
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    title, *rest = [
        f"```python\n{''.join(cell['source'])}\n```" if cell["cell_type"] == "code" else "".join(cell["source"])
        for cell in cells
    ]
    return "\n\n".join([title, f"[Download this notebook]({path.name})", *rest]) + "\n"

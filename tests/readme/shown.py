"""The commands that README.md, CONTRIBUTING.md and docs/**/*.md show, and what commands.yaml says of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
# What an inline code span begins with if it is a command.
_COMMAND = re.compile(r"(\.venv/bin/\w+|python|make|vzip|lmms-eval|pytest|pip|sbatch|scripts/\S+\.(sh|py)|\. \S+) \S")
TAGS = ("run", "compose", "refuse")


@dataclass(frozen=True)
class Entry:
    """What must come of a command.

    Attributes:
        command: as the page shows it.
        tag: ``run``: carried out, with ``add`` behind it; ``compose``: it needs a hub, a GPU or a cluster, so it is
            composed and checked, and its plan printed (``add`` or ``instead`` says how); ``refuse``: an error is
            shown.
        exit: the exit code.
        says: texts of which each must stand in what it prints.
        add: overrides that keep it small.
        where: what stands in place of a placeholder (RUN, DIR, FILE).
        instead: the command in full where adding and replacing do not do.
        first: a shell command that prepares what it needs.
        part: of commands.yaml in which it stands.
    """

    command: str
    tag: str
    exit: int = 0
    says: tuple[str, ...] = ()
    add: str = ""
    where: dict[str, str] = field(default_factory=dict)
    instead: str = ""
    first: str = ""
    part: str = ""

    @property
    def line(self) -> str:
        """What the shell is given."""
        text = self.instead or self.command
        for name, value in self.where.items():
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w])", value, text)
        return f"{text} {self.add}".strip()


def shown_commands(text: str) -> list[str]:
    """Commands of a page's ```bash blocks, continued lines joined and comments left out, and of inline code."""
    found: list[str] = []
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        found += [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found += [span for span in spans if _COMMAND.match(span)]
    return list(dict.fromkeys(command for command in found if command))


def entries() -> list[Entry]:
    """The entries of commands.yaml, in the order in which they stand."""
    parts = yaml.safe_load((Path(__file__).parent / "commands.yaml").read_text(encoding="utf-8"))
    return [
        Entry(**{**entry, "part": part, "says": tuple([says] if isinstance(says, str) else says)})
        for part, listed in parts.items()
        if part != "prepared"  # what several entries take up
        for entry in listed
        for says in [entry.get("says", ())]
    ]


def shown_files() -> dict[str, str]:
    """The files that docs/add-a-method.md shows whole, by the path in the line before."""
    text = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    found = re.findall(r"^`((?:src|configs)/\S+)`:\n\n```(?:python|yaml)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return dict(found)


def write_files(root: str | Path) -> None:
    """Writes them, below ``root``."""
    for name, text in shown_files().items():
        target = Path(root) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

"""The names of lmms-eval's tasks, read from their files in a moment: importing lmms-eval takes many seconds."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vzip.errors import ConfigError, nearest

# Tasks of vzip's: mostly an installed task of lmms-eval with a line or two changed.
OWN_TASKS = Path(__file__).with_name("tasks")
# Keys that name something to ask for, and the items of their lists.
_NAMING = re.compile(r"^\s*-?\s*[\"']?(?:task|group|tag)[\"']?\s*:(.*)$|^\s*-\s+([^:#]+?)\s*(?:#.*)?$", re.MULTILINE)
_NAME = re.compile(r"[^\s,\[\]\"'#]+")


def refuse_unknown(tasks: Sequence[str], folder: Path | None) -> None:
    """Refuses names that no task file has; more than the names is not looked at here.

    Args:
        tasks: names of tasks, groups or tags.
        folder: of task files beside lmms-eval's and vzip's; None: there is none.

    Raises:
        ConfigError: an unknown name. None is raised where lmms-eval is not installed, which is told later.
    """
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        return
    own = {name for place in (OWN_TASKS, folder) if place is not None for name in names_in(place)}
    if own >= set(tasks):
        return
    known = own | _names_installed(Path(spec.submodule_search_locations[0]) / "tasks")
    unknown = [name for name in tasks if name not in known]
    if unknown:
        near = [hint for name in unknown if (hint := nearest(name, known))]
        raise ConfigError(
            f"eval.tasks: no such task: {', '.join(unknown)}. There are those of lmms-eval, of vzip"
            f" and of a folder of your own (eval.include_path){'; '.join(near)}."
        )


@functools.cache
def _names_installed(folder: Path) -> frozenset[str]:
    """Of a package's thousands of files, which stay as they are while the process lives."""
    return frozenset(names_in(folder))


def names_in(folder: Path) -> Iterator[str]:
    """Every name that a task file in or below a folder has; some more may be among them, none is missing."""
    for path in folder.rglob("*"):
        # A file that others include may have no ending.
        if path.suffix in (".yaml", ".yml", "") and path.is_file():
            for match in _NAMING.finditer(path.read_text(encoding="utf-8", errors="replace")):
                yield from _NAME.findall(match[1] or match[2] or "")

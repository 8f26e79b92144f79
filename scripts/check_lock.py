"""Compares what is installed with a lock: python scripts/check_lock.py lock.txt (part of `make check`).

Exit code 1 if a distribution has another version than the locked one, or none there. Left aside: vzip itself, pip, and
what torch's own CUDA builds bring, which differ from build to build.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# triton and NVIDIA's libraries come with a CUDA torch, under names and versions that its build chooses.
ASIDE = re.compile(r"vzip|pip|triton|pytorch-triton.*|nvidia-.*|cuda-.*")


def locked_versions(lock: str) -> dict[str, str]:
    """The versions that a lock pins for this interpreter and platform, by canonical name."""
    pins = [Requirement(line) for line in lock.splitlines() if line and not line.startswith((" ", "#"))]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in here}


def differences(installed: dict[str, str], locked: dict[str, str]) -> list[str]:
    """A line for each installed distribution that is not the locked one; a build's local part (+cpu) does not count."""
    problems = []
    for name, version in sorted(installed.items()):
        if ASIDE.fullmatch(name):
            continue
        if name not in locked:
            problems.append(f"{name} {version} is installed, and the lock does not have it")
        elif Version(version).public != Version(locked[name]).public:
            problems.append(f"{name} {version} is installed, the lock says {locked[name]}")
    return problems


def main(path: str) -> int:
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in distributions()}
    problems = differences(installed, locked_versions(Path(path).read_text()))
    if not problems:
        print(f"{len(installed)} installed distributions are as {path} says")
        return 0
    print("\n".join(problems))
    print(f"Remove .venv and run `make install`; or, if the newer versions are wanted, `make lock`. ({path})")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""Catching a broken optional package before it breaks transformers' own imports in a way nobody can read.

transformers only looks whether torchvision and timm are installed, not whether they work. A torchvision built for
another torch then fails at ``import`` of every image processor and model, with ``operator torchvision::nms does not
exist``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable

from vzip.errors import MissingPackageError


def refuse_broken_packages(names: Iterable[str]) -> None:
    """Imports each of the named packages that is installed.

    Absent packages are fine: nothing here needs them.

    Raises:
        MissingPackageError: a package is installed but cannot be imported; names it and how to remove it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            raise MissingPackageError(
                f"The installed package {name} does not work here ({type(error).__name__}: {error}). transformers uses"
                f" it whenever it is installed, so no model can be loaded. vzip does not need it: remove it (pip"
                f" uninstall {name}), or install the build of {name} that matches the installed torch."
            ) from error

"""Importing lmms-eval's task functions without packages that only other functions beside them need."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


class _Unused(ModuleType):
    """Stands for a package that is imported and not used; what is taken from it raises when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> Any:
            raise ModuleNotFoundError(f"{self.__name__}.{name} was called, and {self.__name__} is not installed")

        return absent


@contextlib.contextmanager
def unused(*packages: str) -> Iterator[None]:
    """Lets imports of ``packages`` inside succeed where they are not installed.

    Videos are decoded by ``vzip.media`` alone, so OpenCV and decord, which lmms-eval's modules import at their top, are
    never called here.
    """
    absent = [name for name in packages if name not in sys.modules and importlib.util.find_spec(name) is None]
    sys.modules.update({name: _Unused(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]

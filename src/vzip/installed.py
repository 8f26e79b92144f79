"""What is installed beside the modules: the checkout's files, and the optional packages."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from vzip.errors import ConfigError, MissingPackageError

_PACKAGE = Path(__file__).resolve().parent
# What setup.py puts into a wheel; not there in a checkout.
COPY = _PACKAGE / "_checkout"
# lmms-eval's own pins clash with the rest: it is installed without them, after the extra that holds what it needs.
_WITHOUT_ITS_PINS = {"lmms-eval": "eval"}
# An extra with versions of its own: what installs it in a checkout, and the lock that has them.
_OWN_LOCK = {"demo": ("make page", "lock-demo.txt")}
# Imported by another name than the requirement has that brings it.
_IMPORTED_AS = {"hydra": "hydra-core", "omegaconf": "hydra-core", "PIL": "pillow", "yaml": "pyyaml"}


def checkout() -> Path:
    """The folder with ``configs``, ``data_manifests``, ``eval.py`` and ``train.py``: the checkout, or a wheel's copy.

    The working directory has no say, so a folder there that happens to be called ``configs`` is never taken.

    Raises:
        ConfigError: there is neither.
    """
    folder = COPY if COPY.is_dir() else _PACKAGE.parents[1]
    if not (folder / "configs" / "base.yaml").is_file():
        raise ConfigError(
            f"{folder / 'configs'}: no base.yaml. It comes with a checkout and with the wheel that `python -m build`"
            " makes of one: install vzip from either."
        )
    return folder


def program(command: str) -> str:
    """What is typed to run a command: a checkout's script, or what a wheel installs."""
    if COPY.is_dir():
        return f"vzip {command}"
    return f"python {command}.py" if command in ("eval", "train") else f"python -m vzip {command}"


def missing_package(
    what: str, module: str, error: ImportError | None = None, *, extra: str | None = None, otherwise: str = ""
) -> MissingPackageError:
    """The error that names an optional package and the command that installs it.

    Args:
        what: what needs the package: a setting with its value, or a command.
        module: the package as it is imported; the whole dotted name where a namespace holds several packages.
        error: what importing it raised, if it was tried.
        extra: the one to name if it holds the package; by default the smallest that does.
        otherwise: what to do instead, such as ``"leave it out"``.
    """
    package = _distribution(module)
    absent = error is None or (isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0])
    why = "which is not installed" if absent else f"which cannot be imported ({error})"
    instead = f", or {otherwise}" if otherwise else ""
    return MissingPackageError(f"{what} needs the package {package}, {why}: {_command(package, extra)}{instead}.")


def check_quantization(quantization: str | None) -> None:
    """Raises MissingPackageError where a quantized model is asked for and bitsandbytes is not installed."""
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        what = f"model.quantization={quantization}"
        raise missing_package(what, "bitsandbytes", otherwise="set model.quantization=null")


def is_missing(package: str) -> bool:
    """Whether a distribution is one of vzip's requirements and not installed."""
    return package in _requirements() and not any(metadata.distributions(name=package))


@contextlib.contextmanager
def optional_packages(what: str, extra: str | None = None) -> Iterator[None]:
    """Whatever is imported inside and is not installed becomes the error of ``missing_package``.

    A missing module of vzip or of Python itself is a bug and stays what it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        top = (error.name or "vzip").split(".")[0]
        if top == "vzip" or top in sys.stdlib_module_names:
            raise
        raise missing_package(what, error.name or top, error, extra=extra) from error


def _command(package: str, extra: str | None) -> str:
    """What installs a package, as vzip itself was installed: from a checkout, or from a wheel."""
    of = _requirements()
    if not of:
        return "`make install`"  # modules on the path that were never installed have no metadata
    alone = _WITHOUT_ITS_PINS.get(package)
    if alone is None and package not in of:
        return "it is none of vzip's own requirements, so install what it is part of"
    having = sorted(of[package], key=lambda name: sum(name in extras for extras in of.values()))
    chosen = alone or (extra if extra in having else having[0])
    brackets = f"[{chosen}]" if chosen else ""
    in_checkout = not COPY.is_dir()
    target, lock = _OWN_LOCK.get(chosen, ("make install", "lock.txt"))
    words = f"pip install -c {lock} -e '.{brackets}'" if in_checkout else f"pip install 'vzip{brackets}'"
    if alone is not None:
        (line,) = of[package].values()
        words += f" && pip install --no-deps '{line}'"
    return f"`{target}`, or {words}" if in_checkout else words


def _distribution(module: str) -> str:
    """The requirement that a dotted module name belongs to, or its first part."""
    module = _IMPORTED_AS.get(module.split(".")[0], module)
    parts = [part.replace("_", "-") for part in module.split(".")]
    return next((part for part in parts if part in _requirements()), parts[0])


@cache
def _requirements() -> dict[str, dict[str, str]]:
    """Of the installed vzip: by package and extra (empty: always needed), the package with its range."""
    from packaging.requirements import Requirement  # only for an error: `import vzip` does without
    from packaging.utils import canonicalize_name

    try:
        lines = metadata.requires("vzip") or []
    except metadata.PackageNotFoundError:
        lines = []
    found: dict[str, dict[str, str]] = {}
    for requirement in map(Requirement, lines):
        extra = re.search('extra == "(.+?)"', str(requirement.marker))
        of = found.setdefault(canonicalize_name(requirement.name), {})
        of[extra[1] if extra else ""] = f"{requirement.name}{requirement.specifier}"
    return found

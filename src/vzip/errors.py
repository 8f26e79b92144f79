"""Errors a user can cause and mend.

Every message says what was wrong with its value, the rule, what is allowed, and which key to change. Anything else that
escapes is a bug of ours and keeps its own type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VzipError(Exception):
    """Base of all errors that the user's input causes; entry points print it without a traceback."""


class ConfigError(VzipError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class UnsupportedModelError(VzipError, TypeError):
    """A model class, vision tower or option for which no adapter exists."""


class PromptError(VzipError, ValueError):
    """Prompt and images do not fit together, or a tensor has the wrong shape."""


class ImageError(VzipError, ValueError):
    """An image that cannot be read or used."""


class VideoError(VzipError, ValueError):
    """A video that cannot be read or used."""


class CheckpointError(VzipError, OSError):
    """A checkpoint that cannot be found, reached or loaded."""


class ManifestError(VzipError, ValueError):
    """Data that is missing, damaged or not what its manifest says."""


class RunExistsError(VzipError, FileExistsError):
    """A run directory that already holds results."""


class RunWriteError(VzipError, OSError):
    """A file of a run that cannot be written: the disk is full, or the rights are missing."""


class DeviceMemoryError(VzipError, MemoryError):
    """A device whose memory does not suffice even for the smallest piece of work."""


class JudgeError(VzipError, RuntimeError):
    """The judge model cannot be reached, refuses, or costs more than allowed."""


class MissingPackageError(VzipError, ImportError):
    """An optional package that is absent or broken."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""

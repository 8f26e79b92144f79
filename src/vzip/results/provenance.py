"""Where a number comes from: code, packages, machine, data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from vzip.installed import COPY

# What can change a number: the model's, the data's and the scores' packages; optional ones too.
_PACKAGES = (
    "vzip",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "lmms-eval",
    "datasets",
    "numpy",
    "pillow",
    "av",
)


def code_state() -> dict[str, Any]:
    """``commit`` and ``dirty`` of the checkout this package runs from; both None outside a checkout."""
    here = Path(__file__).resolve()

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here.parent), *args], capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed inside somebody else's checkout is not part of that checkout.
    if git("ls-files", "--error-unmatch", str(here)) is None:
        return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


@cache
def source_sha256() -> str:
    """Digest of this package's Python files: tells two states of a checkout apart, whether committed or not.

    A wheel's copies of eval.py and train.py are left out, so that it is told as its checkout is. Read once: files that
    change afterwards are not what this process runs.
    """
    package = Path(__file__).resolve().parents[1]
    files = sorted(file for file in package.rglob("*.py") if not file.is_relative_to(COPY))
    return hashlib.sha256(
        "".join(f"{file.relative_to(package)} {_sha256(file)}\n" for file in files).encode()
    ).hexdigest()


def versions() -> dict[str, str | None]:
    """Python's and each relevant package's version; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if found["vzip"] is None:  # run from the source tree without being installed
        import vzip

        found["vzip"] = vzip.__version__
    return found


def hardware() -> dict[str, Any]:
    """CPU, memory and GPUs of this machine."""
    import torch  # only here: commands that only read records need not wait for it

    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "num_cpu_cores": os.cpu_count(),
        "num_torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "gpu_memory_gib": [
            round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1)
            for index in range(torch.cuda.device_count())
        ],
        "cuda": torch.version.cuda,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), flags=re.MULTILINE)
        if match:
            return match.group(1)
    return platform.processor() or "unknown"


def reset_peak_memory() -> None:
    """Starts CUDA's peak counters anew; a process's peak resident size cannot be reset."""
    import torch  # only here: commands that only read records need not wait for it

    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def peak_memory_gib() -> dict[str, float | None]:
    """``process``: largest resident size since the process began. ``cuda``: largest allocated, summed over the GPUs."""
    import torch  # only here: commands that only read records need not wait for it

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    cuda = [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]
    return {
        "process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3),
        "cuda": round(sum(cuda) / 2**30, 3) if cuda else None,
    }


def weights_sha256(name_or_path: str) -> str | None:
    """Digest of a small local checkpoint's weights, which has no revision to be told by; None for a hub name.

    Of one in its authors' layout the parts that lie elsewhere, as a language model or a tower, are among them. Above
    256 MiB it is None too: reading many GiB for a record takes minutes.
    """
    folder = Path(name_or_path)
    if not name_or_path or not folder.is_dir():
        return None
    from vzip.models.families import original_checkpoint  # only here: commands that only read records do without

    original = original_checkpoint(folder) if (folder / "config.json").is_file() else None
    if original is not None:
        files = original.files()
    else:
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files or sum(file.stat().st_size for file in files) > 256 * 2**20:
        return None
    return hashlib.sha256("".join(_sha256(file) for file in files).encode()).hexdigest()


def data_of(config: Mapping[str, Any], dataset: Any, samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What one task was asked on.

    Args:
        config: the task's resolved lmms-eval configuration.
        dataset: its ``DatasetDict``.
        samples: the rows of ``samples.jsonl``.

    Returns:
        Path, name and split; the hub's revision where the data came from it; SHA-256 of local data files; and
        ``questions_sha256`` over number, prompt and target of every question asked, equal on every machine.
    """
    split = config.get("test_split") or config.get("validation_split")
    checksums = dataset[split].info.download_checksums or {}
    revisions = {
        match.group(1) for url in checksums if (match := re.search(r"^hf://datasets/[^@]+@([^/]+)/", str(url)))
    }
    questions = hashlib.sha256()
    for sample in samples:
        questions.update(repr((sample["doc_id"], sample["prompt"], sample["target"])).encode())
    return {
        "path": config.get("dataset_path"),
        "name": config.get("dataset_name"),
        "split": split,
        "num_rows": len(dataset[split]),
        "revision": sorted(revisions) or None,
        "files_sha256": {str(path): _sha256(path) for path in _local_files(config)} or None,
        "questions_sha256": questions.hexdigest(),
    }


def _local_files(config: Mapping[str, Any]) -> list[Path]:
    given = (config.get("dataset_kwargs") or {}).get("data_files")
    if given is None:
        return []
    values = given.values() if isinstance(given, Mapping) else [given]
    names = [name for value in values for name in ([value] if isinstance(value, str) else value)]
    return sorted(path for name in names if (path := Path(name)).is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

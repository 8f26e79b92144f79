"""How much memory there is, how much was used at the peak, and how much a key-value cache really holds."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from vzip.errors import ConfigError

GIB = 1024**3
_PROC_STATUS = Path("/proc/self/status")
_PROC_CLEAR_REFS = Path("/proc/self/clear_refs")


def available_bytes(device: torch.device) -> int | None:
    """Returns the memory that can still be allocated on a device, or None where the system does not tell.

    On the CPU that is the smaller of what the kernel calls available and what the control group (a container's limit)
    leaves.
    """
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free)
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    limits = [int(fields["MemAvailable"].split()[0]) * 1024]
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit_file, used_file = Path("/sys/fs/cgroup", limit_name), Path("/sys/fs/cgroup", used_name)
        if limit_file.exists() and used_file.exists() and limit_file.read_text().strip().isdigit():
            limits.append(int(limit_file.read_text()) - int(used_file.read_text()))
    return max(0, min(limits))


def refuse_if_too_large(needed_bytes: int, device: torch.device, what: str) -> None:
    """Raises before anything is allocated when an estimate exceeds what the device has left.

    Args:
        needed_bytes: estimated bytes.
        device: where they would be allocated.
        what: what needs them, for the message.

    Raises:
        ConfigError: naming both numbers and the keys to change.
    """
    available = available_bytes(device)
    if available is not None and needed_bytes > available:
        raise ConfigError(
            f"{what} needs about {needed_bytes / GIB:.1f} GiB on {device}, but only {available / GIB:.1f} GiB is "
            "available; choose a smaller one (model=tiny, model=clip_l_336), dtype=bfloat16, fewer num_crops, a "
            "smaller batch_size, or another device"
        )


def release_unused(device: torch.device) -> None:
    """Gives freed memory back to the system, so that one method's peak does not show up in the next one's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc has it, musl does not
            libc.malloc_trim(0)


class PeakMemory:
    """Context that measures the largest memory use within it.

    Attributes:
        kind: ``cuda_max_allocated`` (bytes in tensors, from torch's allocator), ``rss_peak`` (resident memory of the
            process, peak reset on entry) or ``rss_peak_of_process`` (where the system cannot reset it: the peak since
            the process began, hence an upper bound).
        peak_bytes: the peak, everything included (weights, and on the CPU the program itself).
        start_bytes: what was in use on entry, so that ``peak_bytes - start_bytes`` is what the work itself added.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes = 0
        self.start_bytes = 0
        if device.type == "cuda":
            self.kind = "cuda_max_allocated"
        else:
            self.kind = "rss_peak" if _PROC_CLEAR_REFS.exists() else "rss_peak_of_process"

    def __enter__(self) -> PeakMemory:
        release_unused(self.device)
        if self.kind == "cuda_max_allocated":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start_bytes = torch.cuda.memory_allocated(self.device)
        elif self.kind == "rss_peak":
            try:
                _PROC_CLEAR_REFS.write_text("5")  # 5 resets the peak resident set size, see proc(5)
            except OSError:
                self.kind = "rss_peak_of_process"
            self.start_bytes = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.kind == "cuda_max_allocated":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        elif _PROC_STATUS.exists():
            self.peak_bytes = _status_bytes("VmHWM")
        else:
            self.peak_bytes = _rusage_peak_bytes()


def _status_bytes(field: str) -> int:
    for line in _PROC_STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"{_PROC_STATUS} has no field {field}; this system's memory use cannot be measured")


def _rusage_peak_bytes() -> int:
    import resource  # absent on Windows, where nothing else of this project was tried either

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the bytes that tensors keep allocated, counting a storage shared by several of them once.

    A view of a larger tensor keeps all of it alive, which ``numel() * element_size()`` would not show.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def kv_cache_formula_bytes(
    *, num_layers: int, num_kv_heads: int, head_dim: int, num_tokens: int, batch_size: int, element_bytes: int
) -> int:
    """Returns ``2 * layers * heads * dim * tokens * batch * bytes``: keys and values of a full-attention decoder."""
    return 2 * num_layers * num_kv_heads * head_dim * num_tokens * batch_size * element_bytes

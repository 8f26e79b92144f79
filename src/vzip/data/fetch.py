"""One file over HTTP, continued where an earlier attempt ended.

The file grows as given, ``NAME.part`` say. ``NAME.part.json`` beside it says which version of which address it holds; a
later attempt asks for the rest by a range request, and only if the remote file is still that version.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from vzip.errors import ManifestError
from vzip.json_files import read_json

_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)

# Called with the bytes there are and, where known, the bytes there will be.
OnProgress = Callable[[int, int | None], None]


class _TryAgain(Exception):
    """The server or the line failed in a way that may pass."""


def new_client() -> httpx.Client:
    """A client that follows redirects and takes files as they are stored, not compressed for the way."""
    return httpx.Client(follow_redirects=True, timeout=60.0, headers={"Accept-Encoding": "identity"})


def fetch(
    client: httpx.Client,
    url: str,
    part: Path,
    *,
    num_attempts: int,
    max_wait_s: float,
    on_progress: OnProgress,
    on_failure: Callable[[str], None],
) -> None:
    """Fetches a file, trying again after failures that may pass.

    Args:
        client: from ``new_client``.
        url: the file's address.
        part: where it grows; continued if it is the same version of the same address.
        num_attempts: at most; the pause before the second is a second, each further one is twice as long.
        max_wait_s: longest pause.
        on_progress: see ``OnProgress``.
        on_failure: called with the reason before each pause.

    Raises:
        ManifestError: the server refuses, or the last attempt failed too; ``part`` is kept.
    """

    def before_sleep(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        on_failure(str(error) or type(error).__name__)

    attempts = Retrying(
        retry=retry_if_exception_type((_TryAgain, httpx.TransportError)),
        stop=stop_after_attempt(num_attempts),
        wait=wait_exponential(max=max_wait_s),
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        attempts(_attempt, client, url, part, on_progress)
    except (_TryAgain, httpx.HTTPError, httpx.InvalidURL) as error:
        raise ManifestError(
            f"{url}: {str(error) or type(error).__name__} ({num_attempts} attempts). What has arrived is kept in"
            f" {part}: run the same command again to continue."
        ) from error


def forget(part: Path) -> None:
    """Lets the next attempt start from the first byte."""
    _state_of(part).unlink(missing_ok=True)


def remote_size(client: httpx.Client, url: str) -> int:
    """Bytes by the server's word, 0 where it gives none; whether it answers at all shows when it is asked to send."""
    try:
        response = client.head(url)
    except httpx.HTTPError:
        return 0
    return (_total(response) or 0) if response.status_code == 200 else 0


def _attempt(client: httpx.Client, url: str, part: Path, on_progress: OnProgress) -> None:
    version = _known_version(part, url)
    start = part.stat().st_size if version else 0
    headers = {"Range": f"bytes={start}-", "If-Range": version} if version and start else {}
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == 416 and _total(response) == start:
            return  # everything had arrived
        _refuse_or_retry(response, url)
        if response.status_code != 206:
            start = 0
        elif _first_byte(response) != start or _version(response) != version:
            forget(part)
            raise _TryAgain("the server sent something else than the rest of the file; starting afresh")
        total = _total(response)
        on_progress(start, total)
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            _state_of(part).write_text(json.dumps({"url": url, "version": _version(response)}), encoding="utf-8")
            for chunk in response.iter_raw():
                file.write(chunk)
                on_progress(file.tell(), total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.stat().st_size != total:
        raise _TryAgain(f"the line broke after {part.stat().st_size} of {total} bytes")


def _refuse_or_retry(response: httpx.Response, url: str) -> None:
    """Sorts out every answer that brings no bytes."""
    status = f"HTTP {response.status_code} {response.reason_phrase}"
    if response.status_code in _RETRIED_STATUS:
        raise _TryAgain(status)
    if response.status_code not in (200, 206):
        raise ManifestError(f"{url}: {status}: the server refuses; the address may have moved.")


def _state_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _known_version(part: Path, url: str) -> str | None:
    """The version that ``part`` holds the beginning of, or None if it is not known to be this address's."""
    try:
        state = read_json(_state_of(part))
        version, of = state["version"], state["url"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # killed while it was written
        return None
    return version if part.exists() and of == url and isinstance(version, str) else None


def _version(response: httpx.Response) -> str | None:
    """What names the remote file's bytes: a strong entity tag, else the date of change."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _total(response: httpx.Response) -> int | None:
    """The whole file's bytes by this answer."""
    of_range = response.headers.get("Content-Range", "").rpartition("/")[2]
    length = of_range if response.status_code in (206, 416) else response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _first_byte(response: httpx.Response) -> int | None:
    first = response.headers.get("Content-Range", "").removeprefix("bytes").strip().partition("-")[0]
    return int(first) if first.isdigit() else None

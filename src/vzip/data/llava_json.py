"""Random access to a file in LLaVA's format, flat in memory whatever its size.

The file stays on disk behind a memory map; a table of 48 bytes a record (``llava_index``) says where each one lies. The
object may be handed to worker processes: it is a path and two maps, opened again on the other side.
"""

from __future__ import annotations

import json
import mmap
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from vzip.errors import ConfigError, ManifestError

from .llava_index import load_index, open_index
from .llava_record import IMAGE_PLACEHOLDER, Record, Sample, Turn, parse_record

__all__ = ["IMAGE_PLACEHOLDER", "LlavaJson", "Sample", "Turn"]

OnProblem = Literal["refuse", "skip"]
_NUM_PROBLEMS_SHOWN = 10


class LlavaJson:
    """The good records of a LLaVA-format file, in its order.

    Args:
        path: a JSON array of records, or one record a line.
        image_root: folder that the paths of images and videos start from; by default the JSON file's own. Absolute
            paths stay as they are. Whether the files exist is ``vzip data verify``'s business.
        on_problem: what becomes of records that break the format: ``"refuse"`` raises, ``"skip"`` leaves them out and
            counts them in ``num_skipped``.
        cache: folder for the index; by default ``$VZIP_CACHE`` or ``~/.cache/vzip``.

    Raises:
        ManifestError: no such file, not JSON, no record at all; with ``"refuse"``, any record that breaks the format.
        ConfigError: another ``on_problem``.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        *,
        on_problem: OnProblem = "refuse",
        cache: str | Path | None = None,
    ) -> None:
        if on_problem not in get_args(OnProblem):
            raise ConfigError(f"on_problem={on_problem!r}: must be one of {', '.join(get_args(OnProblem))}.")
        self.path = Path(path).expanduser()
        self.image_root = Path(image_root).expanduser() if image_root is not None else self.path.parent
        self._index = load_index(self.path, Path(cache).expanduser() if cache is not None else None)
        self._file: mmap.mmap | None = None
        if self._index.num_problems and on_problem == "refuse":
            raise ManifestError(self._refusal())
        if not len(self):
            raise ManifestError(f"{self.path}: holds no usable record ({self.num_skipped} break LLaVA's format).")

    def __len__(self) -> int:
        return len(self._index.rows)

    def __getitem__(self, i: int) -> Sample:
        """The ``i``-th sample; ``id`` is ``#i`` where the file gives none."""
        record = self.record(i)
        images = [self.image_root / image for image in record.images]
        return Sample(record.label(i), images, list(record.turns), [self.image_root / name for name in record.videos])

    def record(self, i: int) -> Record:
        """The ``i``-th record in the file's own words."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        if self._file is None:
            with self.path.open("rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        row = self._index.rows[i]
        start = int(row["start"])
        return parse_record(json.loads(self._file[start : start + int(row["num_bytes"])]))

    def has_images(self, i: int) -> bool:
        """Whether sample ``i`` has an image or video; read from the index."""
        return bool(self._index.rows["num_images"][i])

    def source_of(self, i: int) -> str:
        """First folder of the first image or video (``coco``, ...), or ``text-only``; read from the index."""
        return self._index.sources[self._index.rows["source"][i]]

    @property
    def lengths(self) -> np.ndarray:
        """Words of all turns of each sample: int32 ``[samples]``; read from the index."""
        return self._index.rows["num_words"]

    @property
    def num_images(self) -> np.ndarray:
        """Images and videos of each sample: int32 ``[samples]``."""
        return self._index.rows["num_images"]

    @property
    def keys(self) -> np.ndarray:
        """What identifies each sample wherever it stands (``Record.key``): uint8 ``[samples, 16]``."""
        return self._index.rows["key"]

    @property
    def num_skipped(self) -> int:
        """Records left out because they break the format."""
        return self._index.num_problems

    @property
    def problems(self) -> list[str]:
        """What was wrong with the records left out, the first thousand of them."""
        return list(self._index.problems)

    @property
    def num_repeated_ids(self) -> int:
        """Samples whose id an earlier sample has too. In LLaVA's mixture that is normal: the id is the image's."""
        hashes = self._index.rows["id_hash"]
        given = hashes[hashes != 0]
        return int(given.size - np.unique(given).size)

    @property
    def num_identical(self) -> int:
        """Samples that repeat an earlier one word for word, id and images included."""
        return len(self) - len(np.unique(np.ascontiguousarray(self.keys), axis=0))

    def count_sources(self, indices: np.ndarray | None = None) -> dict[str, int]:
        """Samples by source, most frequent first; of all samples or of those at ``indices``."""
        codes = self._index.rows["source"] if indices is None else self._index.rows["source"][indices]
        counts = np.bincount(codes, minlength=len(self._index.sources))
        named = Counter({name: int(count) for name, count in zip(self._index.sources, counts, strict=True) if count})
        return dict(named.most_common())

    def __getstate__(self) -> dict[str, Any]:
        """Maps do not travel between processes: the other side opens them anew."""
        return {**self.__dict__, "_file": None, "_index": self._index.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_index": open_index(state["_index"])})

    def _refusal(self) -> str:
        shown = self._index.problems[:_NUM_PROBLEMS_SHOWN]
        rest = self._index.num_problems - len(shown)
        lines = [f"{self.path}: {self._index.num_problems} record(s) break LLaVA's format:"]
        lines += [f"  {problem}" for problem in shown]
        lines += [f"  ... and {rest} more"] if rest else []
        lines.append("Mend them, or leave them out with data.on_problem=skip.")
        return "\n".join(lines)

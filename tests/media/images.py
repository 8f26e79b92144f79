"""Images whose every pixel is known."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x // max(1, width - 1), 255 * y // max(1, height - 1)
    blue = 200 * ((x // 7 + y // 5) % 2) + (3 * x * y) % 40
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def bomb(path: Path, side: int = 30_000) -> Path:
    """A sound beginning of a PNG of more pixels than a machine should be made to hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * 100))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path

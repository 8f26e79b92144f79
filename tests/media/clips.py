"""Little videos."""

from __future__ import annotations

import av
import numpy as np

WIDTH, HEIGHT = 64, 48


def write(path, num_frames=20, codec="libx264", pix_fmt="yuv420p", times=None, audio=False, options=None):
    """A file whose frame i is grey of value 12 i (its left half black), at 10 frames a second."""
    with av.open(str(path), "w", options=options or {}) as container:
        if num_frames:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        if audio:
            sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for number in range(num_frames):
            values = np.full((HEIGHT, WIDTH, 3), 12 * number % 256, np.uint8)
            values[:, : WIDTH // 2] = 0
            frame = av.VideoFrame.from_ndarray(values, format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        if num_frames:
            container.mux(stream.encode())
        if audio:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            silence.rate = 8000
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path

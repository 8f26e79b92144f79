"""Videos: frames against a plain loop over little files made here, and files that cannot be used."""

from __future__ import annotations

import contextlib
import struct

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image
from tests.media.clips import HEIGHT, WIDTH, write
from tests.media.images import bomb
from tests.tiny import video_image_processor

from vzip.data.verify import NamedImage, check_image
from vzip.errors import ConfigError, ImageError, MissingPackageError, VideoError
from vzip.media import video
from vzip.media.images import load_image
from vzip.media.video import is_image, load_video, prepare_videos, sample_indices


def greys(frames):
    """The value of the right half of each frame, which tells its number."""
    return [round(np.asarray(frame)[:, WIDTH // 2 + 8 :].mean() / 12) for frame in frames]


@pytest.mark.parametrize(("available", "asked"), [(20, 8), (100, 8), (8, 8), (3, 8), (1, 4), (9, 1), (300, 80)])
def test_indices_are_the_published_rule(available, asked):
    expected = np.linspace(0, available - 1, asked, dtype=int).tolist()
    by_hand = [i * (available - 1) // max(asked - 1, 1) for i in range(asked)]
    assert sample_indices(available, asked) == expected == by_hand
    assert max(expected) == (available - 1 if asked > 1 else 0)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mov", "mpeg4")],
)
def test_the_right_frames_of_every_container(tmp_path, name, codec):
    path = write(tmp_path / name, codec=codec)
    frames = load_video(path)
    assert [(frame.mode, frame.size) for frame in frames] == [("RGB", (WIDTH, HEIGHT))] * 8
    assert greys(frames) == [0, 2, 5, 8, 10, 13, 16, 19]
    with av.open(str(path)) as container:
        every = [frame.to_image() for frame in container.decode(video=0)]
    for number, frame in zip(sample_indices(20, 5), load_video(str(path), 5), strict=True):
        assert frame == every[number]


def test_short_single_and_long_use(tmp_path):
    three = write(tmp_path / "three.mp4", 3)
    assert greys(load_video(three)) == sample_indices(3, 8) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert greys(load_video(three, 1)) == [0]
    single = write(tmp_path / "single.mp4", 1)  # plays for no time
    assert greys(load_video(single, 4)) == [0] * 4
    assert len(load_video(write(tmp_path / "long.mp4", 20), 80)) == 80


def test_a_variable_rate_counts_frames_not_seconds(tmp_path):
    path = write(tmp_path / "vfr.mp4", times=[number**2 for number in range(20)])
    assert greys(load_video(path)) == [0, 2, 5, 8, 10, 13, 16, 19]


def test_sound_beside_the_images_does_not_matter(tmp_path):
    assert greys(load_video(write(tmp_path / "both.mkv", audio=True), 3)) == [0, 9, 19]


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path):
    """Cut without coding anew, as phones and editors do: the file still holds what comes before the cut."""
    whole, cut = write(tmp_path / "whole.mp4"), tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        start = int(0.9 / source.streams.video[0].time_base)
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, stream
                target.mux(packet)
    with av.open(str(cut)) as container:
        shown = [frame.to_image() for frame in container.decode(video=0)]
        assert len(shown) < container.streams.video[0].frames == 20
    assert load_video(cut, len(shown)) == shown


def test_a_file_from_a_phone_is_turned_upright(tmp_path):
    path = write(tmp_path / "phone.mp4")
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # clockwise
    path.write_bytes(data)
    frame = load_video(path, 2)[1]
    assert frame.size == (HEIGHT, WIDTH)
    values = np.asarray(frame)
    assert values[: WIDTH // 2 - 8].mean() < 10 < values[WIDTH // 2 + 8 :].mean()  # the black half is above


def cover(path):
    """Sound with a cover image, which formats keep as a video stream."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        stream.disposition = Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(picture))
        container.mux(stream.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.rate = 8000
        container.mux(sound.encode(silence))
    return path


def part(path, share, out):
    data = path.read_bytes()
    out.write_bytes(data[: int(len(data) * share)])
    return out


def test_unusable_files_are_named_and_say_why(tmp_path):
    (tmp_path / "text.mp4").write_text("no video at all" * 40)
    (tmp_path / "empty.mp4").touch()
    first = write(tmp_path / "first.mp4", 200, options={"movflags": "faststart"})
    damaged = write(tmp_path / "damaged.avi", codec="mpeg4")
    data = bytearray(damaged.read_bytes())
    data[6000:-600] = bytes(len(data) - 6600)
    damaged.write_bytes(data)
    noise = write(tmp_path / "noise.mp4")
    data = bytearray(noise.read_bytes())
    end = data.index(b"moov") - 8  # the frames come first, the index after them
    data[200:end] = bytes(b ^ 0x5A for b in data[200:end])
    noise.write_bytes(data)
    wide = tmp_path / "wide.mkv"
    with av.open(str(wide), "w") as container:
        stream = container.add_stream("ffv1", rate=1)
        stream.width, stream.height, stream.pix_fmt = 2020, 16, "yuv444p"
        container.mux(stream.encode(av.VideoFrame(2020, 16, "yuv444p")))
        container.mux(stream.encode())
    cases = [
        (tmp_path / "absent.mp4", "no such video file"),
        (tmp_path, "is a directory"),
        ("https://example.org/a.mp4", "download it first"),
        (tmp_path / "empty.mp4", r"empty \(0 bytes\)"),
        (tmp_path / "text.mp4", "not a video, cut off or damaged"),
        (write(tmp_path / "sound.mkv", 0, audio=True), r"no video stream \(its streams: audio\)"),
        (cover(tmp_path / "song.mp4"), "no video stream"),
        (part(write(tmp_path / "a.mp4"), 0.5, tmp_path / "no_index.mp4"), "not a video, cut off or damaged"),
        (part(first, 0.8, tmp_path / "part.mp4"), r"cut off or damaged: its header lists 200 frames, it holds \d+"),
        (part(write(tmp_path / "b.mkv"), 0.75, tmp_path / "part.mkv"), r"cut off: its header says 2.0 seconds"),
        (damaged, "cut off or damaged: its header lists 20 frames"),
        (noise, "cut off or damaged"),
        (wide, "2020 x 16 pixels is more oblong than 100:1"),
    ]
    for path, message in cases:
        with pytest.raises(VideoError, match=message) as raised:
            load_video(path)
        assert str(path) in str(raised.value)


def test_a_stream_without_frames(tmp_path):
    path = tmp_path / "none.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.start_encoding()
    with pytest.raises(VideoError, match=r"none\.avi.*(holds no frames|no video|not a video)"):
        load_video(path)


@pytest.mark.parametrize("number", [0, -1, 2.5, True, "8", None])
def test_the_number_of_frames_is_checked(number):
    with pytest.raises(ConfigError, match="num_frames="):
        load_video("a.mp4", number)


def test_frames_may_be_given_as_images():
    pictures = [Image.new("L", (20, 10), value) for value in (0, 100, 200)]
    assert [frame.getpixel((0, 0))[0] for frame in load_video(pictures, 4)] == [0, 0, 100, 200]
    with pytest.raises(VideoError, match="empty list"):
        load_video([])
    with pytest.raises(ImageError):
        load_video([Image.new("RGB", (0, 5))])


def test_without_pyav_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingPackageError, match=r"package av.*\[video\]"):
        load_video(tmp_path / "a.mp4")


def test_pixels_are_the_image_processors(tmp_path):
    paths = [write(tmp_path / "a.mp4"), write(tmp_path / "b.webm", 5, codec="libvpx-vp9")]
    processor = video_image_processor()
    together = prepare_videos(paths, processor, 3)
    assert together.shape == (2, 3, 3, 112, 112) and together.dtype == torch.float32
    for row, path in zip(together, paths, strict=True):
        for values, frame in zip(row, load_video(path, 3), strict=True):
            # short side to 112, centre cut out, as the processor does for an image of its own
            scaled = frame.resize((round(112 * WIDTH / HEIGHT), 112), Image.Resampling.BICUBIC)
            left = (scaled.width - 112) // 2
            cut = np.asarray(scaled.crop((left, 0, left + 112, 112)), np.float64) / 255
            expected = (cut - processor.image_mean) / processor.image_std
            torch.testing.assert_close(values.double(), torch.from_numpy(expected).permute(2, 0, 1), atol=0.03, rtol=0)


def test_what_is_an_image_and_what_a_video(tmp_path):
    Image.new("RGB", (5, 5)).save(tmp_path / "a.png")
    assert video.is_image(tmp_path / "a.png")
    assert not video.is_image(write(tmp_path / "a.mp4", 2))
    assert not video.is_image(tmp_path / "absent.png")


@pytest.mark.parametrize("size", [(3, 3), (40, 3), (40, 1), (1, 40)], ids=str)
def test_no_side_of_a_frame_is_taken_for_the_colours(size):
    image_processor = video_image_processor()
    values = prepare_videos([[Image.new("RGB", size, (250, 10, 120))]], image_processor, 2)
    mean, deviation = (np.asarray(part) for part in (image_processor.image_mean, image_processor.image_std))
    expected = (np.asarray([250, 10, 120]) / 255 - mean) / deviation
    np.testing.assert_allclose(values.mean(dim=(0, 1, 3, 4)), expected, atol=0.02)


def test_an_array_is_no_video():
    with pytest.raises(VideoError, match="given as ndarray: it is a path or a list of PIL images"):
        load_video(np.zeros((4, 3, 9, 3), np.uint8))


LATIN = "T\xe9l\xe9vision".encode("latin-1")


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.mkv", "mpeg4"), ("a.mov", "mpeg4")]
)
@pytest.mark.parametrize("where", ["file", "stream"])
def test_a_title_of_another_encoding_does_not_matter(tmp_path, name, codec, where):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        (container if where == "file" else stream).metadata["title"] = "Txlxvision"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame(WIDTH, HEIGHT, "yuv420p")))
        container.mux(stream.encode())
    data = path.read_bytes()
    if b"Txlxvision" not in data and where == "file":
        raise AssertionError("the title was not written")
    path.write_bytes(data.replace(b"Txlxvision", LATIN))
    assert len(load_video(path, 3)) == 3
    assert check_image(NamedImage(name, path, "1", ".", is_video=True)) is None


@pytest.mark.parametrize("ending", ["mp4", "avi", "mkv", "webm"])
def test_whatever_the_decoder_raises_for_damage_is_a_video_error(tmp_path, ending):
    """Bytes changed at random all over the file, its header and its names included."""
    whole = write(tmp_path / f"whole.{ending}", 6, codec="libvpx-vp9" if ending == "webm" else "mpeg4").read_bytes()
    rng = np.random.RandomState(0)
    for number in range(25):
        data = bytearray(whole)
        for place in rng.randint(0, len(data), 1 + number * 2):
            data[place] = rng.randint(256)
        (tmp_path / f"damaged.{ending}").write_bytes(data)
        with contextlib.suppress(VideoError):
            load_video(tmp_path / f"damaged.{ending}", 2)


@pytest.mark.parametrize(
    "error", [UnicodeDecodeError("utf-8", b"", 0, 1, "x"), ValueError(), MemoryError(), OverflowError(), KeyError("x")]
)
def test_an_error_of_another_kind_is_a_video_error_too(tmp_path, monkeypatch, error):
    def raises(*_, **__):
        raise error

    path = write(tmp_path / "a.mp4")
    monkeypatch.setattr(av, "open", raises)
    with pytest.raises(VideoError, match=r"a\.mp4: not a video, cut off or damaged"):
        load_video(path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.mp4", "~nobody-of-this-name/a.mp4", "\udcff.mp4"])
def test_a_path_that_cannot_be(name):
    for load, kind in ((load_video, VideoError), (load_image, ImageError)):
        with pytest.raises(kind, match=r"no such (image|video) file") as raised:
            load(name)
        assert len(str(raised.value)) < 400


def test_frames_larger_than_an_image_may_be(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")
    monkeypatch.setattr(video, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(VideoError, match=r"frames of 64 x 48 pixels"):
        load_video(path)


def test_a_small_file_of_many_pixels_is_an_image_that_is_refused(tmp_path):
    path = bomb(tmp_path / "bomb.png")
    assert path.stat().st_size < 10_000 and is_image(path)
    with pytest.raises(ImageError, match=r"bomb\.png: too many pixels"):
        load_image(path)

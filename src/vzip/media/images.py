"""Reading image files and turning images into the vision tower's pixels.

Two rules, chosen explicitly: ``llava`` pads an image to a square with the processor's mean colour and then lets the
checkpoint's image processor resize and normalise it, as the paper's evaluation scripts do; ``hf`` leaves everything to
the checkpoint's image processor (CLIP's cuts the centre out of an oblong image).
"""

from __future__ import annotations

import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import PIL
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vzip.errors import ConfigError, ImageError
from vzip.installed import missing_package
from vzip.paths import expanded, is_file, is_folder, shown

if TYPE_CHECKING:  # the commands that only read images need not wait for torch
    from torch import Tensor

Preprocess = Literal["llava", "hf"]
PREPROCESSES: tuple[str, ...] = get_args(Preprocess)

# Above this side the padded square is never made (4096 squared, three channels: 48 MiB) but resized strip by strip.
MAX_PADDED_SIDE = 4096
# CLIP's processor enlarges the short side to 336 first: at 100:1 that is already 336 x 33600 pixels.
MAX_HF_ASPECT_RATIO = 100
_STRIP_ROWS = 256
# Pillow's own limit, which other packages (lmms-eval's tasks) lift for the whole process.
MAX_PIXELS = 178_956_970
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")

# What Pillow raises for files that are cut off, damaged or no images at all (each seen from some decoder).
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """Reads an image as upright 8-bit RGB.

    The rules: an animated image gives its first frame; the EXIF orientation is applied; 16-bit grey is scaled to 8
    bits (not cut off at 255); CMYK, palette, grey and two-level images are converted; an alpha channel is dropped and
    the colour stored under it shown, as the paper's scripts do.

    Args:
        source: a file, or an image already open.

    Returns:
        a new RGB image, fully decoded.

    Raises:
        ImageError: neither a path nor a PIL image; no such file, empty, not an image, cut off, damaged, or more pixels
            than Pillow's safety limit.
        MissingPackageError: an image of a phone (HEIC), and pillow-heif is not installed.
    """
    if not isinstance(source, Image.Image | str | Path):
        raise ImageError(
            f"An image was given as {type(source).__name__}: images are PIL images or paths of files, since of an array"
            " nobody can tell which axis is the colours'. Make one with PIL.Image.fromarray."
        )
    if isinstance(source, Image.Image):
        with _named_errors("the image given"):
            return _to_rgb(source)
    if str(source).startswith(("http://", "https://")):
        raise ImageError(f"{source}: images are read from files; download it first and give the path.")
    path = expanded(source)
    if not is_file(path):
        kind = "is a directory, not a file" if is_folder(path) else "no such image file"
        raise ImageError(f"{shown(path)}: {kind}.")
    with _named_errors(str(path)), warnings.catch_warnings():
        if path.stat().st_size == 0:
            raise ImageError(f"{path}: the file is empty (0 bytes).")
        if is_heic(path):
            _register_heic(path)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large is allowed; twice that is an error
        with Image.open(path) as image:
            return _to_rgb(image)


def is_heic(path: Path) -> bool:
    """Whether a file is an image in the format of phones (HEIC, HEIF), by its content."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS


def _register_heic(path: Path) -> None:
    """Teaches Pillow the format.

    Raises:
        MissingPackageError: pillow-heif is not installed.
    """
    try:
        import pillow_heif
    except ImportError as error:
        raise missing_package(
            f"{path}: a HEIC image", "pillow_heif", error, extra="heic", otherwise="save it as JPEG or PNG"
        ) from error
    pillow_heif.register_heif_opener()


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decodes the first frame, turns it upright and converts it to 8-bit RGB."""
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height}")
    if getattr(image, "is_animated", False):  # only multi-frame formats of Pillow define it
        image.seek(0)
    with strict_decoding():
        image.load()
    if 0 in image.size:
        raise ImageError(f"An image of {image.width} x {image.height} has no pixels.")
    return _eight_bit(ImageOps.exif_transpose(image)).convert("RGB")


class _Strict:
    """How many blocks of all threads want strict decoding, and what Pillow had been told before the first of them."""

    lock = threading.Lock()
    num_blocks = 0
    lenient = False


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Lets a truncated file be an error even where another package (lmms-eval does) told Pillow to fill it up.

    Pillow's switch is one for all threads: the first block in turns it off and the last one out turns it back.
    """
    with _Strict.lock:
        if _Strict.num_blocks == 0:
            _Strict.lenient = ImageFile.LOAD_TRUNCATED_IMAGES
        _Strict.num_blocks += 1
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        with _Strict.lock:
            _Strict.num_blocks -= 1
            if _Strict.num_blocks == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _Strict.lenient


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises for an unusable image into an ImageError that names it."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image in a format Pillow {PIL.__version__} reads.") from error
    except PermissionError as error:
        raise ImageError(f"{name}: may not be read ({error.strerror}).") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: too many pixels ({error}): up to {MAX_PIXELS:,} are read, so that a small file cannot fill the"
            " memory. Make it smaller first."
        ) from error
    except DECODER_ERRORS as error:
        raise ImageError(f"{name}: cut off or damaged ({str(error) or type(error).__name__}).") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales grey images of more than 8 bits to mode L; Pillow's own conversion cuts values off at 255."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image.convert("I"), dtype=np.int64).clip(0, 65535)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":  # no range is defined for floats: the image's own becomes 0..255
        floats = np.nan_to_num(np.asarray(image, dtype=np.float64))
        spread = floats.max() - floats.min()
        return Image.fromarray(np.round((floats - floats.min()) * (255 / (spread or 1.0))).astype(np.uint8))
    if image.mode == "La":  # Pillow has no way from it to RGB but this one
        return image.convert("LA")
    if image.mode in ("P", "PA") or "transparency" in image.info:
        return image.convert("RGBA")
    return image


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centres an RGB image on a square of its longer side (LLaVA's ``expand2square``)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def pad_and_shrink(image: Image.Image, colour: tuple[int, int, int], side: int, resample: int) -> Image.Image:
    """``pad_to_square(image, colour).resize((side, side), resample)``, without ever making the square.

    Pillow resizes rows first and then columns, rounding to 8 bits in between, so rows can be shrunk in strips: the
    result is the same to the last bit, and a 20000 x 3 image costs megabytes instead of 1.2 GB.
    """
    width, height = image.size
    longer = max(width, height)
    left, top = (longer - width) // 2, (longer - height) // 2
    narrow = Image.new("RGB", (side, longer), colour)
    for start in range(0, height, _STRIP_ROWS):
        rows = min(_STRIP_ROWS, height - start)
        strip = Image.new("RGB", (longer, rows), colour)
        strip.paste(image.crop((0, start, width, start + rows)), (left, 0))
        narrow.paste(strip.resize((side, rows), Image.Resampling(resample)), (0, top + start))
    return narrow.resize((side, side), Image.Resampling(resample))


def prepare_images(images: Sequence[Image.Image], image_processor: Any, preprocess: Preprocess) -> dict[str, Tensor]:
    """Images -> ``pixel_values`` ``[images, 3, h, w]`` float32, and whatever else the processor returns.

    Args:
        images: images of any mode and size.
        image_processor: the checkpoint's Hugging Face image processor.
        preprocess: ``"llava"`` or ``"hf"``.

    Raises:
        ConfigError: another ``preprocess``; settings of the image processor that contradict each other.
        ImageError: an image that cannot be decoded; with ``"hf"``, one more oblong than 100:1.
    """
    images = [load_image(image) for image in images]
    if preprocess == "llava":
        colour = padding_colour(image_processor)
        images = [_square(image, colour, image_processor) for image in images]
    elif preprocess == "hf":
        for image in images:
            _refuse_oblong(image)
    else:
        raise ConfigError(f"model.preprocess={preprocess!r}: must be one of {', '.join(PREPROCESSES)}.")
    return call_processor(image_processor, images)


def call_processor(image_processor: Any, images: Sequence[Image.Image | Sequence[Image.Image]]) -> dict[str, Tensor]:
    """What a Hugging Face image processor makes of RGB images, or of prompts' lists of them.

    It is told which axis is the colours': some processors take a side of 1 or 3 pixels for it. Not torchvision's, which
    puts that axis first by itself and then, before transformers 5.23, would move it once more.

    Raises:
        ConfigError: see ``check_processor``.
    """
    check_processor(image_processor)
    by_itself = getattr(image_processor, "backend", None) == "torchvision"
    layout = {} if by_itself else {"input_data_format": "channels_last"}
    return dict(image_processor(images=list(images), return_tensors="pt", **layout))


def check_processor(image_processor: Any) -> None:
    """Raises ConfigError for settings of an image processor that contradict each other, all at once."""
    needs = {"do_rescale": ("rescale_factor",), "do_normalize": ("image_mean", "image_std"), "do_resize": ("resample",)}
    lacking = [
        f"{step}=true needs {name}, which is null"
        for step, names in needs.items()
        for name in names
        if getattr(image_processor, step, None) and getattr(image_processor, name, None) is None
    ]
    if lacking:
        raise ConfigError(
            f"The checkpoint's {type(image_processor).__name__}: {'; '.join(lacking)}. Give it a value in"
            " preprocessor_config.json, or set the first to false."
        )


def padding_colour(image_processor: Any) -> tuple[int, int, int]:
    """The image processor's mean colour, which becomes zeros; black where it has none and so subtracts none."""
    mean = 0.0 if image_processor.image_mean is None else image_processor.image_mean
    red, green, blue = [mean] * 3 if isinstance(mean, int | float) else mean
    return int(red * 255), int(green * 255), int(blue * 255)


def _square(image: Image.Image, colour: tuple[int, int, int], image_processor: Any) -> Image.Image:
    if max(image.size) <= MAX_PADDED_SIDE:
        return pad_to_square(image, colour)
    size = image_processor.size
    side = size["shortest_edge"] if size.get("shortest_edge") else size["height"]
    return pad_and_shrink(image, colour, side, int(image_processor.resample))


def _refuse_oblong(image: Image.Image) -> None:
    longer, shorter = max(image.size), min(image.size)
    if longer > MAX_HF_ASPECT_RATIO * shorter:
        raise ImageError(
            f"An image of {image.width} x {image.height} pixels is more oblong than {MAX_HF_ASPECT_RATIO}:1;"
            " model.preprocess=hf would enlarge its short side and cut the rest off. Use model.preprocess=llava, which"
            " takes any shape, or crop the image."
        )

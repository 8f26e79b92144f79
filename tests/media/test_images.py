"""Image files of every kind, and preprocessing against LLaVA's own."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from safetensors import safe_open
from tests import tiny
from tests.media.images import bomb, picture
from transformers.models.clip import CLIPImageProcessor

import vzip.media.images as images_module
from vzip.errors import ConfigError, ImageError
from vzip.media.images import load_image, pad_and_shrink, pad_to_square, prepare_images, strict_decoding
from vzip.models.families.llava_next.anyres import prepare_crops

SIZE = {"height": 336, "width": 336}
PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=SIZE)
BICUBIC = int(Image.Resampling.BICUBIC)
MEAN_COLOUR = (122, 116, 104)


@pytest.mark.parametrize("number", range(5))
def test_llava_preprocessing_equals_llavas_own(golden, names_pillow, number):
    with safe_open(golden / "image_preprocessing.safetensors", "pt") as numbers:
        width, height = json.loads(numbers.metadata()["sizes_wh"])[number]
        expected, mean = numbers.get_tensor(f"pad_{number}"), numbers.get_tensor(f"pad_mean_{number}")
    ours = prepare_images([picture(width, height)], PROCESSOR, "llava")["pixel_values"]
    assert ours.shape == (1, 3, 336, 336) and ours.dtype == torch.float32
    torch.testing.assert_close(ours[0, :, ::6, ::6], expected, rtol=0, atol=2e-6, msg=names_pillow)
    torch.testing.assert_close(ours[0].double().mean(dim=(1, 2)), mean.double(), rtol=0, atol=1e-5)


def test_the_two_rules_differ_and_hf_is_the_processor_itself():
    wide = picture(640, 480)
    stock = PROCESSOR(images=[wide], return_tensors="pt")["pixel_values"]
    assert torch.equal(prepare_images([wide], PROCESSOR, "hf")["pixel_values"], stock)
    assert (prepare_images([wide], PROCESSOR, "llava")["pixel_values"] - stock).abs().max() > 0.5
    with pytest.raises(ConfigError, match=r"model\.preprocess"):
        prepare_images([wide], PROCESSOR, "pad")


@pytest.mark.parametrize("size", [(700, 30), (30, 700), (601, 600), (600, 601), (1, 500), (500, 1), (999, 333)])
def test_shrinking_in_strips_is_bit_equal(size):
    whole = pad_to_square(picture(*size), MEAN_COLOUR).resize((336, 336), Image.Resampling.BICUBIC)
    strips = pad_and_shrink(picture(*size), MEAN_COLOUR, 336, BICUBIC)
    assert np.array_equal(np.asarray(whole), np.asarray(strips))


def test_prepare_uses_strips_only_for_large_images_with_the_same_result(monkeypatch):
    normal = prepare_images([picture(700, 30)], PROCESSOR, "llava")["pixel_values"]
    monkeypatch.setattr(images_module, "MAX_PADDED_SIDE", 100)
    monkeypatch.setattr(images_module, "pad_to_square", None)  # calling it would fail
    assert torch.equal(prepare_images([picture(700, 30)], PROCESSOR, "llava")["pixel_values"], normal)


@pytest.mark.parametrize("size", [(20000, 3), (3, 20000), (1, 1)])
def test_extreme_shapes_work_by_llavas_rule(size):
    pixels = prepare_images([picture(*size)], PROCESSOR, "llava")["pixel_values"]
    assert pixels.shape == (1, 3, 336, 336) and torch.isfinite(pixels).all()
    if max(size) > 1:  # nearly all of it is padding: the mean colour, which normalises to about zero
        assert pixels[0, :, 0, 0].abs().max() < 0.02
        assert (pixels.abs().amax(dim=1) > 0.02).float().mean() < 0.02


def test_extreme_shapes_are_refused_by_hfs_rule():
    with pytest.raises(ImageError, match=r"20000 x 3 .*100:1.*preprocess=llava"):
        prepare_images([picture(20000, 3)], PROCESSOR, "hf")
    assert prepare_images([picture(1, 1)], PROCESSOR, "hf")["pixel_values"].shape == (1, 3, 336, 336)


def test_readable_kinds(tmp_path):
    base = picture(40, 20)
    grey16 = Image.fromarray((np.arange(800, dtype=np.uint32).reshape(20, 40) * 82).astype(np.uint16))
    frames = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    base.convert("CMYK").save(tmp_path / "cmyk.jpg")
    grey16.save(tmp_path / "grey16.png")
    grey16.save(tmp_path / "grey16.tiff")
    base.convert("P").save(tmp_path / "palette.png")
    base.convert("1").save(tmp_path / "bits.png")
    base.convert("L").save(tmp_path / "grey.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "alpha.png")
    Image.new("LA", (8, 8), (128, 10)).save(tmp_path / "grey_alpha.png")
    Image.fromarray(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tiff")
    for path in sorted(tmp_path.iterdir()):
        loaded = load_image(path)
        assert loaded.mode == "RGB" and loaded.size == Image.open(path).size, path.name
    for name in ("animated.gif", "animated.webp"):
        assert load_image(tmp_path / name).getpixel((0, 0)) == (255, 0, 0), name  # the first frame
    for name in ("grey16.png", "grey16.tiff"):
        values = np.asarray(load_image(tmp_path / name))[..., 0].astype(int)
        expected = np.arange(800).reshape(20, 40) * 82 / 257
        assert np.abs(values - expected).max() <= 0.51, name  # scaled, not cut off at 255
    assert load_image(tmp_path / "alpha.png").getpixel((0, 0)) == (255, 0, 0)  # alpha dropped
    assert load_image(tmp_path / "float.tiff").getextrema()[0] == (0, 255)
    assert load_image(str(tmp_path / "grey.png")).getpixel((3, 3)) == (base.convert("L").getpixel((3, 3)),) * 3


def test_a_gif_already_moved_on_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as animation:
        animation.seek(1)
        assert load_image(animation).getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_applied(tmp_path):
    upright = Image.new("RGB", (40, 20), "white")
    upright.paste((255, 0, 0), (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    upright.save(tmp_path / "turned.png", exif=exif)
    loaded = load_image(tmp_path / "turned.png")
    assert loaded.size == (20, 40)
    assert loaded.getpixel((10, 2)) == (255, 0, 0) and loaded.getpixel((10, 35)) == (255, 255, 255)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("fraction", [0.02, 0.5])
def test_truncated_files_are_named(tmp_path, kind, fraction):
    path = tmp_path / f"cut.{kind.lower()}"
    data = encoded(kind)
    path.write_bytes(data[: max(12, int(len(data) * fraction))])
    with pytest.raises(ImageError, match=f"cut.{kind.lower()}"):
        load_image(path)


def test_unusable_files_are_named(tmp_path, monkeypatch):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    damaged = bytearray(encoded("PNG"))
    damaged[60:90] = b"\0" * 30
    (tmp_path / "damaged.png").write_bytes(bytes(damaged))
    for name, message in [
        ("empty.png", "empty"),
        ("text.jpg", "not an image"),
        ("damaged.png", "cut off or damaged"),
        ("absent.png", "no such image file"),
        (".", "is a directory"),
    ]:
        with pytest.raises(ImageError, match=message) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ImageError, match="download it first"):
        load_image("https://example.org/cat.png")
    with pytest.raises(ImageError, match="no pixels"):
        load_image(Image.new("RGB", (0, 5)))
    picture(50, 50).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"large.png: .*pixels"):
        load_image(tmp_path / "large.png")


@pytest.mark.parametrize("lenient", [False, True])
def test_pillows_switch_is_turned_back_however_blocks_of_several_threads_overlap(lenient, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    first, second = strict_decoding(), strict_decoding()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False  # the second still reads
    second.__exit__(None, None, None)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


@pytest.mark.parametrize("mean", [None, 0.5, [0.5, 0.25, 0.125]])
def test_the_padding_is_what_the_mean_says_and_black_without_one(mean):
    """Rescaled alone; the image is 2 x 1, so that half of its square is padding."""
    image_processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, resample=0)
    image_processor.image_mean, image_processor.do_normalize = mean, False
    padded = prepare_images([Image.new("RGB", (4, 2), "white")], image_processor, "llava")["pixel_values"][0]
    expected = {None: (0, 0, 0)}.get(mean, (127, 127, 127)) if not isinstance(mean, list) else (127, 63, 31)
    assert (padded[:, -1, 0] * 255).round().tolist() == list(expected)
    assert (padded[:, 4, 0] * 255).round().tolist() == [255, 255, 255]


def test_an_image_processor_without_what_its_steps_need_is_refused():
    image_processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    image_processor.image_mean = image_processor.resample = None
    for rule in ("llava", "hf"):
        with pytest.raises(ConfigError, match=r"do_normalize=true needs image_mean, which is null; do_resize=true"):
            prepare_images([picture(9, 9)], image_processor, rule)


@pytest.mark.parametrize(
    ("rule", "size"),  # padded to a square, others show not their colour alone
    [("llava", (1, 1)), ("llava", (3, 3)), *(("hf", size) for size in [(1, 1), (3, 3), (40, 3), (3, 40), (40, 1)])],
    ids=str,
)
@pytest.mark.parametrize("kind", ["image", "next", "video_llava"])
def test_no_side_is_taken_for_the_colours(kind, rule, size):
    image_processor = {
        "image": tiny.processor().image_processor,
        "next": tiny.next_processor().image_processor,
        "video_llava": tiny.video_image_processor(),
    }[kind]
    given = Image.new("RGB", size, (250, 10, 120))
    if kind == "next":
        prepared = prepare_crops([given], image_processor, rule, tiny.PINPOINTS, tiny.IMAGE_SIZE)
    else:
        prepared = prepare_images([given], image_processor, rule)
    (values,) = prepared.values() if kind != "next" else [prepared["pixel_values"][:, :1]]
    shown = values.reshape(3, -1)[:, values.shape[-1] * (values.shape[-2] // 2) + values.shape[-1] // 2]
    mean, deviation = (np.asarray(part) for part in (image_processor.image_mean, image_processor.image_std))
    np.testing.assert_allclose(shown, (np.asarray([250, 10, 120]) / 255 - mean) / deviation, atol=0.02)


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_torchvisions_processors_are_not_told_of_an_axis_that_they_have_moved(backend):
    """Before transformers 5.23 its colours would otherwise be taken for a side (torchvision is not installed here)."""

    class Processor:
        do_rescale = do_normalize = do_resize = False

        def __call__(self, images, return_tensors, **layout):
            return {"layout": layout, "images": images}

    Processor.backend = backend
    told = images_module.call_processor(Processor(), [Image.new("RGB", (5, 4))])["layout"]
    assert told == ({"input_data_format": "channels_last"} if backend == "pil" else {})


@pytest.mark.parametrize("source", [np.zeros((3, 9, 3), np.uint8), torch.zeros(3, 3, 3), b"photo.png", None, 5])
def test_what_is_no_image_is_named_and_never_read_as_one(source):
    with pytest.raises(ImageError, match=rf"given as {type(source).__name__}: images are PIL images or paths"):
        load_image(source)


MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "La"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_of_the_same_size(mode):
    for size in ((1, 3), (3, 1), (3, 3)):
        loaded = load_image(Image.new(mode, size))
        assert (loaded.mode, loaded.size) == ("RGB", size)


def test_too_many_pixels_are_refused_whoever_lifted_pillows_limit(tmp_path, monkeypatch):
    """lmms-eval's tasks lift it for the whole process; an image may also come open already."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = bomb(tmp_path / "bomb.png")
    for source in (path, Image.open(path)):
        with pytest.raises(ImageError, match=r"too many pixels \(30000 x 30000\)"):
            load_image(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_whatever_pillow_raises_for_damage_is_an_image_error(tmp_path, kind):
    whole, rng = encoded(kind), np.random.RandomState(0)
    for number in range(60):
        data = bytearray(whole)
        for place in rng.randint(0, 200 if number % 2 else len(data), 1 + number // 4):
            data[place] = rng.randint(256)
        (tmp_path / "damaged").write_bytes(data)
        with contextlib.suppress(ImageError):
            load_image(tmp_path / "damaged")

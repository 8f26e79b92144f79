"""Features kept on disk: the tower runs once an image, files are known again, and the training stays what it was."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny, tiny_internvl, tiny_mini_gemini, tiny_qwen
from tests.train.commands import composed
from tests.train.commands import run as run_command
from tests.train.kit import Samples, dying_at, load_model
from tests.train.runs import curve, finish, kill_after, metrics

import vzip
from vzip.config.training import checked, tuning_plan
from vzip.data.collate import TrainingSample
from vzip.errors import ConfigError
from vzip.methods import find_method, method_names
from vzip.models.towers import tap
from vzip.models.weights.from_config import new_image_processor
from vzip.train import features
from vzip.train.distributed import build_accelerator
from vzip.train.features import FeatureCache, check_room, frozen_digest, how_it_runs, open_caches, visual_tokens
from vzip.train.loop import train

CPU = torch.device("cpu")
RUN = how_it_runs("float32", False, CPU, autocast=False)


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of crops of each run of a vision tower."""
    seen: list[int] = []
    real = tap.run_tower

    def spying(tower: Any, pixel_values: Any, *rest: Any) -> Any:
        seen.append(len(pixel_values))
        return real(tower, pixel_values, *rest)

    monkeypatch.setattr("vzip.models.families.llava_base.run_tower", spying)
    return seen


@pytest.fixture(autouse=True)
def accelerate(fresh_accelerate: None) -> Iterator[None]:
    yield


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.rglob("*.safetensors")}


def weights(run_dir: Path) -> bytes:
    return (run_dir / "final" / "tuned.safetensors").read_bytes()


def test_the_second_epoch_and_the_second_run_run_no_tower(plan: Any, tmp_path: Path, towers: list[int]) -> None:
    root = tmp_path / "features"
    first = plan("first", features_dir=root)
    train(first)
    num_images = int(Samples().has_images.sum())
    assert towers == [1] * num_images, "each image by itself, once in two epochs"
    assert len(files(root)) == num_images
    towers.clear()
    train(plan("second", features_dir=root, num_workers=2))
    assert towers == []
    assert curve(tmp_path / "second") == curve(first.run_dir) and weights(tmp_path / "second") == weights(first.run_dir)
    train(plan("other rate", features_dir=root, learning_rate=1e-3, num_epochs=3))
    assert towers == [], "what a sweep changes of the training is nothing to the features"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_is_the_training_without(plan: Any, tmp_path: Path, batch_size: int) -> None:
    """Bit for bit where a process handles a sample at once, as the tower is then run alike; else to rounding."""
    plain, cached = plan("plain", batch_size=batch_size), plan("cached", batch_size=batch_size, features_dir=tmp_path)
    train(plain)
    train(cached)
    if batch_size == 1:
        assert curve(cached.run_dir) == curve(plain.run_dir) and weights(cached.run_dir) == weights(plain.run_dir)
    for one, other in zip(curve(plain.run_dir), curve(cached.run_dir), strict=True):
        assert one[4:] == other[4:] and one[:4] == pytest.approx(other[:4], rel=1e-5)


def test_several_budgets_have_features_of_their_own(plan: Any, tmp_path: Path, towers: list[int]) -> None:
    several = tuple(vzip.VisionZip(vzip.TokenBudget(num - 1, 1)) for num in (3, 9))
    changes: dict[str, Any] = {"budgets": ("3tok", "9tok"), "compressors": several, "batch_size": 1, "num_steps": 6}
    plain, cached = plan("plain", **changes), plan("cached", **changes, features_dir=tmp_path / "features")
    train(plain)
    towers.clear()
    train(cached)
    assert curve(cached.run_dir) == curve(plain.run_dir)
    folders = sorted(len(files(folder)) for folder in (tmp_path / "features").iterdir())
    assert len(folders) == 2 and len(towers) == sum(folders)


class OfFiles(Samples):
    """Three samples a file one after the other, text between them; the file of three of them is none."""

    def __init__(self, folder: Path) -> None:
        super().__init__(30)
        self.folder = folder
        groups = np.arange(self.count) // 3
        self.image_groups = np.where(self.has_images, groups, self.count + np.arange(self.count))
        for group in set(groups):
            noise = np.random.RandomState(group).randint(0, 255, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{group}.png")
        (folder / "4.png").write_text("no image")

    def __getitem__(self, index: int) -> TrainingSample:
        sample = super().__getitem__(index)
        images = [self.folder / f"{index // 3}.png"] if sample.images else []
        return dataclasses.replace(sample, images=images)


def test_shared_images_several_budgets_and_validation(plan: Any, tmp_path: Path, towers: list[int]) -> None:
    """All at once, with a file that is none and a run that is killed: as without features."""
    data = OfFiles(tmp_path)
    several = tuple(vzip.VisionZip(vzip.TokenBudget(num - 1, 1)) for num in (3, 9))
    changes: dict[str, Any] = {
        "load_data": lambda: data,
        "share_images": True,
        "budgets": ("3tok", "9tok"),
        "compressors": several,
        "num_validation_samples": 6,
        "skip_unreadable": True,
        "num_steps": 6,
        "save_every": 2,
    }
    plain, cached = plan("plain", **changes), plan("cached", **changes, features_dir=tmp_path / "features")
    train(plain)
    towers.clear()
    with dying_at(3):
        train(cached)
    train(cached)
    made = list((tmp_path / "features").rglob("*.safetensors"))
    assert set(towers) == {1} and len(towers) == len(made) <= 2 * 9, "once a file and budget"
    assert sum(row["num_skipped"] for row in metrics(cached.run_dir)) > 0
    for one, other in zip(metrics(plain.run_dir), metrics(cached.run_dir), strict=True):
        assert other.keys() == one.keys()
        for key in ("budget_tokens", "num_target_tokens", "num_visual_tokens", "num_skipped"):
            assert other[key] == one[key]
        for key in ("loss", "grad_norm", *(key for key in one if key.startswith("validation_loss"))):
            assert other[key] == pytest.approx(one[key], rel=1e-4)


def test_a_killed_run_goes_on_to_the_same_bits(plan: Any, tmp_path: Path) -> None:
    root = tmp_path / "features"
    whole = plan("whole", features_dir=root)
    train(whole)
    shutil.rmtree(root)
    with dying_at(3):
        train(plan("killed", features_dir=root))
    assert len(files(root)) > 0
    for path in sorted(root.rglob("*.safetensors"))[::2]:
        path.unlink()
    train(plan("killed", features_dir=root))
    assert curve(tmp_path / "killed") == curve(whole.run_dir) and weights(tmp_path / "killed") == weights(whole.run_dir)


def test_processes_share_it_and_one_may_be_killed(plan: Any, tmp_path: Path) -> None:
    alone = plan("alone", batch_size=2, features_dir=tmp_path / "of one")
    train(alone)
    changes: dict[str, Any] = {"batch_size": 2, "strategy": "ddp", "features_dir": str(tmp_path / "of two")}
    changes["features_dir"] = _Path(changes["features_dir"])
    kill_after(tmp_path / "two", 2, "step-00000002", **changes)
    finish(tmp_path / "two", 2, **changes)
    assert files(tmp_path / "of two") == files(tmp_path / "of one")
    for one, two in zip(curve(alone.run_dir), curve(tmp_path / "two"), strict=True):
        assert one[4:] == two[4:] and one[:4] == pytest.approx(two[:4], rel=1e-4)


class _Path(str):
    """A path whose repr is code of the other process."""

    def __repr__(self) -> str:
        return f"Path({str(self)!r})"


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_damaged_file_is_named_and_made_again(
    plan: Any, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, towers: list[int]
) -> None:
    root = tmp_path / "features"
    first = plan("first", features_dir=root)
    train(first)
    before = files(root)
    path = sorted(root.rglob("*.safetensors"))[3]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-9]), "emptied": b""}[damage])
    towers.clear()
    caplog.set_level(logging.WARNING, "vzip")
    logging.getLogger("vzip").propagate = True
    train(plan("second", features_dir=root))
    assert f"{path}: damaged" in caplog.text and towers == [1]
    assert files(root) == before and weights(tmp_path / "second") == weights(first.run_dir)


def cache(root: Path, vlm: vzip.CompressedVlm, run: Any = RUN) -> FeatureCache:
    for parameter in vlm.model.parameters():
        parameter.requires_grad_(False)
    return FeatureCache(root, vlm, vlm.compressor, run, frozen_digest(vlm.adapter))


def test_what_decides_features_parts_them(tmp_path: Path) -> None:
    def change(name: str) -> FeatureCache:
        vlm, run = load_model(), dict(RUN)
        if name == "budget":
            vlm.compressor = vzip.VisionZip(vzip.TokenBudget(6, 2))
        elif name == "an argument":
            vlm.compressor = vzip.VisionZip(vzip.TokenBudget(6, 3), merge_rule="mean")
        elif name == "method":
            vlm.compressor = vzip.compressors.RandomTokens(vzip.TokenBudget(6, 3))
        elif name == "seed":
            vlm.compressor = vzip.compressors.RandomTokens(vzip.TokenBudget(6, 3), seed=1)
        elif name == "tower's weights":
            with torch.no_grad():
                next(vlm.adapter.vision_tower.parameters()).view(-1)[0] += 1e-3
        elif name == "preprocessing":
            vlm.preprocess = "hf"
        elif name == "processor's settings":
            vlm.processor.image_processor.image_mean = [0.1, 0.2, 0.3]  # type: ignore[union-attr]
        elif name == "select layer":
            vlm.model.config.vision_feature_layer = -1
        elif name == "seed of random targets":
            vlm.compressor = vzip.VisionZip(vzip.TokenBudget(6, 3), targets="random", seed=1)
        elif name == "random targets":
            vlm.compressor = vzip.VisionZip(vzip.TokenBudget(6, 3), targets="random")
        elif name == "a seed without effect":
            vlm.compressor = vzip.VisionZip(vzip.TokenBudget(6, 3), seed=1)
        elif name == "version":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(features, "FEATURES_VERSION", 99)
                return cache(tmp_path, vlm, run)
        elif name in run:
            run[name] = "another"
        elif name == "projector's weights":
            with torch.no_grad():
                next(vlm.adapter.projector.parameters()).view(-1)[0] += 1
        elif name == "language model's weights":
            with torch.no_grad():
                next(vlm.adapter.language_model.parameters()).view(-1)[0] += 1
        return cache(tmp_path, vlm, run)

    part = ["budget", "an argument", "method", "seed", "tower's weights", "preprocessing", "processor's settings"]
    part += ["random targets", "seed of random targets", "select layer", "version", "precision"]
    part += ["autocast", "tf32", "device"]
    same = ["nothing", "a seed without effect", "projector's weights", "language model's weights"]
    folders = {name: change(name).folder.name for name in part + same}
    assert len({folders[name] for name in same}) == 1
    assert len({*folders.values()}) == len(part) + 1, folders


def test_under_deepspeed_they_are_others(plan: Any, tmp_path: Path) -> None:
    """It goes without autocast, in which a GPU's tower makes float32 rows, which DeepSpeed's projector cannot take."""
    settings, vlm = plan(precision="bfloat16").train, load_model()
    vlm.model.requires_grad_(False)
    alone: Any = build_accelerator(settings, plan().launch, 1)
    sharded: Any = SimpleNamespace(device=alone.device, native_amp=False)  # as accelerate has it with DeepSpeed
    one, other = (open_caches(tmp_path, vlm, [None], settings, each)[0].folder for each in (alone, sharded))
    assert alone.native_amp and one != other


def test_a_methods_own_file_parts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that is edited is another method."""
    before = cache(tmp_path, load_model()).folder
    own = tmp_path / "visionzip.py"
    own.write_text("edited")
    monkeypatch.setattr("vzip.train.features.inspect.getfile", lambda kind: own)
    assert cache(tmp_path, load_model()).folder != before


def test_an_image_is_known_by_its_content(tmp_path: Path) -> None:
    kept = cache(tmp_path / "features", load_model())
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (20, 30, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    first, copied = (kept.look_up(tmp_path / name, 1).path for name in ("a.png", "b.png"))
    assert first == copied and first.parent.parent == kept.folder
    assert kept.look_up(image, 1).path == kept.look_up(image.copy(), 1).path
    assert kept.look_up(image.resize((30, 30)), 1).path != kept.look_up(image, 1).path
    assert kept.look_up(image, 2).path != kept.look_up(image, 1).path, "one of several may be shown otherwise"
    turned = image.transpose(Image.Transpose.ROTATE_180)
    turned.save(tmp_path / "b.png")
    assert kept.look_up(tmp_path / "b.png", 1).path != first


def _with_images(model: Any) -> tuple[Any, Any]:
    return model, SimpleNamespace(image_processor=new_image_processor(model.config))


OF_FAMILIES = {
    "llava": lambda: (tiny.llava(), tiny.processor()),
    "llava_next": lambda: (tiny.llava_next(), tiny.next_processor()),
    "llava_onevision": lambda: (tiny.llava_onevision(), tiny.onevision_processor()),
    "mini_gemini": lambda: (tiny_mini_gemini.mini_gemini(), tiny_mini_gemini.processor()),
    "internvl": lambda: _with_images(tiny_internvl.build()),
}


@pytest.mark.parametrize("method", [vzip.VisionZip, vzip.compressors.RandomTokens, vzip.FasterVLM])
@pytest.mark.parametrize("family", OF_FAMILIES)
def test_every_family_gets_what_it_encodes(family: str, method: Any, tmp_path: Path) -> None:
    """Images of several sizes, made and read again, against ``Adapter.encode`` of each: the same bits."""
    model, processor = OF_FAMILIES[family]()
    vlm = vzip.CompressedVlm(model, method(vzip.TokenBudget(3, 1)), processor)
    adapter, kept = vlm.adapter, cache(tmp_path, vlm)
    sources = [Image.new("RGB", size, (80 + n, 9 * n, 50)) for n, size in enumerate([(40, 60), (60, 40), (30, 30)])]
    for _ in ("made", "read"):
        found = [kept.look_up(source, 1) for source in sources]
        tokens = visual_tokens(adapter, found, vlm.compressor, CPU)
        for source, image, own in zip(sources, found, tokens, strict=True):
            inputs = vlm.preprocess_images([source])
            (expected,) = adapter.encode(adapter.read_inputs(**inputs), vlm.compressor)
            torch.testing.assert_close(own.rows, expected.rows, rtol=1e-5, atol=1e-6)
            assert len(own.rows) == image.num_tokens == vlm.expected_num_visual_tokens(**inputs)[0]
            assert image.shape == adapter.read_inputs(**inputs).images[0]
            (alone,) = visual_tokens(adapter, [image], vlm.compressor, CPU)
            assert torch.equal(alone.rows, expected.rows)
    assert all(image.content is not None and not image.inputs for image in found)


@dataclasses.dataclass(frozen=True)
class Projecting(vzip.compressors.UniformTokens):
    """Selects by what the projector makes."""

    space = "projected"


class Secretive(vzip.compressors.Identity):
    """A method whose arguments nobody can tell."""

    scope, space, is_vanilla = "crop", "tower", False


@pytest.mark.parametrize(
    ("compressor", "said"),
    [
        (vzip.Identity(), "compressor=Identity puts its tokens together from whole images"),
        (Projecting(vzip.TokenBudget(4, 0)), "compressor=Projecting works on what the projector makes"),
        (Secretive(), "Secretive is a Secretive, whose arguments cannot be told"),
    ],
)
def test_methods_that_need_the_projector_are_refused(compressor: Any, said: str, tmp_path: Path) -> None:
    vlm = load_model()
    vlm.compressor = compressor
    with pytest.raises(ConfigError) as caught:
        cache(tmp_path / "features", vlm)
    assert said in str(caught.value) and not (tmp_path / "features").exists()


@pytest.mark.parametrize("name", method_names())
def test_every_method_with_a_budget_can_be_told(name: str) -> None:
    """Its arguments are part of the key, or it is refused for what it reads."""
    compressor = find_method(name).build(vzip.TokenBudget(3, 1))
    try:
        features.check_method(compressor)
    except ConfigError as error:
        assert "projector" in str(error) and (compressor.scope == "image" or compressor.space == "projected")
        return
    told = features._described(compressor, name)
    assert "'num_dominant': 3, 'num_contextual': 1" in str(told) and told["source"]


def test_what_trains_before_the_projector_is_refused(tmp_path: Path) -> None:
    vlm = load_model()
    with pytest.raises(ConfigError, match=r"trains .* parameters before the projector"):
        FeatureCache(tmp_path, vlm, vlm.compressor, RUN, "")


def test_a_family_that_selects_behind_its_projector_is_refused(tmp_path: Path) -> None:
    vlm = vzip.CompressedVlm(tiny_qwen.build(), vzip.VisionZip(vzip.TokenBudget(3, 1)))
    with pytest.raises(ConfigError, match=r"Qwen2_5_VL.* selects visual tokens behind its projector"):
        cache(tmp_path, vlm)


def test_a_disk_without_room_is_refused_before_the_first_step(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "features"
    monkeypatch.setattr("vzip.train.features.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    setup = plan(features_dir=root)
    with pytest.raises(ConfigError, match=r"about 0\.\d MiB, of which .*paths\.features_dir"):
        train(setup)
    assert not (setup.run_dir / "metrics.jsonl").exists(), "no step was taken"
    monkeypatch.undo()
    train(setup)


def test_the_estimate_is_the_size(plan: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "features"
    caplog.set_level(logging.INFO, "vzip")
    logging.getLogger("vzip").propagate = True
    train(plan("first", features_dir=root))
    vlm = load_model()
    needed, there = cache(root, vlm).measure(Samples(), CPU)
    assert needed == there == sum(map(len, files(root).values())), "all images are of one size here"
    assert f"in {root}" in caplog.text and "features of all images: about" in caplog.text
    assert check_room(root, 2**31, 2**30).startswith("features of all images: about 2.0 GiB")


def test_an_image_of_several_samples_is_estimated_once(tmp_path: Path) -> None:
    images = Samples(40)
    images.has_images[:] = True
    kept = cache(tmp_path, load_model())
    (kept.folder / "ab").mkdir()
    (kept.folder / "ab" / ".c.1-2.tmp.safetensors").symlink_to("gone")  # another process has renamed it meanwhile
    needed, _ = kept.measure(images, CPU)
    images.image_groups = np.arange(40) // 4
    assert kept.measure(images, CPU)[0] == needed // 4


def test_an_image_that_cannot_be_read(plan: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vzip").propagate = True
    setup = plan(load_data=lambda: Samples(broken=11), features_dir=tmp_path / "features", skip_unreadable=True)
    train(setup)
    assert "left out, since an image or video cannot be read: s11" in caplog.text


def test_a_batch_of_several_images_and_questions(plan: Any, tmp_path: Path) -> None:
    """Samples of two images, and one whose image is cut off: as without."""

    class Several(Samples):
        def __getitem__(self, index: int) -> TrainingSample:
            sample = super().__getitem__(index)
            if not sample.images:
                return sample
            again = [
                [dataclasses.replace(t, text=t.text.replace("<image>\n", "<image>\n<image>\n")) for t in turns]
                for turns in sample.dialogues
            ]
            return TrainingSample(sample.id, [*sample.images, Image.new("RGB", (9, 9), (index, 0, 0))], again)

    plain = plan("plain", load_data=Several, batch_size=2)
    cached = plan("cached", load_data=Several, batch_size=2, features_dir=tmp_path / "features")
    train(plain)
    train(cached)
    for one, other in zip(curve(plain.run_dir), curve(cached.run_dir), strict=True):
        assert one[4:] == other[4:] and one[:4] == pytest.approx(other[:4], rel=1e-5)


def test_train_py(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, towers: list[int]) -> None:
    more = ["data.cache_features=true", "train.num_epochs=2", "launcher=inline", "launcher.batch_size=1"]
    assert run_command("train", [*words, *more, "paths.run_dir=a"], monkeypatch) == 0
    assert towers == [1] * 8 and len(files(tmp_path / "cache" / "features")) == 8
    towers.clear()
    assert run_command("train", [*words, *more, "paths.run_dir=b", "train.learning_rate=0.02"], monkeypatch) == 0
    assert towers == []
    assert run_command("train", [*words, *more[1:], "paths.run_dir=c"], monkeypatch) == 0
    assert curve(Path("c")) == curve(Path("a")) and weights(Path("c")) == weights(Path("a"))
    assert all(row["num_visual_tokens"] == 4 * 9 for row in metrics(Path("a")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train=instruct_next"], "train.parts=.* trains the vision tower"),
        (
            ["launcher=zero3_8gpu", "train.samples_per_step=128"],
            "launcher.strategy=zero3: it shares the tower's weights out",
        ),
        (["compressor=none", "budget=full"], "compressor=Identity puts its tokens together"),
    ],
)
def test_refused_before_anything_is_loaded(words: list[str], said: str) -> None:
    config = checked(composed(["+exp=tiny_64tok", "data.cache_features=true", *words]))
    config["launcher"] = {**config["launcher"], "num_machines": config["launcher"]["num_machines"] or 1}
    with pytest.raises(ConfigError, match=said):
        tuning_plan(config)


def test_where_it_is_and_what_it_does_not_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may go on with the features kept or not: they are no part of what the run is."""
    monkeypatch.setenv("VZIP_CACHE", str(tmp_path))
    without, at_home, elsewhere = (
        tuning_plan(checked(composed(["+exp=tiny_64tok", "launcher=inline", *words])))
        for words in ([], ["data.cache_features=true"], ["data.cache_features=true", "paths.features_dir=/x"])
    )
    assert without.features_dir is None and at_home.features_dir == tmp_path / "features"
    assert elsewhere.features_dir == Path("/x")
    assert without.identity == at_home.identity == elsewhere.identity
    assert without.run_dir == at_home.run_dir

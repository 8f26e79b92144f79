"""Each image once through the vision tower, many at once, within a bound; and the answers of questions asked singly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

import vzip
from vzip.errors import ConfigError, ImageError
from vzip.evaluation.answering.generation import settings_for
from vzip.evaluation.answering.questions import Preparer, Question, images_of
from vzip.evaluation.answering.resume import AnswerStore
from vzip.evaluation.answering.visuals import BYTES_PER_GIB, EncodedCache, Visual, Visuals
from vzip.evaluation.run import evaluate
from vzip.models import compiled
from vzip.models.families.places import EncodedVisuals, VisualTokens
from vzip.results.record import read_samples

NUM_IMAGES, QUESTIONS = 5, ("is there a dog?", "how many are red?", "what does it say there?", "where?")
NUM_QUESTIONS = NUM_IMAGES * len(QUESTIONS)
TASKS = ("own_yes", "own_more")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, include_path: Path) -> Path:
    """Two tasks over the same images: in own_yes two questions an image, by its file, in own_more the other two."""
    folder = tmp_path_factory.mktemp("shared")
    for number in range(NUM_IMAGES):
        torch.manual_seed(number)
        pixels = torch.randint(0, 256, (40 + number, 60, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "utils.py").write_text(
        "from pathlib import Path\n\nfrom PIL import Image\n\n\n"
        "def visual(doc):\n    return [Image.open(Path(__file__).parent / doc['image'])]\n\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n"
    )
    text = (include_path / "own_text.yaml").read_text().replace("utils.none", "utils.visual")
    for name, questions in zip(TASKS, (QUESTIONS[:2], QUESTIONS[2:]), strict=True):
        rows = [
            {"question": f"{question} {'now ' * (number % 3)}", "answer": "x", "image": f"{number}.png"}
            for question in questions
            for number in range(NUM_IMAGES)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = text.replace("own_text", name).replace(str(include_path / "text.jsonl"), str(folder / f"{name}.jsonl"))
        (folder / f"{name}.yaml").write_text(own)
    return folder


def run(vlm: Any, tasks: Path, run_dir: Path, **kwargs: Any) -> dict[str, Any]:
    return evaluate(vlm, tasks=TASKS, include_path=tasks, run_dir=run_dir, progress=False, **kwargs)


@pytest.fixture
def passes(vlm: Any) -> Iterator[list[int]]:
    """Images that went through the vision tower, pass by pass."""
    seen: list[int] = []
    embeddings = vlm.adapter.tower.embeddings
    handle = embeddings.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    yield seen
    handle.remove()


class TestOnce:
    @pytest.mark.parametrize(
        ("batch_size", "expected"),
        [(1, [1] * NUM_IMAGES), (2, [2, 2, 1]), ("auto", [4, 1]), (NUM_QUESTIONS, [NUM_IMAGES])],
    )
    def test_an_image_is_encoded_for_all_its_questions(self, vlm, tasks, tmp_path, passes, batch_size, expected):
        record = run(vlm, tasks, tmp_path, batch_size=batch_size)
        assert sum(passes) == NUM_IMAGES and sorted(passes, reverse=True) == expected
        assert record["visual_cache"] == {"num_encoded": NUM_IMAGES, "num_shown": NUM_QUESTIONS}

    def test_without_room_each_batch_encodes_its_own_and_none_twice(self, vlm, tasks, tmp_path, passes):
        run(vlm, tasks, tmp_path / "one", batch_size=1, visual_cache_gib=0)
        assert passes == [1] * NUM_QUESTIONS
        passes.clear()
        run(vlm, tasks, tmp_path / "all", batch_size=NUM_QUESTIONS, visual_cache_gib=0)
        assert passes == [NUM_IMAGES]

    def test_it_is_preprocessed_once(self, vlm, tasks, tmp_path, monkeypatch):
        preprocess, sizes = vlm.preprocess_images, []

        def counting(images: list[Image.Image], *args: Any) -> Any:
            sizes.extend(image.size for image in images)
            return preprocess(images, *args)

        monkeypatch.setattr(vlm, "preprocess_images", counting)
        run(vlm, tasks, tmp_path, batch_size=4)
        assert len(set(sizes)) == len(sizes) == NUM_IMAGES

    def test_a_text_aware_method_chooses_for_each_question(self, vlm, tasks, tmp_path):
        vlm.compressor = vzip.compressors.MMTok(vzip.TokenBudget(5, 2))
        alone = run(vlm, tasks, tmp_path / "alone", batch_size=1, visual_cache_gib=0)
        record = run(vlm, tasks, tmp_path / "kept", batch_size=8)
        assert record["visual_cache"]["num_encoded"] == NUM_QUESTIONS == alone["visual_cache"]["num_encoded"]
        assert read_samples(tmp_path / "kept") == read_samples(tmp_path / "alone")


class TestAnswers:
    """Equal to those of questions asked one by one, each with its own pass of the tower."""

    @pytest.mark.parametrize("compressor", [vzip.VisionZip(vzip.TokenBudget(5, 2)), vzip.Identity()], ids=str)
    @pytest.mark.parametrize("pruner", [None, vzip.FastV(1, 3)], ids=str)
    def test_whatever_shares_a_batch(self, vlm, tasks, tmp_path, compressor, pruner):
        vlm.compressor, vlm.pruner = compressor, pruner
        run(vlm, tasks, tmp_path / "alone", batch_size=1, visual_cache_gib=0)
        for name, settings in {"one": {"batch_size": 1}, "auto": {"batch_size": "auto", "num_workers": 0}}.items():
            run(vlm, tasks, tmp_path / name, **settings)
            assert read_samples(tmp_path / name) == read_samples(tmp_path / "alone")

    def test_budgets_methods_and_weights_do_not_mix_in_one_process(self, vlm, model, processor, tasks, tmp_path):
        """One wrapper through all of them in turn gives what a wrapper of its own gives to each."""
        methods = [vzip.VisionZip(vzip.TokenBudget(5, 2)), vzip.VisionZip(vzip.TokenBudget(4, 3))]
        methods += [vzip.RandomTokens(vzip.TokenBudget(5, 2), seed) for seed in (0, 1)]
        for number, method in enumerate(methods):
            vlm.compressor = method
            run(vlm, tasks, tmp_path / f"shared{number}", batch_size=8)
            own = vzip.CompressedVlm(model, method, processor)
            run(own, tasks, tmp_path / f"own{number}", batch_size=8)
            assert read_samples(tmp_path / f"shared{number}") == read_samples(tmp_path / f"own{number}")
        told = [str(read_samples(tmp_path / f"own{number}")) for number in range(len(methods))]
        assert len(set(told)) == len(told), "methods that answer alike would show nothing"
        weight = vlm.adapter.projector.get_parameter("linear_1.weight")
        before = weight.detach().clone()
        try:
            with torch.no_grad():
                weight.mul_(-3)
            run(vlm, tasks, tmp_path / "changed", batch_size=8)
            run(vlm, tasks, tmp_path / "alone", batch_size=1, visual_cache_gib=0)
        finally:
            with torch.no_grad():
                weight.copy_(before)
        assert read_samples(tmp_path / "changed") == read_samples(tmp_path / "alone")
        assert str(read_samples(tmp_path / "changed")) != told[-1]

    def test_what_shares_a_pass_does_not_depend_on_what_is_answered_already(
        self, vlm, tasks, tmp_path, monkeypatch, passes
    ):
        """An interrupted run computes the very numbers of one that is not: it gives the tower the same batches."""
        encoded: dict[str, list[bytes]] = {}
        encode, into = vlm.encode, "whole"

        def noting(*args: Any, **inputs: torch.Tensor) -> Any:
            encoded.setdefault(into, []).append(inputs["pixel_values"].numpy().tobytes())
            return encode(*args, **inputs)

        monkeypatch.setattr(vlm, "encode", noting)
        add, seen = AnswerStore.add, 0

        def copying(self: AnswerStore, *args: Any) -> None:
            nonlocal seen
            add(self, *args)
            seen += 1
            shutil.copytree(tmp_path / "whole", tmp_path / f"killed{seen}")

        with monkeypatch.context() as patch:
            patch.setattr(AnswerStore, "add", copying)
            run(vlm, tasks, tmp_path / "whole", batch_size=3)
        assert seen >= 7 and len(encoded["whole"]) >= 2
        for number in range(1, seen + 1):
            into = f"killed{number}"
            record = run(vlm, tasks, tmp_path / into, batch_size=3)
            assert record["num_resumed_answers"] > 0 and set(encoded.get(into, [])) <= set(encoded["whole"])
            assert read_samples(tmp_path / into) == read_samples(tmp_path / "whole")
        assert encoded["killed1"] == encoded["whole"], "the first batch is answered, its images are needed again"

    @pytest.mark.slow  # Dynamo: half a minute
    def test_compiled_parts_answer_alike(self, vlm, model, processor, tasks, tmp_path, monkeypatch):
        """The tower's graph makes what is encoded ahead, the others read it; captured, and run uncompiled."""
        monkeypatch.setattr(compiled, "BACKEND", "eager")
        torch._dynamo.reset()
        run(vlm, tasks, tmp_path / "alone", batch_size=1, visual_cache_gib=0)
        own = vzip.CompressedVlm(model, vlm.compressor, processor, compile=compiled.PARTS)
        record = run(own, tasks, tmp_path / "compiled", batch_size=3)
        torch._dynamo.reset()
        assert record["visual_cache"]["num_encoded"] == NUM_IMAGES and record["model"]["compile"] == [*compiled.PARTS]
        assert read_samples(tmp_path / "compiled") == read_samples(tmp_path / "alone")

    def test_a_tower_that_does_not_fit_takes_fewer_at_once(self, vlm, tasks, tmp_path, monkeypatch):
        run(vlm, tasks, tmp_path / "alone", batch_size=1, visual_cache_gib=0)
        encode, tried = vlm.encode, []

        def limited(*args: Any, **inputs: torch.Tensor) -> Any:
            tried.append(len(inputs["pixel_values"]))
            if tried[-1] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return encode(*args, **inputs)

        monkeypatch.setattr(vlm, "encode", limited)
        record = run(vlm, tasks, tmp_path / "run", batch_size=8)
        # Four images in the pass of the first section: once with eight questions at once, once with four.
        assert tried == [4, 4, 2, 2, 1] and max(map(int, record["batch_sizes"])) == 2
        assert read_samples(tmp_path / "run") == read_samples(tmp_path / "alone")


def test_what_cannot_be_used_is_left_out_for_good():
    def preprocess(images: list[Image.Image], _num: list[int]) -> dict[str, torch.Tensor]:
        tried.append([image.size for image in images])
        if any(image.size == (2, 1) for image in images):
            raise ImageError("damaged")
        return {"pixel_values": torch.ones(len(images))}

    tried: list[Any] = []
    vlm: Any = SimpleNamespace(
        preprocess_images=preprocess,
        visual_bytes=lambda pixel_values: [8] * len(pixel_values),
        device=torch.device("cpu"),
    )
    visuals = Visuals(vlm)
    keys = [key for side in (1, 2, 3, 2) for key in visuals.add([Visual(Image.new("RGB", (side, 1)))])]
    assert keys[3] == keys[1] and len(set(keys)) == 3
    visuals.arrange(3)
    assert {key: str(error) for key, error in visuals.preprocess().items()} == {keys[1]: "damaged"}
    assert tried[-1] == [(1, 1), (3, 1)] and visuals.num_bytes == 24
    visuals.arrange(2)
    assert visuals.preprocess() == {}
    assert tried[-2:] == [[(1, 1)], [(3, 1)]]


def test_pixels_for_a_gpu_wait_in_pinned_memory_and_are_sent_without_waiting(monkeypatch):
    """By threads that read ahead; the model's thread only says where they go."""
    asked: list[tuple[str, Any]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(("pin", tuple(tensor.shape)))
        return tensor

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        asked.append(("send", (device.type, non_blocking)))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    vlm: Any = SimpleNamespace(
        preprocess_images=lambda images, _num: {"pixel_values": torch.ones(len(images), 3)},
        visual_bytes=lambda pixel_values: [8],
        device=torch.device("cuda"),
        encode=lambda _asked, pixel_values: EncodedVisuals(images=[(None, VisualTokens(pixel_values))]),  # type: ignore[list-item]
    )
    visuals = Visuals(vlm)
    shown = visuals.add([Visual(Image.new("RGB", (2, 1)))])
    visuals.arrange(1)
    visuals.preprocess()
    assert asked == [("pin", (1, 3))]
    visuals.encoded([shown], EncodedCache(0))
    assert asked[1:] == [("pin", (1, 3)), ("send", ("cuda", True))], "what is pinned stays where it is"


@pytest.mark.parametrize("known", [(), (0,)])
def test_whether_a_section_is_too_large_does_not_depend_on_what_is_answered(known):
    """Of two batches the first shows a large image, the second a small one."""
    vlm: Any = SimpleNamespace(
        device=torch.device("cpu"),
        adapter=SimpleNamespace(video_token_id=None),
        compressor=SimpleNamespace(reads_text=False),
        processor=SimpleNamespace(image_token="<image>", apply_chat_template=lambda *_, **__: "<image> what?"),
        preprocess_images=lambda images, _num: {"sides": torch.tensor([image.width for image in images])},
        visual_bytes=lambda sides: sides.tolist(),
        write_prompts=lambda *_: {},
    )

    def messages(side: int) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image", "url": Image.new("RGB", (side, 1))}]}]

    def question(number: int) -> Question:
        request: Any = SimpleNamespace(args=("what?", messages, None, number, "t", "s"))
        return Question(("t", number, 0), settings_for("t", {}, {}), "what?", request)

    preparer = Preparer(vlm, {"t": {"s": [6, 1]}}, None, cache_gib=7 / BYTES_PER_GIB)
    prepared = preparer.prepare([[question(0)], [question(1)]], 1, {("t", number, 0) for number in known})
    of_batches = [visuals for chunks, visuals in prepared.batches if chunks]
    assert len(of_batches) == 2 - len(known)
    assert [len(visuals._passes) for visuals in of_batches] == [1] * len(of_batches), "so each encodes its own"


class TestCache:
    def found(self, *numbers: int) -> dict[Any, EncodedVisuals]:
        return {number: EncodedVisuals() for number in numbers}

    def test_the_least_recently_shown_make_room(self):
        cache = EncodedCache(10 / 1024**3)
        for keys, size in (((1, 2), 4), ((3,), 4)):
            cache.keep(self.found(*keys), size)
        assert cache.find((1, 2)) is not None and cache.num_bytes == 8
        cache.keep(self.found(4), 5)
        assert cache.find((3,)) is None and cache.find((1, 2)) is not None and cache.num_bytes == 9
        cache.keep(self.found(5), 11)
        assert cache.find((5,)) is None and cache.num_bytes == 9, "larger than all there is"
        assert cache.find((2, 1)) is None, "together they may be others in the last bits"
        cache.clear()
        assert cache.find((4,)) is None and cache.num_bytes == 0

    def test_a_run_stays_within_it(self, vlm, tasks, tmp_path, monkeypatch, passes):
        size = 7 * 32 * 4  # of an image, in float32
        keep, most = EncodedCache.keep, []

        def noting(self: EncodedCache, *args: Any) -> None:
            keep(self, *args)
            most.append(self.num_bytes)

        monkeypatch.setattr(EncodedCache, "keep", noting)
        run(vlm, tasks, tmp_path / "two", batch_size=2, visual_cache_gib=2.5 * size / 1024**3)
        assert max(most) == 2 * size and sum(passes) == NUM_IMAGES
        passes.clear()
        run(vlm, tasks, tmp_path / "three", batch_size=3, visual_cache_gib=2.5 * size / 1024**3)
        assert max(most) <= 2.5 * size, "three images of a section are too many"
        assert sum(passes) > NUM_IMAGES and min(passes) > 1, "so each batch encodes its own, at once"
        run(vlm, tasks, tmp_path / "alone", batch_size=1, visual_cache_gib=0)
        for name in ("two", "three"):
            assert read_samples(tmp_path / name) == read_samples(tmp_path / "alone")

    @pytest.mark.parametrize("value", [-1, True, "much", float("nan")])
    def test_a_bound_that_is_none(self, value):
        with pytest.raises(ConfigError, match=r"eval\.visual_cache_gib="):
            EncodedCache(value)


def test_rows_tell_which_images_are_alike_without_decoding_them():
    def file(content: bytes) -> dict[str, Any]:
        return {"bytes": content, "path": None}

    begins_alike = [b"no image" * 9000 + end for end in (b"a", b"bc")]  # of other lengths
    rows = [
        {"question": str(number), "image_id": number // 2, "image": file(own), "images": [file(own)]}
        for number, own in enumerate([b"x", b"x", *begins_alike])
    ]
    data = datasets.Dataset.from_list(rows)
    features = data.features.copy()
    features["image"], features["images"] = datasets.Image(), datasets.Sequence(datasets.Image())
    data = data.cast(features)

    def alike(numbers: list[int], rows: Any = data) -> list[int]:
        asked = [
            SimpleNamespace(key=("t", n, 0), request=SimpleNamespace(args=("", 0, 0, n, "t", "s"))) for n in numbers
        ]
        found = images_of(asked, {"t": {"s": rows}})  # type: ignore[arg-type]
        return [found.index(one) for one in found]

    assert alike([0, 1, 2, 3]) == [0, 0, 2, 3] and alike([3, 1, 0, 1]) == [0, 1, 1, 1]
    assert alike([0, 1], data.select([2, 0])) == [0, 1]
    assert alike([0, 1], data.select_columns(["question"])) == [0, 1] and alike([0, 1], [{}, {}]) == [0, 1]


def test_keys_tell_apart_what_becomes_other_tokens(tmp_path):
    image, other = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert Visual(image).key == Visual(image.copy()).key
    file = tmp_path / "clip.mp4"
    file.write_bytes(b"one")
    before = Visual(file).key
    file.write_bytes(b"another")
    keys = [Visual(image).key, Visual(other).key, Visual(Image.new("RGB", (4, 2), "red")).key, Visual(image, 2).key]
    keys += [Visual(image, 1, "what?").key, Visual([image]).key, Visual([image, image]).key, before, Visual(file).key]
    frames = [Image.new("P", (4, 2)) for _ in range(2)]
    for frame, colour in zip(frames, ([200, 10, 10], [10, 200, 10]), strict=True):  # indices alike
        frame.putpalette(colour)
    keys += [Visual([frame]).key for frame in frames]
    assert len(set(keys)) == len(keys)

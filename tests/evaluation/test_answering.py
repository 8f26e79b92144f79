"""Memory that does not suffice, sampled answers, images that cannot be read."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from vzip.errors import DeviceMemoryError, ManifestError
from vzip.evaluation.answering import batching
from vzip.evaluation.answering.resume import AnswerStore
from vzip.evaluation.run import evaluate
from vzip.results.record import read_samples


def run(vlm: Any, include_path: Path, run_dir: Path, **kwargs: Any) -> dict[str, Any]:
    settings = {"tasks": ["own_exact"], "progress": False} | kwargs
    return evaluate(vlm, include_path=include_path, run_dir=run_dir, **settings)


def limit_memory(monkeypatch: pytest.MonkeyPatch, vlm: Any, most: int) -> list[int]:
    """Lets ``generate`` run out of memory above ``most`` questions; returns the sizes it was asked for."""
    asked: list[int] = []
    generate = vlm.generate

    def limited(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        asked.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return generate(input_ids, **kwargs)

    monkeypatch.setattr(vlm, "generate", limited)
    return asked


class TestMemory:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_batch_is_halved_until_it_fits(self, vlm, include_path, tmp_path, monkeypatch, caplog, num_workers):
        whole = run(vlm, include_path, tmp_path / "whole", tasks=["own_exact", "own_text"], batch_size=1)
        asked = limit_memory(monkeypatch, vlm, 1)
        caplog.set_level(logging.WARNING, "vzip")
        record = run(
            vlm,
            include_path,
            tmp_path / "run",
            tasks=["own_exact", "own_text"],
            batch_size=4,
            num_workers=num_workers,
        )
        assert asked == [4, 2, *[1] * 8]  # never tried again with more
        assert "out of memory with 4 questions at once (the first: task own_" in caplog.text
        assert "going on with 2" in caplog.text and "going on with 1" in caplog.text
        assert (record["batch_size"], record["batch_sizes"]) == (4, {"1": 8})
        assert whole["batch_sizes"] == {"1": 8}
        assert read_samples(tmp_path / "run") == read_samples(tmp_path / "whole")
        assert record["tasks"] == whole["tasks"]

    def test_one_question_that_does_not_fit_is_named(self, vlm, include_path, tmp_path, monkeypatch):
        limit_memory(monkeypatch, vlm, 0)
        with pytest.raises(DeviceMemoryError, match=r"task own_exact, question \d: .* \(1 images, .*smaller budget"):
            run(vlm, include_path, tmp_path / "run", batch_size=4)
        assert not (tmp_path / "run" / "run.json").exists()

    def test_memory_that_lacks_while_inputs_are_made_ahead(self, vlm, include_path, tmp_path, monkeypatch):
        preprocess, left = vlm.preprocess_images, [2]

        def short(images: list[Image.Image], *args: Any) -> Any:
            if len(images) == 4 and left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return preprocess(images, *args)

        monkeypatch.setattr(vlm, "preprocess_images", short)
        record = run(vlm, include_path, tmp_path / "run", batch_size=4)
        assert record["batch_sizes"] == {"2": 2}  # once ahead, once when its turn came


class TestAuto:
    """eval.batch_size=auto."""

    def test_finds_what_fits_and_stays_with_it(self, vlm, include_path, tmp_path, monkeypatch):
        both = {"tasks": ["own_exact", "own_text"]}
        run(vlm, include_path, tmp_path / "one", batch_size=1, **both)
        monkeypatch.setattr(batching, "AUTO_ON_CPU", 3)
        asked = limit_memory(monkeypatch, vlm, 2)
        record = run(vlm, include_path, tmp_path / "auto", batch_size="auto", **both)
        assert asked == [3, 2, 1, 2, 1, 2]  # 8 questions planned as 3, 3 and 2
        assert (record["batch_size"], record["batch_sizes"]) == ("auto", {"2": 3, "1": 2})
        assert read_samples(tmp_path / "auto") == read_samples(tmp_path / "one")

    def test_an_interrupted_run_does_not_try_again(self, vlm, include_path, tmp_path, monkeypatch):
        both = {"tasks": ["own_exact", "own_text"], "batch_size": "auto"}
        monkeypatch.setattr(batching, "AUTO_ON_CPU", 4)
        with monkeypatch.context() as patch:
            asked = limit_memory(patch, vlm, 2)
            limited = vlm.generate

            def interrupted(*args: Any, **kwargs: Any) -> Any:
                if len(asked) == 3:  # 4 of memory; 2 and 2 answered
                    raise KeyboardInterrupt
                return limited(*args, **kwargs)

            patch.setattr(vlm, "generate", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(vlm, include_path, tmp_path, **both)
        asked = limit_memory(monkeypatch, vlm, 2)
        record = run(vlm, include_path, tmp_path, **both)
        assert asked == [2, 2]
        assert (record["num_resumed_answers"], record["batch_sizes"]) == (4, {"2": 4})

    def test_tries_much_on_a_gpu_only(self):
        sizes = [batching.planned_size("auto", torch.device(kind)) for kind in ("cuda", "cpu")]
        assert sizes == [batching.AUTO_ON_GPU, batching.AUTO_ON_CPU] and sizes[0] > sizes[1]
        assert batching.planned_size(5, torch.device("cuda")) == 5


def test_sizes_of_an_ordinary_run(vlm, include_path, tmp_path):
    record = run(vlm, include_path, tmp_path / "run", tasks=["own_exact", "own_yesno"], batch_size=3)
    assert record["batch_sizes"] == {"3": 2, "1": 2}
    assert (record["num_processes"], record["left_out"], record["num_damaged_lines"]) == (1, [], 0)


def test_workers_change_no_answer(vlm, include_path, tmp_path):
    for workers in (0, 3):
        run(vlm, include_path, tmp_path / str(workers), tasks=["own_exact", "own_text"], num_workers=workers)
    assert read_samples(tmp_path / "0") == read_samples(tmp_path / "3")


def test_sampled_answers_depend_on_the_seed_and_on_nothing_else(vlm, include_path, tmp_path):
    sampled = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 6}
    both = {"tasks": ["own_exact", "own_text"], "gen_kwargs": sampled}
    run(vlm, include_path, tmp_path / "both", **both)
    run(vlm, include_path, tmp_path / "one", tasks=["own_exact"], gen_kwargs=sampled)
    run(vlm, include_path, tmp_path / "other", seed=1, **both)
    first, alone, other = (read_samples(tmp_path / name)["own_exact"] for name in ("both", "one", "other"))
    assert first == alone
    assert [row["answer"] for row in first] != [row["answer"] for row in other]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, include_path: Path) -> Path:
    """own_damaged: of five images one is cut off and one no image at all; own_unreadable: nothing but the first."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "utils.py").write_text((include_path / "utils.py").read_text())
    file = io.BytesIO()
    Image.effect_noise((90, 60), 80).convert("RGB").save(file, "JPEG")
    whole = file.getvalue()
    contents = [whole, whole[: len(whole) // 2], whole, b"no picture", whole]
    text = (include_path / "own_exact.yaml").read_text()
    for name, pictures in (("damaged", contents), ("unreadable", contents[1:2])):
        rows = [
            {"image": {"bytes": picture, "path": None}, "question": f"what is this {'now ' * number}?", "answer": "x"}
            for number, picture in enumerate(pictures)
        ]
        features = datasets.Dataset.from_list([{**rows[0], "image": Image.new("RGB", (1, 1))}]).features
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / f"{name}.parquet"))
        own = text.replace("own_exact", f"own_{name}").replace(str(include_path / "exact"), str(folder / name))
        (folder / f"own_{name}.yaml").write_text(own)
    return folder


class TestPicturesThatCannotBeRead:
    @pytest.mark.parametrize("batch_size", [1, 5])
    def test_are_named_and_counted_once_all_others_are_answered(self, vlm, damaged, tmp_path, batch_size):
        with pytest.raises(ManifestError) as caught:
            run(vlm, damaged, tmp_path, tasks=["own_damaged"], batch_size=batch_size)
        message = str(caught.value)
        assert message.startswith("2 of 5 questions cannot be asked, so there is no score:")
        assert "task own_damaged, question 1: OSError: image file is truncated" in message
        assert "task own_damaged, question 3: UnidentifiedImageError: cannot identify image" in message
        assert "eval.on_problem=skip" in message and not (tmp_path / "run.json").exists()

        record = run(vlm, damaged, tmp_path, tasks=["own_damaged"], batch_size=batch_size, on_problem="skip")
        assert record["num_resumed_answers"] == 3  # nothing is asked twice
        rows = read_samples(tmp_path)["own_damaged"]
        assert [row["doc_id"] for row in rows] == [0, 2, 4]
        assert record["tasks"]["own_damaged"]["num_samples"] == 3
        assert [(entry["task"], entry["doc_id"]) for entry in record["left_out"]] == [
            ("own_damaged", 1),
            ("own_damaged", 3),
        ]
        assert "truncated" in record["left_out"][0]["problem"]
        assert "2 questions left out: their images or videos cannot be read" in record["provisional_reasons"]
        assert json.loads((tmp_path / "run.json").read_text())["left_out"] == record["left_out"]

    def test_a_task_without_any_other_question_has_no_score(self, vlm, damaged, tmp_path):
        with pytest.raises(ManifestError, match=r"3 of 6 questions cannot be asked(.*\n)+.*there is no other question"):
            run(vlm, damaged, tmp_path / "run", tasks=["own_damaged", "own_unreadable"], on_problem="skip")

    def test_one_found_only_by_the_image_processor(self, vlm, include_path, tmp_path, monkeypatch):
        """As a video is, whose file is opened when the inputs are made: of a batch only that question is at fault."""
        from vzip.errors import VideoError

        preprocess = vlm.preprocess_images

        def fails(images: list[Image.Image], *args: Any) -> Any:
            if any(image.size == (60, 41) for image in images):  # of the question about an animal
                raise VideoError("clip.mp4: cut off")
            return preprocess(images, *args)

        monkeypatch.setattr(vlm, "preprocess_images", fails)
        record = run(vlm, include_path, tmp_path, batch_size=4, on_problem="skip")
        assert record["left_out"] == [{"task": "own_exact", "doc_id": 1, "problem": "clip.mp4: cut off"}]
        assert record["batch_sizes"] == {"3": 1}


def test_another_error_in_a_worker_names_the_question(vlm, include_path, tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        run(vlm, include_path, tmp_path / "run", num_workers=2)
    assert any(note.startswith("While working on task own_exact, question ") for note in caught.value.__notes__)


class TestLongPrompts:
    """The language model reads so few tokens that questions, or their answers, do not fit."""

    def shorten(self, vlm: Any, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        monkeypatch.setattr(vlm.model.config.text_config, "max_position_embeddings", limit)

    def test_questions_longer_than_the_model_reads_are_named_or_left_out(
        self, vlm, include_path, tmp_path, monkeypatch
    ):
        self.shorten(vlm, monkeypatch, 8)
        with pytest.raises(ManifestError, match=r"(?s)4 of 4 questions cannot.*question 3: Prompt 0 is 17"):
            run(vlm, include_path, tmp_path / "run", batch_size=4)

    def test_an_answer_is_cut_where_the_model_ends_whatever_is_asked_beside_it(
        self, vlm, include_path, tmp_path, monkeypatch, caplog
    ):
        self.shorten(vlm, monkeypatch, 64)
        settings = {"gen_kwargs": {"max_new_tokens": 60}}
        caplog.set_level(logging.WARNING, "vzip")
        together = run(vlm, include_path, tmp_path / "four", batch_size=4, **settings)
        alone = run(vlm, include_path, tmp_path / "one", batch_size=1, **settings)
        assert read_samples(tmp_path / "four") == read_samples(tmp_path / "one")
        assert together["tasks"] == alone["tasks"]
        assert "task own_exact, question" in caplog.text and "Its answer is cut there." in caplog.text

        added: list[Any] = []
        add = AnswerStore.add

        def noting(self: AnswerStore, *args: Any) -> None:
            add(self, *args)
            added.append(args[1:])

        monkeypatch.setattr(AnswerStore, "add", noting)
        run(vlm, include_path, tmp_path / "noted", batch_size=4, **settings)
        assert added == [([1, 1, 1, 1], None)], "one by one, and yet a run that goes on is not to ask so"

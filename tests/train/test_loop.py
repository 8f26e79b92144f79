"""The loop as a whole: only the projector moves, any split gives the same curve, a killed run is the same run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.train.kit import LORA, SETTINGS, Samples, dying_at, load_model, make_plan
from tests.train.runs import curve, finish, kill_after, metrics
from tests.writing import held, no_room
from torch import nn

from vzip.errors import CheckpointError, ConfigError, ImageError, RunExistsError, RunWriteError
from vzip.models.weights.digests import write_digests
from vzip.models.weights.tuned import read_tensors
from vzip.train import stepping
from vzip.train.checkpoint import CheckpointStore
from vzip.train.loop import hold_out, prepare, train
from vzip.train.objective import AnswerLoss
from vzip.train.stepping import DivergedError


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "tuned.safetensors")


def test_only_the_projector_moves(plan: Any) -> None:
    loaded: list[Any] = []

    def load(precision: str) -> Any:
        loaded.append(load_model())
        return loaded[-1]

    before = {name: tensor.clone() for name, tensor in load_model().model.state_dict().items()}
    final = train(plan(load_model=load))
    after = loaded[0].model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    projector = {name for name in before if "multi_modal_projector" in name}
    assert moved == projector and len(projector) == 4
    assert set(weights(final)) == projector
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(final).items())
    header = json.loads((final / "tuned.json").read_text())
    assert (header["step"], header["parts"], header["num_parameters"]) == (6, ["projector"], 32 * 32 * 2 + 64)
    assert "num_dominant=6, num_contextual=3" in header["compressor"] and header["base"]["model_class"]
    assert header["num_processes"] == 1 and header["hardware"]["cpu"] and isinstance(header["hardware"]["gpus"], list)


def test_the_log_says_where_a_steps_time_goes(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves one second whenever something is done tells the parts apart."""
    now = [0.0]
    monkeypatch.setattr(stepping.time, "perf_counter", lambda: now[0])

    def takes(seconds: float, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return function(*args, **kwargs)

        return timed

    monkeypatch.setattr(Samples, "__getitem__", takes(0.001, Samples.__getitem__))
    monkeypatch.setattr(stepping.Stepper, "_refuse_infinite", takes(0.1, stepping.Stepper._refuse_infinite))
    monkeypatch.setattr("accelerate.Accelerator.backward", takes(1.0, accelerate.Accelerator.backward))
    clips = accelerate.Accelerator.clip_grad_norm_
    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", takes(10.0, clips))
    final = train(plan(batch_size=4, samples_per_step=8, num_steps=2))  # two batches a step
    for row in metrics(final.parent):
        parts = tuple(row[f"{part}_ms"] for part in ("data", "forward", "backward", "update"))
        assert parts == (8, 200, 2000, 10_000)
        assert row["samples_per_s"] == round(8 / 12.208, 2)


def test_the_curve_is_that_of_a_plain_loop(plan: Any, tmp_path: Path) -> None:
    """A second way: torch's AdamW, one sample at a time, Hugging Face's own loss and scheduler."""
    from transformers import get_cosine_schedule_with_warmup

    setup = plan(batch_size=8)
    final = train(setup)
    data = Samples()
    schedule = stepping.StepSchedule(data, torch.arange(24).numpy(), SETTINGS, seed=0)
    vlm = load_model()
    for parameter in vlm.model.parameters():
        parameter.requires_grad_(False)
    trained = list(vlm.model.model.multi_modal_projector.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=SETTINGS.learning_rate, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * 6), 6)
    tokenizer: Any = vlm.processor.tokenizer  # type: ignore[union-attr]  # the tiny model has one
    for step, row in enumerate(metrics(setup.run_dir)):
        losses, count = [], 0
        for index in schedule[step]:
            sample = data[int(index)]
            for dialogue in sample.dialogues:
                prompt = f"USER: {dialogue[0].text} ASSISTANT:"
                ids = tokenizer(f"{prompt} {dialogue[1].text}</s>", return_tensors="pt").input_ids
                labels = ids.clone()
                labels[:, : len(tokenizer(prompt).input_ids)] = -100
                pixels = vlm.preprocess_images(sample.images) if sample.images else {}
                num = int((labels != -100).sum())
                losses.append(vlm(ids, labels=labels, **pixels).loss * num)
                count += num
        loss = torch.stack(losses).sum() / count
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, SETTINGS.max_grad_norm)
        assert row["learning_rate"] == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        assert (row["loss"], row["grad_norm"]) == (
            pytest.approx(loss.item(), rel=1e-5),
            pytest.approx(norm.item(), rel=1e-3),
        )
        assert row["num_target_tokens"] == count
        optimizer.step()
        scheduler.step()
    for name, tensor in weights(final).items():
        assert torch.allclose(tensor, vlm.model.state_dict()[name], atol=2e-4)


def test_any_accumulation_gives_the_same_curve(plan: Any) -> None:
    train(plan("whole", batch_size=8))
    train(plan("parts", batch_size=1, gradient_checkpointing=True, num_workers=1))
    whole, parts = curve(plan("whole").run_dir), curve(plan("parts").run_dir)
    assert len(whole) == 6 and len({row[0] for row in whole}) == 6
    for one, other in zip(whole, parts, strict=True):
        assert one == pytest.approx(other, rel=2e-4)


def test_killed_and_started_again_it_is_the_same_run(plan: Any) -> None:
    final = train(plan("whole"))
    for step in (1, 2, 3, 5):  # before any checkpoint, just after one, between two
        with dying_at(step):
            train(plan("cut"))
    run_dir = plan("cut").run_dir
    assert len(metrics(run_dir)) == 5 and sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "cut off by the cra')
    again = train(plan("cut"))
    assert curve(run_dir) == curve(plan("whole").run_dir)
    for name, tensor in weights(final).items():
        assert torch.equal(tensor, weights(again)[name])
    with pytest.raises(RunExistsError, match="finished"):
        train(plan("cut"))


def test_other_settings_do_not_go_on_from_a_checkpoint(plan: Any) -> None:
    setup = plan()
    store = CheckpointStore(setup.run_dir, 2, {"train": {"learning_rate": 1}})
    store.begin(overwrite=False)
    with pytest.raises(RunExistsError, match="other settings"):
        train(setup)
    train(dataclasses.replace(setup, overwrite=True))
    assert store.final.is_dir()


def test_a_diverged_loss_names_its_samples_and_keeps_the_weights(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = AnswerLoss.forward

    def broken(loss: AnswerLoss, batch: Any) -> torch.Tensor:
        first, *others = real(loss, batch)
        return torch.stack([first * float("nan"), *others])

    monkeypatch.setattr(AnswerLoss, "forward", broken)
    setup = plan(batch_size=2)
    with pytest.raises(DivergedError, match=r"the loss of 1 samples is not a finite number: s\d+\."):
        train(setup)
    assert metrics(setup.run_dir) == []


def test_validation_and_best(plan: Any) -> None:
    setup = plan(num_validation_samples=6, samples_per_step=6, batch_size=2, num_epochs=2)
    train(setup)
    rows = [row for row in metrics(setup.run_dir) if "validation_loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    best = json.loads((setup.run_dir / "best/tuned.json").read_text())
    assert best["validation_loss"] == min(row["validation_loss"] for row in rows)


def test_unreadable_images(plan: Any) -> None:
    broken = {"load_data": lambda: Samples(broken=3)}
    with pytest.raises(ImageError, match=r"sample s3: nowhere\.png: no such image file"):
        train(plan("refuse", **broken))
    train(plan("skip", skip_unreadable=True, **broken))
    rows = metrics(plan("skip").run_dir)
    assert sum(row["num_skipped"] for row in rows) == 2, "once in each epoch"


def test_answers_that_max_length_cuts_off_are_counted_and_named(plan: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A prompt with its image is 30 tokens long, from number 10 on 31."""
    setup = plan(max_length=31, num_epochs=1)
    train(setup)
    rows = metrics(setup.run_dir)
    silent = [number for number in range(10, 24) if Samples().has_images[number]]
    assert sum(row["num_skipped"] for row in rows) == len(silent) > 0
    assert all(row["num_target_tokens"] for row in rows)
    named = [message for message in caplog.messages if "train.max_length=31 leaves no target of an answer" in message]
    assert sorted(",".join(message.rpartition(": ")[2] for message in named).replace(" ", "").split(",")) == sorted(
        f"s{number}" for number in silent
    )


@pytest.mark.parametrize("strategy", ["step 1", "the validation set"])
def test_nothing_left_to_learn_is_refused(strategy: str, plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"max_length": 17}
    if strategy == "the validation set":
        # Only the samples held out have images, which leave no room for their answers.
        changes = {"max_length": 30, "num_validation_samples": 4, "samples_per_step": 4, "save_every": 1}
        held_out = set(hold_out(24, 4, 0)[1].tolist())
        pictures = np.array([number in held_out for number in range(24)])
        init = Samples.__init__
        monkeypatch.setattr(Samples, "__init__", lambda self: (init(self), setattr(self, "has_images", pictures))[0])
    with pytest.raises(ConfigError, match=rf"train\.max_length=\d\d: {strategy} has nothing left .*samples: s\d+, s"):
        train(plan(**changes))
    assert not (plan().run_dir / "final").exists()


def test_a_run_begun_under_another_launcher_is_refused_before_the_model_is_loaded(plan: Any) -> None:
    with dying_at(3):
        train(plan())
    with pytest.raises(RunExistsError, match=r"strategy=single on 1 .*cannot be read with .*strategy=zero2"):
        prepare(plan(strategy="zero2", load_model=None))
    # A checkpoint that does not say how it was written tells by what it holds.
    checkpoint = plan().run_dir / "checkpoints" / "step-00000002"
    header = json.loads((checkpoint / "tuned.json").read_text())
    del header["launcher"]
    (checkpoint / "tuned.json").write_text(json.dumps(header))
    (checkpoint / "deepspeed").mkdir()
    write_digests(checkpoint)
    with pytest.raises(RunExistsError, match="was written with DeepSpeed and cannot be read without it"):
        train(plan())
    (checkpoint / "deepspeed").rmdir()
    train(plan())


def test_conversations_longer_than_the_model_reads_are_refused(plan: Any) -> None:
    with pytest.raises(ConfigError, match=r"train\.max_length=4096: the language model reads 2048 tokens"):
        train(plan(max_length=4096))


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The system refuses to make a file longer: torch and safetensors meet it as they meet a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [4_000, 12_000], ids=["weights", "optimizer"])
def test_a_full_disk_while_saving_loses_nothing(num_bytes: int, plan: Any) -> None:
    setup = plan()
    with dying_at(3):
        train(setup)
    with (
        files_of_at_most(num_bytes),
        pytest.raises(CheckpointError, match="step-00000004: cannot be written"),
    ):
        train(setup)
    assert [p.name for p in (setup.run_dir / "checkpoints").iterdir()] == ["step-00000002"]
    train(setup)  # the same again: the disk has room now
    assert [row["step"] for row in metrics(setup.run_dir)] == [1, 2, 3, 4, 5, 6]


def test_batches_that_do_not_come_out_even(plan: Any) -> None:
    with pytest.raises(ConfigError, match=r"train\.samples_per_step=8 is not a multiple of launcher\.batch_size=3 x 1"):
        train(plan(batch_size=3))
    with pytest.raises(ConfigError, match="24 training samples are fewer than one step"):
        train(plan(samples_per_step=32))
    assert not plan().run_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "count", "lora"),
    [
        *((strategy, 1, None) for strategy in ("single", "zero2", "zero3")),
        *((strategy, 2, lora) for strategy in ("ddp", "zero2", "zero3") for lora in (None, LORA)),
    ],
    ids=lambda value: "lora" if value is LORA else str(value or "projector"),
)
def test_processes_give_the_curve_of_one_also_after_a_kill(strategy: str, count: int, lora: Any, plan: Any) -> None:
    changes = {"strategy": strategy, "num_processes": count, "batch_size": 2, "num_epochs": 4, "lora": lora}
    whole = plan("whole").run_dir
    finish(whole, count, **changes)
    if lora is None:
        train(plan("one", num_epochs=4))
        split = whole
    else:  # dropout draws by batch, so another split draws otherwise: compared without it
        plain = dataclasses.replace(lora, dropout=0.0)
        train(plan("one", num_epochs=4, lora=plain))
        split = plan("split").run_dir
        finish(split, count, **{**changes, "lora": plain})
    for one, other in zip(curve(plan("one").run_dir), curve(split), strict=True):
        assert one == pytest.approx(other, rel=2e-3)

    # Killed as soon as a checkpoint is there, and started again: the same bits as uninterrupted.
    cut = plan("cut").run_dir
    kill_after(cut, count, "step-00000002", **changes)
    finish(cut, count, **changes)
    assert curve(cut) == curve(whole)
    expected = read_tensors(whole / "final")
    assert len(expected) == (4 if lora is None else 12)
    for name, tensor in read_tensors(cut / "final").items():
        assert torch.equal(tensor, expected[name])


def test_gradients_agree_with_finite_differences_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    from vzip.data.collate import Collator
    from vzip.data.conversations import vicuna_v1
    from vzip.train.objective import AnswerLoss, ModelView

    # Hugging Face's norms compute in torch.float32 whatever the model is in; here that name means float64 too.
    monkeypatch.setattr(torch, "float32", torch.float64)
    vlm = load_model()
    collate = Collator(vlm.processor, ModelView(vlm), vicuna_v1, None, tiny.IMAGE_TOKEN, 200)
    batch = collate([Samples()[1], Samples()[7]])
    vlm.model.double()
    batch.images["pixel_values"] = batch.images["pixel_values"].double()
    objective = AnswerLoss(vlm)
    projector = vlm.adapter.projector
    objective(batch).sum().backward()
    for parameter in projector.parameters():
        assert parameter.grad is not None
        index = int(parameter.grad.abs().argmax())
        with torch.no_grad():
            values = []
            for shift in (1e-5, -1e-5):
                parameter.view(-1)[index] += shift
                values.append(objective(batch).sum().item())
                parameter.view(-1)[index] -= shift
        numeric = (values[0] - values[1]) / 2e-5
        assert parameter.grad.view(-1)[index].item() == pytest.approx(numeric, rel=1e-6)


def test_tf32_is_as_the_run_says(plan: Any) -> None:
    for name, tf32 in (("on", True), ("off", False)):
        train(plan(name, tf32=tf32, num_steps=1))
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
        assert json.loads((plan(name).run_dir / "train.json").read_text())["train"]["tf32"] is tf32


def test_a_directory_that_another_process_writes(plan: Any, tmp_path: Path) -> None:
    def load(precision: str) -> Any:
        raise AssertionError("refused before the model is loaded")

    for changes in ({}, {"overwrite": True}):
        with held(tmp_path / "run"), pytest.raises(RunExistsError, match="writes there at this moment"):
            train(plan(load_model=load, **changes))
        with held(tmp_path / "run"), pytest.raises(RunExistsError, match="writes there at this moment"):
            prepare(plan(**changes))  # what says it before several processes start
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".owner"]


def test_a_disk_that_is_full_at_the_beginning_blocks_nothing(plan: Any, tmp_path: Path) -> None:
    with no_room(), pytest.raises(RunWriteError, match=r"train\.json: cannot be written"):
        train(plan())
    train(plan())


@pytest.mark.parametrize("content", [b"", b'{"model": ', b"[1]", b"\xff"])
def test_a_damaged_beginning_is_named_or_of_no_account(plan: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.json").write_bytes(content)
    with dying_at(4):
        train(plan(save_every=2))
    (tmp_path / "run" / "train.json").write_bytes(content)
    with pytest.raises(RunExistsError, match=r"train\.json: damaged .* set overwrite=true"):
        train(plan(save_every=2))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_nan(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: torch.full_like(tensor, math.nan) for name, tensor in tensors.items()}, path)


def without_one(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


TUNED_FILES = ("tuned.safetensors", "tuned.json", "state.pt", "digests.json")
DAMAGES = [(name, damage) for name in TUNED_FILES for damage in (flip, cut_off, Path.unlink)]
DAMAGES += [(name, lambda path: path.write_bytes(b"")) for name in TUNED_FILES]
DAMAGES += [("tuned.safetensors", make_nan), ("tuned.safetensors", without_one)]
DAMAGES += [("digests.json", lambda path: path.write_text("[]")), ("digests.json", lambda path: path.write_text("{}"))]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after its first checkpoint."""
    run_dir = tmp_path_factory.mktemp("interrupted") / "run"
    with dying_at(3):
        train(make_plan(run_dir, save_every=2))
    return run_dir


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_not_gone_on_from(
    plan: Any, tmp_path: Path, interrupted: Path, name: str, damage: Any
) -> None:
    def load(precision: str) -> Any:
        raise AssertionError("refused before the model is loaded")

    shutil.copytree(interrupted, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "step-00000002" / name)
    with pytest.raises(CheckpointError, match=rf"step-00000002.*{name}"):
        train(plan(save_every=2, load_model=load))


@pytest.mark.parametrize("damage", [make_nan, without_one])
def test_a_checkpoint_that_is_wrong_with_right_digests(
    plan: Any, tmp_path: Path, interrupted: Path, damage: Any
) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    damage(checkpoint / "tuned.safetensors")
    write_digests(checkpoint)
    with pytest.raises(CheckpointError, match=r"step-00000002.*(NaN or infinity|no tensor)"):
        train(plan(save_every=2))

"""The parts of a training run: settings, order of samples, launcher, trainable parameters, tuned weights, collation."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.train.kit import LAUNCH, SETTINGS, Samples, load_model
from transformers import AutoModelForImageTextToText, get_cosine_schedule_with_warmup

import vzip
from vzip.bench.shapes import resolve
from vzip.cli.merge import merge
from vzip.data.collate import Collator, TrainingSample
from vzip.data.conversations import vicuna_v1
from vzip.data.llava_record import Turn
from vzip.data.llava_set import LlavaSet
from vzip.data.order import draw_steps, split_step
from vzip.errors import CheckpointError, ConfigError, ManifestError, MissingPackageError, PromptError
from vzip.models.splice import IGNORED_LABEL
from vzip.models.weights.tuned import apply_tuned, describe, save_tuned
from vzip.train.distributed import check_devices, deepspeed_config
from vzip.train.launch import LaunchError, launch_command, run_command
from vzip.train.objective import ModelView
from vzip.train.settings import learning_rate_factor
from vzip.train.trainable import choose_trainable, num_trainable, parameter_groups

SCRIPT = Path("train.py")


@pytest.mark.parametrize(("shape", "count"), [("llava15_7b", 20_979_712), ("llava15_13b", 31_467_520)])
def test_trainable_parameters_of_the_published_models(shape: str, count: int) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(resolve(shape).config)
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(vzip.TokenBudget(54, 10)))
    line = choose_trainable(vlm, SETTINGS, in_float32=False)
    assert num_trainable(vlm) == count and f"training {count:,} of" in line and f"(projector {count:,})" in line


def test_parts_and_their_rates() -> None:
    vlm = load_model()
    parts = ("projector", "language_model", "vision_tower")
    settings = dataclasses.replace(SETTINGS, parts=parts, tower_learning_rate=2e-6)
    choose_trainable(vlm, settings, in_float32=True)
    assert num_trainable(vlm) == sum(p.numel() for p in vlm.model.parameters())
    rest, tower = parameter_groups(vlm, settings)
    assert (rest["peak"], tower["peak"]) == (1e-2, 2e-6)
    assert sum(p.numel() for p in tower["params"]) == sum(p.numel() for p in vlm.adapter.vision_tower.parameters())
    with pytest.raises(ConfigError, match="leaves the vision tower frozen"):
        dataclasses.replace(SETTINGS, tower_learning_rate=1e-6)


def test_a_trained_tower_learns_through_kept_and_merged_tokens() -> None:
    vlm = load_model()
    pixels = tiny.pixels(1).requires_grad_(True)
    (image,) = vlm.encode_images(pixels)
    for token in (0, len(image) - 1):  # CLS, kept as it is; the last contextual token, merged from many
        (gradient,) = torch.autograd.grad(image[token].sum(), pixels, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_a_half_precision_model_trains_a_float32_projector() -> None:
    vlm = load_model()
    vlm.model.to(torch.bfloat16)
    choose_trainable(vlm, SETTINGS, in_float32=True)
    kinds = {name: p.dtype for name, p in vlm.model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "projector" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "projector" not in name} == {torch.bfloat16}


def test_a_projector_begun_anew() -> None:
    vlm = load_model()
    before = [p.clone() for p in vlm.adapter.projector.parameters()]
    choose_trainable(vlm, dataclasses.replace(SETTINGS, reset_projector=True), in_float32=True)
    assert all(not torch.equal(a, b) for a, b in zip(before, vlm.adapter.projector.parameters(), strict=True))


@pytest.mark.parametrize(("num_steps", "warmup"), [(520, 0.03), (10, 0.0), (7, 0.5), (1, 0.03)])
def test_learning_rate(num_steps: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(warmup * num_steps), num_steps)
    for step in range(num_steps):
        assert learning_rate_factor(step, num_steps, warmup) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_order_of_samples() -> None:
    lengths, images = np.random.RandomState(1).randint(1, 99, 103), np.arange(103) % 3 != 0
    steps = draw_steps(lengths, images, 8, seed=3, epoch=1)
    assert steps.shape == (12, 8) and len(np.unique(steps)) == 96, "each sample once; seven that make no step are left"
    mixed = [step for step in steps if len(set(images[step])) == 2]
    assert len(mixed) <= 1, "only the remainders of both kinds share a step"
    assert all((np.diff(lengths[step]) <= 0).all() for step in steps)
    assert (steps == draw_steps(lengths, images, 8, seed=3, epoch=1)).all()
    for other in ({"seed": 4, "epoch": 1}, {"seed": 3, "epoch": 2}):
        assert (steps != draw_steps(lengths, images, 8, **other)).any()
    # However a step is split, its samples are the same, and every process has as many.
    for size, count in ((8, 1), (2, 2), (1, 8), (4, 2)):
        shares = [split_step(steps[0], size, rank, count) for rank in range(count)]
        assert {len(share) for share in shares} == {8 // size // count}
        assert sorted(np.concatenate([batch for share in shares for batch in share])) == sorted(steps[0])


def test_launch_commands() -> None:
    launch = dataclasses.replace(LAUNCH, num_processes=8, strategy="ddp")
    start = [sys.executable, "-m", "vzip.train.torchrun", "--nproc_per_node=8"]
    assert launch_command(LAUNCH, SCRIPT, ["a=b"], {}) is None
    assert launch_command(launch, SCRIPT, ["a=b"], {"RANK": "3"}) is None, "this is one of the processes already"
    assert launch_command(launch, SCRIPT, ["a=b"], {}) == [*start, "--standalone", "train.py", "a=b"]
    many = dataclasses.replace(launch, num_machines=None)
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "n[1-4]", "MASTER_ADDR": "n1"}
    words = ["--nnodes=4", "--node_rank=2", "--master_addr=n1", "--master_port=29511"]
    assert launch_command(many, SCRIPT, [], slurm) == [*start, *words, "train.py"]
    with pytest.raises(ConfigError, match="SLURM_NNODES, SLURM_NODEID, SLURM_JOB_NODELIST not set"):
        launch_command(many, SCRIPT, [], {})
    with pytest.raises(ConfigError, match="SLURM gave 4 machines"):
        launch_command(dataclasses.replace(launch, num_machines=2), SCRIPT, [], slurm)
    run_command([sys.executable, "-c", ""])
    with pytest.raises(LaunchError, match="ended with code 3"):
        run_command([sys.executable, "-c", "raise SystemExit(3)"])


def test_an_interruption_is_handed_on_once_and_the_child_has_the_last_word(tmp_path: Path) -> None:
    child = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job may have been told to ignore it
try:
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # longer than subprocess.run would wait before it kills
    pathlib.Path(sys.argv[1]).write_text("kept")
"""

    def interrupt() -> None:
        while not (tmp_path / "there").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run_command([sys.executable, "-c", child, str(tmp_path / "there")])
    assert (tmp_path / "there").read_text() == "kept"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_more_devices_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"launcher\.num_processes=4096: this machine has \d+ CPU cores"):
        check_devices(dataclasses.replace(LAUNCH, num_processes=4096))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"launcher\.device=cuda: this machine has no CUDA device"):
        check_devices(dataclasses.replace(LAUNCH, device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="this machine has 2 CUDA devices"):
        check_devices(dataclasses.replace(LAUNCH, device="auto", num_processes=8))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingPackageError, match=r"launcher\.strategy=zero2 needs the package deepspeed"):
        check_devices(dataclasses.replace(LAUNCH, device="cpu", strategy="zero2"))


def test_what_deepspeed_compiles_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("deepspeed")
    logging.getLogger("vzip").propagate = True
    launch = dataclasses.replace(LAUNCH, device="cpu", strategy="zero2")
    lock = tmp_path / "py311_cpu/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    (tmp_path / "ninja").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    check_devices(launch)  # an environment that is not activated: found beside its interpreter
    assert not caplog.text
    lock.touch()  # as a killed compiler leaves it
    check_devices(launch)
    assert f"{lock}: DeepSpeed is being compiled" in caplog.text
    (tmp_path / "ninja").unlink()
    with pytest.raises(MissingPackageError, match="package ninja, which is not installed"):
        check_devices(launch)


def test_deepspeed_is_told_everything_that_matters() -> None:
    settings = dataclasses.replace(SETTINGS, precision="bfloat16", max_grad_norm=None)
    config = deepspeed_config(settings, dataclasses.replace(LAUNCH, strategy="zero3"), accumulation=2)
    assert config["gradient_clipping"] == 0.0, "its own default clips at 1"
    assert (config["zero_optimization"]["stage"], config["bf16"]["enabled"]) == (3, True)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 2)


@pytest.fixture
def tuned(tmp_path: Path) -> tuple[Any, Path, dict[str, torch.Tensor]]:
    """A model, and tuned weights for it in a directory."""
    vlm = load_model()
    names = [name for name, _ in vlm.model.named_parameters() if "multi_modal_projector" in name]
    tensors = {name: torch.randn_like(vlm.model.get_parameter(name)) for name in names}
    header = describe(vlm.adapter, vlm.compressor, "a/base", "main", ["projector"])
    save_tuned(tmp_path / "final", tensors, {**header, "step": 7, "commit": None})
    return vlm, tmp_path / "final", tensors


def test_tuned_weights_come_back(tuned: Any, caplog: pytest.LogCaptureFixture) -> None:
    vlm, directory, tensors = tuned
    logging.getLogger("vzip").propagate = True
    vlm.model.to(torch.bfloat16)  # known again in another precision
    header = apply_tuned(vlm.adapter, vlm.compressor, directory)
    assert header["step"] == 7 and header["num_parameters"] == 32 * 32 * 2 + 64 and not caplog.text
    for name, tensor in tensors.items():
        assert torch.equal(vlm.model.get_parameter(name), tensor.bfloat16())
    other = vzip.VisionZip(vzip.TokenBudget(4, 2))
    apply_tuned(vlm.adapter, other, directory)
    assert "num_dominant=6, num_contextual=3" in caplog.text and "num_dominant=4, num_contextual=2" in caplog.text


def test_tuned_weights_of_another_base_or_damaged(tuned: Any, tmp_path: Path) -> None:
    vlm, directory, _ = tuned
    for model in (tiny.llava(vocab_size=len(vlm.processor.tokenizer), seed=5), tiny.llava_next(), tiny.llava("siglip")):
        stranger = vzip.CompressedVlm(model, vzip.Identity())
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(CheckpointError, match=r"tuned from a/base \(revision main, LlavaForConditionalGeneration"):
            apply_tuned(stranger.adapter, stranger.compressor, directory)
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    weights = directory / "tuned.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    with pytest.raises(CheckpointError, match="damaged"):
        apply_tuned(vlm.adapter, vlm.compressor, directory)
    (directory / "tuned.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable"):
        apply_tuned(vlm.adapter, vlm.compressor, directory)
    with pytest.raises(CheckpointError, match="It must be a directory that `python train"):
        apply_tuned(vlm.adapter, vlm.compressor, tmp_path)


def test_merged_it_is_a_plain_checkpoint(tuned: Any, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    vlm, directory, tensors = tuned
    vlm.model.save_pretrained(tmp_path / "base")
    vlm.processor.save_pretrained(tmp_path / "base")
    merge(directory, tmp_path / "merged", str(tmp_path / "base"))
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    for name, parameter in vlm.model.named_parameters():
        assert torch.equal(stock.get_parameter(name), tensors.get(name, parameter))
    loaded = vzip.load_vlm(tmp_path / "base", compressor=vlm.compressor, projector=directory)
    merged = vzip.load_vlm(tmp_path / "merged", compressor=vlm.compressor)
    pixels = tiny.pixels(1)
    assert torch.equal(loaded.encode_images(pixels)[0], merged.encode_images(pixels)[0])
    with pytest.raises(CheckpointError, match="exists already"):
        merge(directory, tmp_path / "merged", str(tmp_path / "base"))


def collator(vlm: Any, max_length: int = 200) -> Collator:
    return Collator(vlm.processor, ModelView(vlm), vicuna_v1, None, tiny.IMAGE_TOKEN, max_length)


def test_a_batch(tmp_path: Path) -> None:
    vlm = load_model()
    batch = collator(vlm)([Samples()[7], Samples()[5], Samples()[1]])  # asked twice; text only; asked once
    assert batch.ids == ["s7", "s5", "s1"] and batch.sample_of == [0, 0, 1, 2]
    assert batch.images["pixel_values"].shape == (2, 3, 112, 112), "each image once"
    assert batch.image_of == [0, 0, 1] and batch.num_visual_tokens == [9, 9]
    assert batch.num_targets == int((batch.labels[:, 1:] != IGNORED_LABEL).sum()) == 2 * (8 + 2) + 6 + 2 + 2 + 2
    assert (batch.input_ids[batch.labels != IGNORED_LABEL] == batch.labels[batch.labels != IGNORED_LABEL]).all()


def test_an_image_that_does_not_fit_goes_whole() -> None:
    vlm = load_model()
    length = len("USER: ") + 1 + 9 - 1  # the image's last visual token would be one too many
    batch = collator(vlm, max_length=length - 1)([Samples()[1]])
    assert batch.image_of == [] and tiny.IMAGE_TOKEN not in batch.input_ids and batch.num_targets == 0


def test_placeholders_and_images_must_match() -> None:
    picture = Image.new("RGB", (20, 20))
    sample = TrainingSample("s", [picture, picture], [[Turn("user", "<image>\na"), Turn("assistant", "b")]])
    with pytest.raises(PromptError, match="sample s: 1 <image> placeholders but 2 images"):
        collator(load_model())([sample])


def test_a_part_of_a_llava_file(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "no"}]
    records = [{"id": f"r{i}", "image": f"p{i}.png", "conversations": turns} for i in range(6)]
    text = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "you"}]
    records.append({"id": "t", "conversations": text})
    (tmp_path / "data.json").write_text(json.dumps(records))
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"p{i}.png")
    (tmp_path / "p5.png").touch()
    options: dict[str, Any] = {"cache": tmp_path / "cache"}
    with pytest.raises(ManifestError, match="2 samples lack an image below") as refused:
        LlavaSet(tmp_path / "data.json", **options)
    assert f"r4: no such file: {tmp_path / 'p4.png'}" in str(refused.value)
    assert f"r5: 0 bytes: {tmp_path / 'p5.png'}" in str(refused.value) and "data.on_problem=skip" in str(refused.value)
    data = LlavaSet(tmp_path / "data.json", on_problem="skip", **options)
    assert len(data) == 5 and data.num_missing == 2 and "left out: 2 samples" in data.describe()
    assert data.has_images.tolist() == [True] * 4 + [False] and data.lengths.tolist() == [3, 3, 3, 3, 2]
    assert data[0].images == [tmp_path / "p0.png"] and [turn.text for turn in data[4].dialogues[0]] == ["hello", "you"]
    assert len(LlavaSet(tmp_path / "data.json", on_problem="skip", keep_text_only=False, **options)) == 4

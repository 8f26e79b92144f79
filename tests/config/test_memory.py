"""``python -m vzip memory``: what the overrides come to, what is printed, what is refused; nothing is loaded for it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.bench.memory.conftest import wide_shape
from transformers import PreTrainedModel

from vzip import cli
from vzip.bench.memory.live_bytes import CACHE, GRADIENTS, OPTIMIZER, WEIGHTS
from vzip.config.memory_plan import estimate, measure, memory_plan
from vzip.config.options import config_dir, options

GIB = 2**30
TRAINING = [
    "model=llava_local",
    "budget.num_dominant=6",
    "budget.num_contextual=3",
    "data=llava_json",
    "data.json=nowhere.json",
    "train=projector",
    "train.precision=float32",
    "launcher.device=cpu",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA's configuration, without weights."""
    path = tmp_path_factory.mktemp("model")
    tiny.llava().config.save_pretrained(path)
    return path


@pytest.fixture
def words(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A training of it; reading weights fails."""

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", read)
    monkeypatch.setenv("COLUMNS", "200")
    return [*TRAINING, f"model.name_or_path={directory}"]


def rows(shown: str) -> dict[str, float]:
    """The table's rows."""
    return {name.strip(): float(gib) for name, gib in re.findall(r"│ ([a-z -]+?) +│ +([\d.]+) │", shown)}


def test_the_breakdown_of_a_training(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", *words, "--device-gib", "24"]) == 0
    shown = capsys.readouterr().out
    assert "4 conversations of 2048 tokens (9 of them visual) on each of 1 devices" in shown
    assert "gradient checkpointing off" in shown
    table = rows(shown)
    assert set(table) == {WEIGHTS, GRADIENTS, OPTIMIZER, "activations", CACHE, "total"}
    assert table["total"] == pytest.approx(sum(table.values()) - table["total"], abs=0.003) and table[CACHE] == 0
    assert f"24 GiB a device: fits, {24 - table['total']:.1f} GiB to spare" in shown
    assert cli.main(["memory", *words, "--device-gib", "0.001", "--length", "64"]) == 1
    assert "64 tokens" in (small := capsys.readouterr().out) and "does not fit" in small


def test_the_breakdown_of_an_inference(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", *words, "--inference", "eval.batch_size=3", "--new-tokens", "5"]) == 0
    assert "3 prompts of 265 tokens (9 of them visual), 5 new tokens each" in capsys.readouterr().out
    plan = memory_plan([*words, "model.dtype=bfloat16"], inference=True, length=500)
    assert plan.load.num_new_tokens == 128
    peak = estimate(plan)
    assert set(peak) <= {WEIGHTS, "activations", CACHE}
    assert peak[WEIGHTS] == pytest.approx(sum(p.nbytes for p in tiny.llava().parameters()) / 2, rel=0.05)


@pytest.mark.whole
def test_the_batch_that_fits_a_device(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*words, "--inference", "eval.batch_size=auto"]
    plans = (memory_plan([*words, f"eval.batch_size={size}"], inference=True) for size in (64, 1))
    whole, one = (estimate(plan).total() for plan in plans)
    assert cli.main(["memory", *asked, "--device-gib", str(1.01 * whole / 2**30)]) == 0
    assert "64 prompts of 265 tokens" in capsys.readouterr().out
    assert cli.main(["memory", *asked, "--device-gib", str(0.6 * whole / 2**30)]) == 0
    assert "32 prompts of 265 tokens" in capsys.readouterr().out
    assert cli.main(["memory", *asked, "--device-gib", str(0.9 * one / 2**30)]) == 1
    assert "1 prompts of 265 tokens" in capsys.readouterr().out
    assert cli.main(["memory", *asked]) == 2
    assert "Add --device-gib" in capsys.readouterr().err


def test_the_launcher_says_how_many_share(words: list[str]) -> None:
    plan = memory_plan([*words, "launcher=zero2_8gpu", "launcher.batch_size=2", "launcher.device=cuda"])
    assert (plan.num_processes, plan.launch.device, plan.load.num_images) == (8, "cuda", 2)
    assert memory_plan([*words, "launcher.num_processes=8", "launcher.num_machines=4"]).num_processes == 32


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--length", "9999"], "conversations are cut at train.max_length=2048"),
        (["--length", "10"], "has 9 visual tokens, and at least 3 of text are needed"),
        (["--new-tokens", "5"], "a training generates none"),
        (["--length", "0"], "--length=0: must be 1 or more"),
        (
            ["model=llava15_7b", "model.name_or_path=llava-hf/llava-1.5-7b-hf", "model.quantization=4bit", "--measure"],
            "so it must be here",
        ),
        (["launcher.num_processes=2", "--measure"], "only a single process is measured"),
        (["launcher.device=cuda", "--measure"], "this machine has no CUDA device"),
        (["train.samples_per_step=3"], "is not a multiple of launcher.batch_size=4"),
        (["model.adapter_path=lora"], "no such directory"),
        (["budget.num_dominant=600"], "65"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one case needs a machine without CUDA")
def test_what_cannot_be_told_is_refused(
    words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["memory", *words, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.slow
def test_the_built_in_model_measured() -> None:
    plan = memory_plan(["+exp=tiny_64tok", "data.num_questions=2", "launcher.batch_size=1"], length=80)
    assert plan.load.num_dialogues == 2
    assert estimate(plan).total() == pytest.approx(measure(plan), rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_models_measured(quantization: str, tmp_path: Path) -> None:
    shape = wide_shape()
    shape.config.text_config.num_hidden_layers = shape.config.vision_config.num_hidden_layers = 2
    shape.with_random_weights(torch.device("cpu"), torch.bfloat16).model.save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    model = ["model=llava_local", f"model.name_or_path={tmp_path}", f"model.quantization={quantization}"]
    on_cpu = ["launcher=inline", "launcher.device=cpu", "launcher.batch_size=1", "train.samples_per_step=2"]
    training = [*model, "budget=64tok", *TRAINING[3:6], "launcher.gradient_checkpointing=true", *on_cpu]
    plans = (
        memory_plan(training, length=200),
        memory_plan([*training, "model.dtype=bfloat16"], inference=True, length=200, num_new_tokens=3),
    )
    for plan in plans:
        assert estimate(plan).total() == pytest.approx(measure(plan), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in options(config_dir(), "model") if name not in ("llava_local", "tiny")]
)
def test_every_model_trains_and_answers_on_the_meta_device(name: str, words: list[str]) -> None:
    model = [f"model={name}", *TRAINING[3:], "budget=17tok", "train.precision=bfloat16", "eval.batch_size=1"]
    trained = estimate(memory_plan([*model, "launcher=single_24gb"], length=400))
    answered = estimate(memory_plan(model, inference=True))
    assert 0.9 * trained[WEIGHTS] < answered[WEIGHTS] <= 1.1 * trained[WEIGHTS]
    assert trained.total() > answered.total() > 12 * GIB


@pytest.mark.slow
def test_single_24gb_fits(words: list[str]) -> None:
    seven = estimate(memory_plan(["+exp=llava15_7b_64tok", "launcher=single_24gb"]))
    thirteen = estimate(memory_plan(["+exp=llava15_13b_64tok", "launcher=single_24gb", "model.quantization=4bit"]))
    # A GeForce 3090 has 24 GiB, of which CUDA takes half a one.
    assert thirteen.total() < seven.total() < 23 * GIB
    # 20 979 712 parameters: a gradient and two moments in float32.
    assert seven[GRADIENTS] == 4 * 20_979_712
    assert 0 <= seven[OPTIMIZER] - 8 * 20_979_712 < 64

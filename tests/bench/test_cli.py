"""The command: bad words, files, and what it may import."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import make_random_model
from tests.writing import held

import vzip
from vzip.bench import shapes
from vzip.bench.settings import KEYS, MEMORY, SHAPE_NAMES, BenchSettings, parse
from vzip.cli import bench as cli
from vzip.errors import CheckpointError, ConfigError, RunExistsError
from vzip.methods import budgets, method_files


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.main(parser.parse_args(list(words)))


def test_every_key_is_documented() -> None:
    assert set(KEYS) == set(BenchSettings.__dataclass_fields__) - {"method_settings"}
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert parser.epilog is not None
    for name, described in KEYS.items():
        assert f"  {name} [" in parser.epilog and described.sentence.split()[0] in parser.epilog


def test_values_are_read() -> None:
    s = parse(["model=llava15_7b", "budget=54+10", "methods=vzip,vanilla", "num_crops=5", "overwrite=true"])
    assert (s.model, s.budget, s.methods, s.num_crops, s.overwrite) == (
        "llava15_7b",
        "54+10",
        ("vzip", "vanilla"),
        5,
        True,
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("compressor=fastvlm", "(did you mean 'fastervlm'?)"),
        ("compressor=none", "all tokens: methods=vanilla"),
        ("batchsize=2", "unknown key 'batchsize' (did you mean 'batch_size'?)"),
        ("budget", "'budget' is not of the form key=value"),
        ("budget=64", "did you mean '64tok'?"),
        ("budget=full", "methods=vanilla"),
        ("budget=0+0", "keeps no visual token"),
        ("budget=1.5+2", "budget=1.5+2: must be"),
        ("budget=1.5+0.2", "budget.dominant=1.5: must be a fraction kept"),
        ("budget=-1+2", "budget=-1+2: must be"),
        ("dtype=fp16", "did you mean 'float16'?"),
        ("device=tpu", "must be auto, cpu, cuda or cuda:N"),
        ("device=cuda:99", "CUDA devices"),
        ("repeats=0", "repeats=0: must be a whole number, 1 or more"),
        ("num_crops=two", "num_crops=two"),
        ("warmup=-1", "warmup=-1"),
        (
            "methods=vzip,eager",
            "methods=eager: must be one of vanilla, vzip, eager_maps, dart, fastv, pyramiddrop, sparsevlm,"
            " sparsevlm_v10, sparsevlm_v20, vscan_stage2, compiled (did you mean 'eager_maps'?)",
        ),
        ("weights=randm", "did you mean 'random'?"),
        ("overwrite=yes", "must be true or false"),
        ("out=", "out=: must be a directory"),
        ("compressor.merge_rul=mean", "compressor=visionzip has no such setting (did you mean 'merge_rule'?); it has:"),
        ("compressor.merge_rule=max", "merge_rule='max': must be one of sum, mean"),
        ("compressor.merge_rule=[", "compressor.merge_rule=[: cannot be read as YAML"),
        ("pruner=fastw", "did you mean 'fastv'?"),
        ("pruner.K=3", "pruner.K: pruner=none has no settings; add pruner=NAME, one of dart, fastv, "),
        ("model=llava15_7", "did you mean 'llava15_7b'?"),
    ],
)
def test_bad_word(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse([word])
    assert message in str(error.value)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse(["repeat=3", "dtype=half", "budget=1:2", "seed=1", "seed=2"])
    message = str(error.value)
    assert message.startswith("4 problems")
    for part in ("'repeat'", "dtype=half", "budget=1:2", "seed is given twice"):
        assert part in message


def test_a_pruner_is_one_of_the_methods() -> None:
    words = ["pruner=fastv", "pruner.K=3", "pruner.keep=166"]
    implied, named = parse(words), parse(["methods=vanilla,fastv", *words[1:]])
    assert implied.methods == ("vanilla", "vzip", "eager_maps", "fastv") and named.methods == ("vanilla", "fastv")
    assert implied.built_pruner() == named.built_pruner() == vzip.FastV(3, 166)
    assert parse([]).built_pruner() is None and "fastv" not in parse([]).methods
    for contrary in (["methods=vanilla", "pruner=fastv"], ["methods=fastv", "pruner=none"]):
        with pytest.raises(ConfigError, match="the pruner must be one of the methods"):
            parse(contrary)


def test_settings_of_the_compressor() -> None:
    model = shapes.resolve("llava15_7b")
    assert parse(["compressor.merge_rule=mean"]).method(model) == vzip.VisionZip(vzip.TokenBudget(54, 10), "mean")
    assert parse(["compressor.score=key_norms"]).methods == ("vanilla", "vzip"), "not what eager_maps computes"
    with pytest.raises(ConfigError, match=r"leave it out with compressor=visionzip_score-key_norms"):
        parse(["compressor.score=key_norms", "methods=vzip,eager_maps"])


def test_budgets_are_those_of_the_configuration_and_any_number_of_tokens() -> None:
    model = shapes.resolve("llava15_7b")
    assert parse(["budget=17tok"]).token_budget(model) == ("17tok", vzip.TokenBudget(14, 3))
    assert list(budgets()) == ["192tok", "128tok", "64tok", "32tok", "17tok"]
    settings = parse(["budget=48tok", "model=llava15_7b", "device=cpu"])
    assert settings.token_budget(model) == ("48tok", vzip.TokenBudget(40, 8))
    assert settings.out_directory().name == "vzip-48tok-float32-cpu"
    with pytest.raises(ConfigError, match=r"budget=48: must be auto, one of 192tok"):
        parse(["budget=48"])


def test_budgets_in_fractions_and_of_whole_videos() -> None:
    model = shapes.resolve("qwen2_5_vl_3b")
    words = ["budget=fraction", "budget.dominant=0.65", "budget.contextual=0.05"]
    for given in (words, ["budget=0.65+0.05"]):
        settings = parse([*given, "budget.scope=video", "model=qwen2_5_vl_3b", "device=cpu"])
        budget = vzip.FractionBudget(0.65, 0.05, "video")
        assert settings.token_budget(model) == ("0.65+0.05_scope-video", budget)
        assert settings.method(model).budget == budget
        assert settings.out_directory().name == "vzip-0.65+0.05_scope-video-float32-cpu"
    assert parse(["budget=64tok", "budget.scope=video"]).token_budget(model)[1] == vzip.TokenBudget(54, 10, "video")
    for wrong, message in (
        (["budget.scope=clip"], "budget.scope=clip: must be one of crop, video"),
        (["budget.scop=video"], "unknown key 'budget.scop' (did you mean 'scope'?)"),
        (words[:2], "budget=fraction: needs fractions"),
        ([*words[:2], "budget.contextual=5"], "budget=fraction: needs fractions"),
        (words[1:], "budget.contextual: goes with budget=fraction alone"),
        (["budget=0.9+0.2"], "together they must be above 0 and at most 1"),
    ):
        with pytest.raises(ConfigError) as error:
            parse(wrong)
        assert message in str(error.value)


def test_what_fractions_keep_of_a_video_is_measured(tmp_path: Path) -> None:
    make_random_model.save("qwen2_5_vl", tmp_path / "model")
    words = ["budget=fraction", "budget.dominant=0.25", "budget.contextual=0.125", "budget.scope=video", "num_crops=2"]
    fast = ["repeats=1", "warmup=0", "num_new_tokens=1", "methods=vanilla,vzip"]
    assert run(f"model={tmp_path / 'model'}", *words, *fast, f"out={tmp_path / 'out'}") == 0
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (written["resolved"]["dominant"], written["resolved"]["scope"]) == (0.25, "video")
    vanilla, ours = (written["methods"][name]["num_visual_tokens"] for name in ("vanilla", "vzip"))
    assert ours == vanilla // 4 + vanilla // 8


def test_the_names_of_shapes_are_known_without_them() -> None:
    assert sorted(SHAPE_NAMES) == sorted(shapes.SHAPES)


def test_each_measurement_has_a_folder_of_its_own() -> None:
    given = {
        "": "vzip-64tok",
        "methods=eager_maps,vzip,vanilla": "vzip-64tok",
        "methods=vzip": "vzip-only-vzip-64tok",
        "compressor=fastervlm": "vzip-fastervlm-64tok",
        "compressor.merge_rule=mean": "vzip-visionzip_merge_rule-mean-64tok",
        "pruner=fastv": "vzip-fastv-64tok",
        "methods=vanilla,fastv": "vzip-fastv-only-vanilla+fastv-64tok",
        "pruner=fastv pruner.keep=166": "vzip-fastv_keep-166-64tok",
        "budget=12+4": "vzip-12+4",
    }
    for words, folder in given.items():
        settings = parse(["model=llava15_7b", "device=cpu", *words.split()])
        assert str(settings.out_directory()) == f"runs/bench/llava15_7b/{folder}-float32-cpu"
    settings = parse(["model=llava15_7b", "device=cpu"], MEMORY)
    assert str(settings.out_directory(MEMORY)) == "runs/bench/llava15_7b/memory-64tok-float32-cpu"


def test_budget_larger_than_the_tower(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="65"):
        run(f"model={checkpoint}", "budget=64+10", f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_whole_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        f"model={checkpoint}",
        "budget=12+4",
        "device=cpu",
        "repeats=2",
        "warmup=0",
        "num_crops=2",
        f"out={tmp_path}",
    ]
    assert run(*words) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert result["schema_version"] == 1
    assert set(result["environment"]["code"]) == {"commit", "dirty", "source_sha256"} and result["environment"]["time"]
    assert {
        "model",
        "settings",
        "resolved",
        "environment",
        "agreement",
        "methods",
        "ratios",
        "conventions",
        "notes",
    } <= set(result)
    assert list(result["methods"]) == ["vanilla", "vzip", "eager_maps"]
    for name, method in result["methods"].items():
        assert method["num_visual_tokens"] == 2 * (64 if name == "vanilla" else 16)
        assert method["kv_cache_bytes"] == method["kv_cache_formula_bytes"] > 0
        assert method["peak_memory_bytes"] >= method["peak_memory_added_bytes"]
        assert all(len(stage["samples_ms"]) == 2 for stage in method["stages"].values())
        for stage in method["flops"].values():
            assert stage["formula"] in (None, stage["counted"])
    vzip, maps = result["methods"]["vzip"], result["methods"]["eager_maps"]

    def medians(method: dict, *stages: str) -> float:
        return sum(method["stages"][stage]["median_ms"] for stage in stages)

    ratios = result["ratios"]
    assert ratios["tower_and_selection_speedup_over_eager_maps"] == pytest.approx(
        medians(maps, "tower", "selection") / medians(vzip, "tower", "selection")
    )
    assert ratios["selection_share_of_tower"] == pytest.approx(
        medians(vzip, "selection", "scoring") / (medians(vzip, "tower") - medians(vzip, "scoring"))
    )
    assert ratios["kv_cache_reduction_over_vanilla"] == pytest.approx((7 + 53 + 128) / (7 + 53 + 32))
    assert result["resolved"]["weights"] == "pretrained" and result["settings"]["prompt_tokens"] == 60
    printed = capsys.readouterr().out
    for word in ("vanilla", "eager_maps", "prefill", "KV cache", "closed formula", "resident memory"):
        assert word in printed
    with pytest.raises(RunExistsError, match="overwrite=true"):
        run(*words)
    assert run(*words, "overwrite=true", "methods=vzip") == 0
    assert list(json.loads((tmp_path / "bench.json").read_text())["methods"]) == ["vzip"]


def test_no_plot_without_matplotlib(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(f"model={checkpoint}", "budget=12+4", "repeats=1", "warmup=0", "methods=vzip", f"out={tmp_path}") == 0
    assert (tmp_path / "bench.json").exists() and not (tmp_path / "bench.png").exists()
    assert "no plot" in capsys.readouterr().out


@pytest.mark.whole
def test_needs_torch_and_transformers_alone(checkpoint: Path, tmp_path: Path) -> None:
    """Runs where nothing else of the project's dependencies can be imported."""
    program = """
import sys
for name in ("hydra", "omegaconf", "datasets", "lmms_eval", "wandb", "deepspeed", "peft", "matplotlib"):
    sys.modules[name] = None
import argparse
from vzip.cli import bench as cli
parser = argparse.ArgumentParser()
cli.add_arguments(parser)
sys.exit(cli.main(parser.parse_args(sys.argv[1:])))
"""
    words = [f"model={checkpoint}", "weights=random", "budget=12+4", "repeats=1", "warmup=0", f"out={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "bench.json").read_text())["resolved"]["weights"] == "random"


@pytest.mark.parametrize("name", [name for name, file in method_files().items() if file.has_budget])
def test_every_method_of_the_configuration_is_measured(name: str, checkpoint: Path, tmp_path: Path) -> None:
    words = [f"model={checkpoint}", f"compressor={name}", "budget=12+4", "device=cpu", "repeats=1", "warmup=0"]
    words += ["num_new_tokens=1", f"out={tmp_path}"]
    if name == "cdpruner":  # what it reads the question by is a checkpoint of the hub
        with pytest.raises(CheckpointError, match=r"compressor.text_encoder=openai/.*text_encoder=DIR"):
            run(*words)
        words.append("compressor.text_encoder=null")
    if name == "vscan":  # its windows are read at layer 6; this tower has four
        with pytest.raises(ConfigError, match=r"compressor.local_layer=6.* tower has 4 layers"):
            run(*words)
        return
    assert run(*words) == 0
    methods = json.loads((tmp_path / "bench.json").read_text())["methods"]
    assert list(methods) == ["vanilla", "vzip", *(["eager_maps"] if name == "visionzip" else [])]
    assert methods["vzip"]["num_visual_tokens"] == 16 and methods["vanilla"]["num_visual_tokens"] == 64
    for stage in methods["vzip"]["flops"].values():
        assert stage["formula"] in (None, stage["counted"])
    projected = {key: methods[key]["flops"]["projector"]["counted"] for key in ("vanilla", "vzip")}
    all_rows = method_files()[name].method.space == "projected"
    assert projected["vzip"] * (1 if all_rows else 4) == projected["vanilla"]


def test_a_directory_that_another_process_writes(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(RunExistsError, match=r"writes there at this moment.* out=DIR"):
        run("model=tiny", f"out={tmp_path}")


def test_one_pass_has_no_quartiles_and_no_ratio_without_saying_so(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model={checkpoint}", "budget=12+4", "device=cpu", "repeats=1", "warmup=0", "methods=vanilla,vzip"]
    assert run(*words, f"out={tmp_path}") == 0
    told = capsys.readouterr()
    assert "each time is of one pass, so their spread is not known" in told.out and "[quartiles]" not in told.out
    ratios = [line for line in told.out.splitlines() if "as fast as" in line]
    assert ratios and all("(one pass each: that may be chance" in line for line in ratios)
    assert "measuring: " in told.err and " passes (100 %)" in told.err, "progress without a terminal"

"""``python -m vzip prefetch`` against a hub on this machine, and what a machine without a network does with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from tests.config.fake_hub import COMMIT, FakeHub, serving

from vzip.cli import prefetch

datasets = pytest.importorskip("datasets")
pytest.importorskip("lmms_eval")

ROOT = Path(__file__).resolve().parents[2]
TASK = """
task: {name}
dataset_path: own/{name}
dataset_kwargs: {{token: {token}}}
output_type: generate_until
test_split: test
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 2}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """own/tiny is the built-in model, own/colors a data set of one question."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "data").mkdir()
    row = {"question": "What color is the star?", "answer": "red", "image": Image.new("RGB", (56, 56), "red")}
    features = datasets.Features(
        question=datasets.Value("string"), answer=datasets.Value("string"), image=datasets.Image()
    )
    datasets.Dataset.from_list([row], features=features).to_parquet(
        str(folder / "data" / "test-00000-of-00001.parquet")
    )
    tiny = ROOT / "src" / "vzip" / "demo" / "tiny"
    with serving({("models", "own/tiny"): tiny, ("datasets", "own/colors"): folder}) as served:
        yield served


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of one's own: colors is there, absent is not, private wants a login."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "utils.py").write_text("def visual(doc):\n    return [doc['image'].convert('RGB')]\n")
    for name, token in (("colors", "false"), ("absent", "false"), ("private", "true")):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, token=token))
    return folder


def call(words: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in a shell that knows nothing of this one's hub."""
    ours = ("HF_", "TRANSFORMERS_", "LMMS_EVAL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    kept |= {"PYTHONPATH": str(ROOT / "src"), **environment}
    return subprocess.run([sys.executable, *words], cwd=folder, env=kept, capture_output=True, text=True, timeout=300)


def words_of(tasks: Path, *names: str) -> list[str]:
    model = ["model=llava_local", "model.name_or_path=own/tiny", "budget=32tok", "eval=scenes"]
    return [*model, f"eval.include_path={tasks}", f"eval.tasks=[{','.join(names)}]"]


@pytest.mark.whole
def test_what_was_fetched_is_enough_without_a_network(hub: FakeHub, tasks: Path, tmp_path: Path) -> None:
    hub.requests.clear()
    hub.cut["model.safetensors"] = 10_600_000  # the line breaks; the client goes on from its last piece of 10 MiB
    words = words_of(tasks, "colors")
    online = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    done = call(["-m", "vzip", "prefetch", *words], online, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"hub: {hub.address}" in done.stderr
    assert re.search(r"checkpoint own/tiny: \d+\.\d MB", done.stderr), done.stderr
    assert re.search(r"task colors: own/colors: \d+\.\d MB", done.stderr)
    assert re.search(r"2 repositories, \d+\.\d MB; data sets take about as much again", done.stderr)
    assert "1/2 checkpoint own/tiny" in done.stderr and "2/2 task colors" in done.stderr
    assert f"RANGE {10 * 2**20} model.safetensors" in hub.requests

    lines = done.stdout.splitlines()
    exports = dict(line.removeprefix("export ").split("=", 1) for line in lines)
    assert all(line.startswith("export ") for line in lines)
    assert exports == {
        "HF_HOME": str(tmp_path / "home"),
        "LMMS_EVAL_DATASETS_CACHE": str(tmp_path / "home" / "datasets"),
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    hub.requests.clear()
    run = call([str(ROOT / "eval.py"), *words, "paths.run_dir=run"], exports, tmp_path)
    assert run.returncode == 0, run.stderr
    assert hub.requests == []
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["model"]["revision"] == COMMIT and record["tasks"]["colors"]["num_samples"] == 1


@pytest.mark.slow
def test_a_failure_loses_nothing_else_and_is_named(hub: FakeHub, tasks: Path, tmp_path: Path) -> None:
    online = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    done = call(
        ["-m", "vzip", "prefetch", *words_of(tasks, "absent", "colors"), "model.adapter_path=own/absent"],
        online,
        tmp_path,
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    end = done.stderr[done.stderr.index("could not be fetched") :]
    assert "2 of 4 could not be fetched" in done.stderr and "checkpoint own/absent: own/absent: 404" in end
    assert "task absent: own/absent" in end and "colors" not in end
    assert list((tmp_path / "home" / "datasets").glob("own___colors/**/*.arrow"))


@pytest.mark.slow
def test_dry_run_fetches_nothing_and_a_login_is_asked_for_first(hub: FakeHub, tasks: Path, tmp_path: Path) -> None:
    online = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    hub.requests.clear()
    done = call(["-m", "vzip", "prefetch", *words_of(tasks, "colors"), "--dry-run"], online, tmp_path)
    assert done.returncode == 0 and done.stdout == "" and "MB" in done.stderr, done.stderr
    assert not [asked for asked in hub.requests if asked.endswith((".safetensors", ".parquet"))]
    done = call(["-m", "vzip", "prefetch", *words_of(tasks, "private", "colors")], online, tmp_path)
    assert done.returncode == 2 and "tasks private: lmms-eval's task files" in done.stderr
    assert "HF_TOKEN" in done.stderr and not list((tmp_path / "home").glob("datasets/own___colors"))


@pytest.mark.whole
def test_without_a_network_there_is_one_message(tasks: Path, tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    words = ["-m", "vzip", "prefetch", *words_of(tasks, "colors")]
    done = call(words, nowhere, tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert "http://127.0.0.1:9: the hub does not answer" in message
    assert "HF_HUB_OFFLINE=1" in message and "model.name_or_path=DIR" in message and "HF_ENDPOINT" in message
    done = call(words, {"HF_HUB_OFFLINE": "1"}, tmp_path)
    assert done.returncode == 2 and "HF_HUB_OFFLINE=1 is set, so nothing may be fetched" in done.stderr


def test_recipes_and_tables_say_what_they_need(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from vzip.cli.prefetch import composed, training_sets

    configs = composed(["+exp=llava15_7b_64tok", "+exp=llava15_7b_vanilla,tiny_64tok", "eval.tasks=[gqa]"])
    assert [config["recipe"] for config in configs] == ["llava15_7b_64tok", "llava15_7b_vanilla", "tiny_64tok"]
    assert all(config["eval"]["tasks"] == ["gqa"] for config in configs)
    assert len(composed(["table", "scenes"])) > 3
    (training,) = training_sets(configs, tmp_path)
    assert training.manifest.name == "llava_v1_5_mix665k" and training.root == tmp_path / "llava_v1_5_mix665k"
    assert training.command.startswith("python -m vzip data download llava_v1_5_mix665k --root")
    assert list(training_sets(composed(["+exp=tiny_64tok"]), None)) == []


@pytest.mark.parametrize("adapter", ["adapter_model.safetensors", "adapter_model.bin"])
def test_what_llavas_layout_needs_beside_it(adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a repository and of a directory: the tower, and the language model that LoRA or a projector goes with."""
    lora, projector = tmp_path / "lora", tmp_path / "projector"
    for folder in (lora, projector):
        folder.mkdir()
        fields = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
        (folder / "config.json").write_text(json.dumps(fields | {"_name_or_path": "lmsys/vicuna-7b-v1.5"}))
    (lora / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "lmsys/vicuna-13b-v1.5"}))
    for file in (lora / adapter, lora / "non_lora_trainables.bin", projector / "mm_projector.bin"):
        file.write_bytes(b"x")

    class Served:
        def files(self, kind: str, name: str, revision: str | None = None) -> dict[str, int | None]:
            return {file.name: 1 for file in lora.iterdir()} if name == "own/lora" else {"config.json": 1}

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision: lora / file)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")

    def needed(name: str) -> dict[str, set[str] | None]:
        config = {"model": {"name_or_path": name, "revision": None, "adapter_path": None}, "compressor": {}}
        found = prefetch.checkpoints([config], Served())  # type: ignore[arg-type]
        return {item.name: None if item.files is None else set(item.files) for item in found}

    clip = "openai/clip-vit-large-patch14-336"
    of_hub = needed("own/lora")
    assert of_hub.keys() == {"own/lora", clip, "lmsys/vicuna-13b-v1.5"}
    assert of_hub["own/lora"] == {"config.json", "adapter_config.json", adapter, "non_lora_trainables.bin"}
    assert needed(str(lora)).keys() == {clip, "lmsys/vicuna-13b-v1.5"}
    assert needed(str(projector)).keys() == {clip, "lmsys/vicuna-7b-v1.5"}
    (tmp_path / "vicuna-7b-v1.5").mkdir()
    assert needed(str(projector)).keys() == {clip}, "the language model is beside it"
    assert needed(str(tmp_path / "empty")) == {}


def test_one_format_of_the_weights_is_fetched() -> None:
    from vzip.cli.prefetch import _needed

    names = ["config.json", "model.safetensors", "pytorch_model.bin", "README.md", "sub/config.json", "tokenizer.model"]
    assert set(_needed(dict.fromkeys(names, 1)) or ()) == {"config.json", "model.safetensors", "tokenizer.model"}
    assert set(_needed({"config.json": 1, "pytorch_model-1.bin": 2}) or ()) == {"config.json", "pytorch_model-1.bin"}
    clip = {"open_clip_pytorch_model.bin": 1, "model.safetensors": 1, "open_clip_config.json": 1}
    assert set(_needed(clip) or ()) == {"open_clip_pytorch_model.bin", "open_clip_config.json"}


def test_the_sizes_on_the_cluster_page_are_the_committed_ones(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib import resources

    from vzip.cli.prefetch import published_size
    from vzip.data.manifest import load_manifest

    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    committed = json.loads(
        (resources.files("vzip.evaluation.benchmarks") / "data_sizes.json").read_text(encoding="utf-8")
    )
    known = {name: entry["num_bytes"] for name, entry in committed["data_sets"].items() if entry["num_bytes"]}
    assert all(entry["source"] for entry in committed["data_sets"].values())
    for name, size in known.items():
        assert published_size(*(name.split(", ") if ", " in name else (name, None))) == size
        title = name.partition("/")[2].partition(",")[0]
        assert re.search(rf"^\| {title}\b.*\| {size / 1e9:.{1 if size > 1e10 else 2}f} \|$", page, re.MULTILINE), name
    for name in ("llava_v1_5_mix665k", "llava_pretrain_558k", "open_llava_next_mix1m"):
        files = load_manifest(name).files
        notes = [re.match(r"About ([\d.]+) (GB|MB)", file.note) for file in files if file.num_bytes is None]
        noted = sum(float(note[1]) * {"GB": 1e9, "MB": 1e6}[note[2]] for note in notes if note)
        total = sum(file.num_bytes or 0 for file in files) + noted
        assert f"| `{name}` | {total / 1e9:.1f} |" in page, (name, total)

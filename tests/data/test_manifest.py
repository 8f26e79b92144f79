"""Manifests: the shipped ones are whole and consistent; broken ones are refused with every problem named."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from vzip import cli
from vzip.data.manifest import load_manifest, manifest_folder
from vzip.errors import ManifestError

NAMES = ("llava_v1_5_mix665k", "llava_pretrain_558k", "open_llava_next_mix1m")


def test_every_shipped_manifest_is_read():
    assert {path.stem for path in manifest_folder().glob("*.json")} == {*NAMES, "scenes", "video_qa"}
    with pytest.raises(ManifestError, match="generated: python -m vzip scenes"):
        load_manifest("scenes")
    with pytest.raises(ManifestError, match="fetch the folders of `sets` by hand"):
        load_manifest("video_qa")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_manifests_say_where_each_number_is_from(name):
    manifest = load_manifest(name)
    assert manifest.name == name and manifest.facts and manifest.licence and manifest.revision
    assert manifest.file(manifest.annotations).sha256
    for file in manifest.files:
        assert file.checksum_source and file.licence
        if file.url and file.sha256 is None:
            assert file.checksum_source.startswith("recorded at first download")


def test_the_mixture_has_its_five_image_sources_and_its_published_counts():
    manifest = load_manifest("llava_v1_5_mix665k")
    pictures = {file.source for file in manifest.files} - {"annotations"}
    assert pictures == {"coco", "gqa", "ocr_vqa", "textvqa", "vg"}
    assert set(manifest.num_samples_by_source) == pictures | {"text-only"}
    # The author's own count by task (LLaVA issue 702) adds up to the count by folder (issue 657).
    tasks = {"llava": 157712, "vqav2": 82783, "okvqa": 8998, "aokvqa": 66160, "refcoco": 48447}
    assert sum(tasks.values()) == manifest.num_samples_by_source["coco"]
    assert manifest.num_samples == 665298
    assert {file.extract_to for file in manifest.files} - {None} == pictures


def test_files_shared_by_manifests_are_described_alike():
    known: dict[str, dict] = {}
    for name in NAMES:
        for file in load_manifest(name).files:
            if file.url:
                described = {key: value for key, value in asdict(file).items() if key in ("sha256", "num_bytes")}
                assert known.setdefault(file.url, described) == described


@pytest.fixture
def good():
    return json.loads((manifest_folder() / "llava_pretrain_558k.json").read_text())


def refused(tmp_path, raw, match):
    path = tmp_path / "m.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match=match):
        load_manifest(path)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("path", "../outside.zip", r"files\[1\]\.path: '\.\./outside\.zip' must be a relative path"),
        ("path", None, r"files\[1\]\.path: None"),
        ("path", 5, r"files\[1\]\.path: 5"),
        ("extract_to", "/abs", r"extract_to: '/abs' must be"),
        ("url", "ftp://x", r"url: 'ftp://x' must begin with http"),
        ("url", None, "note: must say where"),
        ("sha256", "abc", "sha256: 'abc' must be 64 hexadecimal"),
        ("num_bytes", 0, "num_bytes: 0 must be a positive"),
        ("num_bytes", True, "num_bytes: True must be a positive"),
        ("sha", "x", r"files\[1\]\.sha: no such key"),
        ("path", "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "stands there twice"),
    ],
)
def test_a_broken_file_entry_is_named(tmp_path, good, key, value, match):
    good["files"][1] |= {key: value, "note": ""}
    refused(tmp_path, good, match)


def test_a_broken_manifest_is_named_with_all_its_problems(tmp_path, good):
    broken = {**good, "nam": "x"}
    del broken["licence"]
    refused(tmp_path, broken, r"(?s)2 problem\(s\).*nam: no such key \(did you mean 'name'\?\).*licence: is missing")
    refused(tmp_path, good | {"annotations": "other.json"}, "'other.json' is none of the files' paths")
    refused(tmp_path, good | {"num_samples_by_source": {"a": 1}}, "adds up to 1, num_samples is 558128")
    refused(tmp_path, good | {"num_samples_by_source": {"a": "1"}}, "must be an object of whole numbers")
    refused(tmp_path, good | {"num_samples": 1.5}, "num_samples: 1.5 must be a positive whole number")
    refused(tmp_path, good | {"files": ["x"]}, "files: must be a list of objects")
    refused(tmp_path, [], "must be an object, is a list")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ManifestError, match="not readable as JSON"):
        load_manifest(tmp_path / "bad.json")
    with pytest.raises(ManifestError, match=r"no manifest of that name \(did you mean 'llava_v1_5_mix665k'\?\)"):
        load_manifest("llava_v15_mix665k")


def download(*words: str) -> int:
    return cli.main(["data", "download", *words])


def test_the_download_lists_chooses_and_refuses(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert download("--list") == 0
    text = capsys.readouterr().out
    files = load_manifest("llava_v1_5_mix665k").files
    assert f"{sum(file.num_bytes or 0 for file in files) / 1e9:.2f}" in text and f"{len(files)} files" in text
    assert all(file.url in text for file in files if file.url), "whole addresses"
    assert all(file.licence in text for file in files), "whole sentences, with whole addresses"
    monkeypatch.setenv("COLUMNS", "200")
    assert download("--list", "--only", "gqa") == 0
    text = capsys.readouterr().out
    assert "gqa/images.zip" in text and "21.82" in text and "coco" not in text.partition("gqa")[2]
    assert download("--root", str(tmp_path), "--only", "cocoa") == 2
    assert "no such source (did you mean 'coco'?)" in capsys.readouterr().err
    assert download() == 2
    assert "--root DIR is missing" in capsys.readouterr().err
    assert download("open_llava_next_mix1m", "--root", str(tmp_path), "--only", "sam") == 1
    assert "sam: to be fetched by hand. From https://" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value", ["../out", "/etc", "a/../../b", "..", "", None, 3, "a\0b", "x" * 5000, "..\\up", "a\nb"]
)
@pytest.mark.parametrize("key", ["name", "image_root", "path", "extract_to"])
def test_no_name_in_a_manifest_leaves_the_data_folder(tmp_path, good, key, value):
    """``name`` too: the lock file and the mark of a running download are called by it."""
    if key == "extract_to" and value is None:
        return  # nothing to unpack
    raw = json.loads(json.dumps(good))
    (raw["files"][0] if key in ("path", "extract_to") else raw)[key] = value
    refused(tmp_path, raw, key)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"3"])
def test_a_file_that_is_no_manifest_is_named(tmp_path, content):
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(ManifestError, match=r"m\.json"):
        load_manifest(tmp_path / "m.json")
    for name in ("x" * 5000, "a\0b", "~nobody-of-this-name/m"):
        with pytest.raises(ManifestError, match="no such file, and no manifest of that name"):
            load_manifest(name)

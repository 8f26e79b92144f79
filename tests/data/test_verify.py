"""`python -m vzip data verify`: what is missing, empty, cut off or no image is named, and nothing else."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

import vzip.data.verify as verify_module
from vzip import cli
from vzip.data.llava_json import LlavaJson
from vzip.data.subset import choose
from vzip.data.verify import distinct_images, find_problems

NUM = 40


def sample(number: int, *names: str) -> dict:
    words = "<image>" * len(names) + f" question {number}"
    record: dict = {"id": f"{number}", "conversations": [{"from": "human", "value": words}]}
    record["conversations"].append({"from": "gpt", "value": "answer"})
    if names:
        record["image"] = names[0] if len(names) == 1 else list(names)
    return record


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """40 samples over 20 sound images in two folders, every fifth sample text-only, every seventh with two."""
    monkeypatch.setenv("VZIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    rng = np.random.RandomState(0)
    for number in range(20):
        path = tmp_path / picture(number)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.randint(0, 255, (40, 60, 3)).astype(np.uint8)).save(path)
    names = [() if n % 5 == 0 else (picture(n), picture(n + 1)) if n % 7 == 0 else (picture(n),) for n in range(NUM)]
    (tmp_path / "data.json").write_text(json.dumps([sample(n, *names[n]) for n in range(NUM)]))
    return tmp_path


def picture(number: int) -> str:
    return f"{'coco' if number % 2 else 'vg'}/{number % 20}.jpg"


def verify(folder, capsys, *words) -> tuple[int, str]:
    code = cli.main(["data", "verify", "--json", str(folder / "data.json"), "--workers", "2", *words])
    return code, capsys.readouterr().out


def test_sound_data_is_sound(folder, capsys):
    code, text = verify(folder, capsys)
    assert code == 0
    assert "all images are there and can be decoded" in text and "40 of 40 samples" in text


def damage(folder) -> dict[str, str]:
    """Breaks five images; returns how, by name."""
    (folder / picture(1)).unlink()
    (folder / picture(2)).write_bytes(b"")
    whole = (folder / picture(3)).read_bytes()
    (folder / picture(3)).write_bytes(whole[: len(whole) // 2])
    (folder / picture(4)).write_text("<html>404</html>")
    (folder / picture(6)).rename((folder / picture(6)).with_suffix(".png"))
    kinds = {1: "missing", 2: "empty", 3: "damaged", 4: "damaged", 6: "missing"}
    return {picture(number): kind for number, kind in kinds.items()}


def test_each_broken_image_is_named_once(folder, capsys):
    broken = damage(folder)
    code, text = verify(folder, capsys, "--report", str(folder / "report.jsonl"))
    lines = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    assert code == 1
    assert {line["image"]: line["kind"] for line in lines} == broken and len(lines) == len(broken)
    for line in lines:
        assert f"{line['kind']}: {line['reason']} (sample {line['sample']})" in text
        assert line["image"].startswith(line["source"])
    assert "no such file" in text and "0 bytes" in text and "cut off or damaged" in text
    assert "not an image" in text and "but 6.png is there: the data set names it 6.jpg" in text
    assert "not usable as it is: 5 image(s), 0 other" in text


def test_quick_looks_at_presence_alone(folder, capsys):
    broken = damage(folder)
    data = LlavaJson(folder / "data.json")
    found = {problem.image.name for problem in find_problems(data, decode=False)}
    assert found == {name for name, kind in broken.items() if kind != "damaged"}
    assert verify(folder, capsys, "--quick")[0] == 1
    for name in found:
        Image.new("RGB", (4, 4)).save(folder / name)
    code, text = verify(folder, capsys, "--quick")
    assert code == 0 and "there and not empty" in text


def test_each_image_is_looked_at_once_and_the_queue_is_short(folder, monkeypatch):
    data = LlavaJson(folder / "data.json")
    plain = {name for i in range(NUM) for name in data.record(i).images}
    total, pictures = distinct_images(data)
    names = [found.name for found in pictures]
    assert set(names) == plain and len(names) == len(plain) == total
    looked_at, done, ahead = [], [], []

    def count(named, decode):
        looked_at.append(named.name)

    def taken(tasks):
        for number, task in enumerate(tasks):
            ahead.append(number + 1 - len(done))
            yield task

    monkeypatch.setattr(verify_module, "check_image", count)
    monkeypatch.setattr(verify_module, "_QUEUED_PER_WORKER", 2)
    monkeypatch.setattr(verify_module, "distinct_images", lambda *args: (total, taken(distinct_images(*args)[1])))
    assert list(find_problems(data, num_workers=2, on_image=lambda n, of: done.append((n, of)))) == []
    assert sorted(looked_at) == sorted(plain)
    assert done == [(n, total) for n in range(1, total + 1)] and max(ahead) <= 4


def test_a_part_is_checked_alone(folder, capsys):
    damage(folder)
    data = LlavaJson(folder / "data.json")
    indices = choose(data, 0.3, 5)
    named = {name for i in indices for name in data.record(int(i)).images}
    found = {problem.image.name for problem in find_problems(data, indices)}
    assert found == {p.image.name for p in find_problems(data)} & named
    code, text = verify(folder, capsys, "--fraction", "0.3", "--seed", "5")
    assert code == (1 if found else 0) and f"{len(indices)} of 40 samples" in text


def test_many_problems_are_cut_short_and_counted(folder, capsys, monkeypatch):
    monkeypatch.setattr("vzip.cli.data.NUM_SHOWN", 3)
    for path in [*folder.glob("coco/*.jpg"), *folder.glob("vg/*.jpg")]:
        path.unlink()
    code, text = verify(folder, capsys)
    assert code == 1 and text.count("no such file") == 3
    total = distinct_images(LlavaJson(folder / "data.json"))[0]
    assert f"... and {total - 3} more; --report FILE takes all" in text


def test_records_that_break_the_format_are_named_too(folder, capsys):
    records = json.loads((folder / "data.json").read_text())
    records[3]["conversations"].pop()
    records.append(records[4])
    (folder / "data.json").write_text(json.dumps(records))
    code, text = verify(folder, capsys)
    assert code == 1 and "1 record(s) break LLaVA's format" in text and "record 3 (byte" in text
    assert "1 samples repeat an earlier one's id, 1 repeat it word for word" in text


@pytest.fixture
def manifest(folder):
    content = (folder / "data.json").read_bytes()
    counts = LlavaJson(folder / "data.json").count_sources()
    file = {"path": "data.json", "source": "annotations", "url": None, "num_bytes": len(content)}
    file |= {"sha256": hashlib.sha256(content).hexdigest(), "checksum_source": "the test", "extract_to": None}
    file |= {"num_images": None, "licence": "none", "note": "by hand"}
    raw = {"name": "own", "description": "", "licence": "", "revision": "", "facts": [], "annotations": "data.json"}
    raw |= {"image_root": ".", "num_samples": NUM, "num_samples_by_source": counts, "files": [file]}
    path = folder / "own.json"
    path.write_text(json.dumps(raw))
    return path


def by_manifest(path, capsys) -> tuple[int, str]:
    code = cli.main(["data", "verify", str(path), "--root", str(path.parent), "--workers", "2"])
    streams = capsys.readouterr()
    return code, streams.out + streams.err


def test_a_manifests_annotations_counts_and_images_are_checked(folder, manifest, capsys):
    assert by_manifest(manifest, capsys)[0] == 0
    assert json.loads((folder / "own.lock.json").read_text())["data.json"]["num_bytes"] > 0
    raw = json.loads(manifest.read_text())
    raw["num_samples"], raw["num_samples_by_source"] = NUM + 1, raw["num_samples_by_source"] | {"gqa": 1}
    manifest.write_text(json.dumps(raw))
    code, text = by_manifest(manifest, capsys)
    assert code == 1 and "40 samples, the manifest says 41" in text and "gqa: 0 samples, the manifest says 1" in text
    (folder / "data.json").write_bytes((folder / "data.json").read_bytes().replace(b"question 1", b"question !"))
    code, text = by_manifest(manifest, capsys)
    assert code == 2 and "ManifestError" in text and "SHA-256" in text
    (folder / "data.json").unlink()
    code, text = by_manifest(manifest, capsys)
    assert code == 2 and "python -m vzip data download" in text


def test_the_subset_command_counts_and_lists(folder, capsys):
    ids = folder / "ids.jsonl"
    words = ["--json", str(folder / "data.json"), "--fraction", "1/4", "--seed", "2", "--no-text-only"]
    assert cli.main(["data", "subset", *words, "--ids", str(ids)]) == 0
    data = LlavaJson(folder / "data.json")
    chosen = choose(data, 0.25, 2, keep_text_only=False)
    lines = [json.loads(line) for line in ids.read_text().splitlines()]
    assert [line["index"] for line in lines] == chosen.tolist()
    assert [line["id"] for line in lines] == [data[int(i)].id for i in chosen]
    assert f"{len(chosen)} of 40 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify"], "name either a manifest or --json FILE"),
        (["verify", "llava_v1_5_mix665k", "--json", "x"], "name either"),
        (["verify", "llava_v1_5_mix665k"], "--root DIR is missing"),
        (["verify", "llava_v1_5_mix", "--root", "x"], "did you mean 'llava_v1_5_mix665k'"),
        (["verify", "--json", "nowhere.json"], "no such file"),
        (["verify", "--json", "x", "--workers", "0"], "--workers 0: must be at least 1"),
        (["verify", "--json", "x", "--report", "nowhere/r"], "the folder nowhere does not exist"),
        (["subset", "--json", "x", "--ids", "nowhere/r"], "the folder nowhere does not exist"),
    ],
)
def test_bad_command_lines(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

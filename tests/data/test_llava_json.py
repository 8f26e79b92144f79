"""LLaVA-format files: every record as json.load gives it, flat memory, and what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import tracemalloc

import numpy as np
import pytest

import vzip.data.llava_index as index_module
from vzip.data.llava_json import LlavaJson, Turn
from vzip.data.llava_record import Record
from vzip.errors import ConfigError, ManifestError

ALPHABET = 'ab {}[]",:\\\n\t é中😀\u2028'


def talk(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def random_records(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    records: list[dict] = []
    for number in range(count):
        words = "".join(rng.choices(ALPHABET, k=rng.randrange(0, 200)))
        record: dict = {"id": f"{number // 2:06d}", "conversations": talk(words, "yes", "and?", words[:7])}
        num_images = rng.choice([0, 1, 1, 3])
        record["conversations"][0]["value"] += "<image>\n" * num_images
        if num_images:
            paths = [f"{rng.choice(['coco', 'vg'])}/{number}_{n}.jpg" for n in range(num_images)]
            record["image"] = paths[0] if num_images == 1 else paths
        records.append(record)
    return records


def write(path, records, **options):
    path.write_text(json.dumps(records, **options), encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VZIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("layout", ["compact", "indented", "utf8", "lines", "bom"])
@pytest.mark.parametrize("window", [64, 4096])
def test_every_record_is_what_json_load_gives(tmp_path, cache, monkeypatch, layout, window):
    monkeypatch.setattr(index_module, "WINDOW_BYTES", window)
    records, path = random_records(60), tmp_path / "data.json"
    if layout == "lines":
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    elif layout == "bom":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8-sig")
    else:
        options = {"compact": {}, "indented": {"indent": 1}, "utf8": {"ensure_ascii": False}}[layout]
        write(path, records, **options)
    data = LlavaJson(path, tmp_path / "pictures")
    assert len(data) == 60 and data.num_skipped == 0
    for i, record in enumerate(records):
        sample = data[i]
        images = record.get("image", [])
        images = [images] if isinstance(images, str) else images
        assert sample.id == record["id"]
        assert sample.images == [tmp_path / "pictures" / name for name in images]
        assert [(turn.role, turn.text) for turn in sample.turns] == [
            ({"human": "user", "gpt": "assistant"}[turn["from"]], turn["value"]) for turn in record["conversations"]
        ]
        assert data.lengths[i] == sum(len(turn["value"].split()) for turn in record["conversations"])
        assert data.has_images(i) == bool(images) and data.num_images[i] == len(images)
        assert data.source_of(i) == (images[0].split("/")[0] if images else "text-only")
    assert data.num_repeated_ids == 30 and data.num_identical == 0
    assert sum(data.count_sources().values()) == 60 and set(data.count_sources()) == {"coco", "vg", "text-only"}


def test_paths_ids_and_opening_assistant_turns(tmp_path, cache):
    records = [
        {"id": 7, "image": "/abs/x.jpg", "conversations": talk("<image>\nq", "a")},
        {"image": None, "conversations": [{"from": "gpt", "value": "hello"}, *talk("q", "a", "q2")]},
    ]
    data = LlavaJson(write(tmp_path / "own.json", records))
    assert (data[0].id, data[1].id) == ("7", "#1")
    assert str(data[0].images[0]) == "/abs/x.jpg" and data[1].images == []
    assert data[1].turns == [Turn("user", "q"), Turn("assistant", "a"), Turn("user", "q2")]
    with pytest.raises(IndexError):
        data[2]


def test_keys_depend_on_the_record_alone(tmp_path, cache):
    records = random_records(40)
    forward = LlavaJson(write(tmp_path / "a.json", records))
    backward = LlavaJson(write(tmp_path / "b.json", records[::-1], indent=2, ensure_ascii=False))
    assert np.array_equal(forward.keys, backward.keys[::-1])
    twice = LlavaJson(write(tmp_path / "c.json", records + records[:3]))
    assert twice.num_identical == 3 and np.array_equal(twice.keys[:3], twice.keys[40:])
    same_id = [{"id": "1", "conversations": talk("q", answer)} for answer in "ab"]
    keys = LlavaJson(write(tmp_path / "d.json", same_id)).keys
    assert not np.array_equal(keys[0], keys[1])
    # The same bytes on every machine and in every version: a subset chosen today is the subset of tomorrow.
    assert keys[0].tobytes().hex() == "9e317f79dd727b9f64f936241cb01f7e"
    written_out = b'["1", [], [["user", "q"], ["assistant", "a"]]]'
    assert hashlib.blake2b(written_out, digest_size=16).digest() == keys[0].tobytes()


def test_the_index_is_built_once_follows_the_content_and_travels(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "data.json", random_records(10))
    first = LlavaJson(path)
    monkeypatch.setattr(index_module, "read_records", lambda path: pytest.fail("built again"))
    again = LlavaJson(path)
    assert again[3] == first[3]
    copy = pickle.loads(pickle.dumps(first))
    assert len(pickle.dumps(first)) < 2000 and copy[9] == first[9]
    monkeypatch.undo()
    monkeypatch.setenv("VZIP_CACHE", str(cache))
    write(path, random_records(11, seed=1))
    assert len(LlavaJson(path)) == 11
    assert not list((cache / "llava_index").glob(".building-*"))


def test_a_second_process_and_a_damaged_index_do_no_harm(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "data.json", random_records(10))
    build = index_module._build

    def build_while_another_is_faster(path, work):
        monkeypatch.setattr(index_module, "_build", build)
        index_module.load_index(path)
        return build(path, work)

    monkeypatch.setattr(index_module, "_build", build_while_another_is_faster)
    assert len(LlavaJson(path)) == 10
    (folder,) = (cache / "llava_index").iterdir()
    (folder / "index.json").unlink()
    (folder / "rows.bin").write_bytes(b"")
    assert LlavaJson(path)[9].id == "000004"


GOOD = {"id": "good", "image": "a.jpg", "conversations": talk("<image> q", "a")}
BAD_RECORDS = {
    "no assistant": ({"conversations": talk("q")}, "no 'gpt' turn"),
    "only assistant": ({"conversations": [{"from": "gpt", "value": "a"}]}, "no 'gpt' turn"),
    "empty": ({"conversations": []}, "no 'gpt' turn"),
    "too many placeholders": ({"image": "a.jpg", "conversations": talk("<image><image>", "a")}, "2 <image>.*1 image"),
    "placeholder without picture": ({"conversations": talk("<image>", "a")}, "1 <image>.*0 image"),
    "too few placeholders": ({"image": ["a", "b"], "conversations": talk("<image>", "a")}, "1 <image>.*2 image"),
    "no conversations": ({"messages": []}, "'conversations' is None.*messages"),
    "unknown speaker": ({"conversations": [{"from": "humam", "value": "q"}]}, "did you mean 'human'"),
    "not alternating": ({"conversations": [*talk("q", "a"), *talk("q", "a")[1:]]}, "assistant turns follow"),
    "no text": ({"conversations": [{"from": "human", "value": None}]}, "must be a string"),
    "half a pair": ({"conversations": talk("\ud800", "a")}, "half a surrogate"),
    "half a pair in the path": ({"image": "\ud800", "conversations": talk("q", "a")}, "'image' holds half"),
    "half a pair in the id": ({"id": "\ud800", "conversations": talk("q", "a")}, "'id' holds half"),
    "image is a number": ({"image": 3, "conversations": talk("q", "a")}, "'image' is 3"),
    "image is empty": ({"image": "", "conversations": talk("q", "a")}, "'image' is ''"),
    "id is a list": ({"id": [1], "conversations": talk("q", "a")}, r"'id' is \[1\]"),
    "video without a placeholder": ({"video": "a.mp4", "conversations": talk("q", "a")}, r"0 <video> .* 1 video\(s\)"),
    "video is a number": ({"video": 3, "conversations": talk("<video>\nq", "a")}, "'video' is 3"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_are_named_or_skipped_and_counted(tmp_path, cache, name):
    bad, reason = BAD_RECORDS[name]
    path = write(tmp_path / "data.json", [GOOD, bad, GOOD])
    with pytest.raises(ManifestError, match=rf"(?s)1 record.*record 1 \(byte \d+\): .*{reason}"):
        LlavaJson(path)
    data = LlavaJson(path, on_problem="skip")
    assert (len(data), data.num_skipped, len(data.problems)) == (2, 1, 1)
    assert data[1].id == "good"


def test_videos_are_files_beside_the_images(tmp_path, cache):
    both = {
        "image": "coco/a.jpg",
        "video": ["v/a.mp4", "v/b.mp4"],
        "conversations": talk("<image> <video>\n<video>", "a"),
    }
    word = {"conversations": talk("what does <video> do in HTML?", "it plays")}
    data = LlavaJson(write(tmp_path / "data.json", [both, word]))
    sample = data[0]
    assert sample.images == [tmp_path / "coco/a.jpg"]
    assert sample.videos == [tmp_path / "v/a.mp4", tmp_path / "v/b.mp4"]
    assert data.num_images.tolist() == [3, 0] and data.source_of(0) == "coco" and data[1].videos == []
    # A record's key does not change by what others may have; with a video it is another record.
    assert data.record(1).key == Record(None, (), data.record(1).turns).key
    assert data.record(0).key != Record(None, ("coco/a.jpg",), data.record(0).turns).key


BAD_FILES = {
    "empty": (b"", "empty"),
    "cut off in a string": (json.dumps([GOOD, GOOD]).encode()[:-20], "too early|Unterminated"),
    "cut off between": (json.dumps([GOOD, GOOD]).encode()[:-1], "ends too early"),
    "only a bracket": (b"[", "ends too early"),
    "no comma": (b"[" + json.dumps(GOOD).encode() * 2 + b"]", "expected ','"),
    "numbers": (b"[1, 2]", "expected a record"),
    "html": (b"<html>\n404</html>", "byte 0 .*line 1.*expected a record"),
    "second line": (json.dumps(GOOD).encode() + b"\n{'id': 1}\n", "line 2"),
    "more behind": (json.dumps([GOOD]).encode() + b" []", "nothing may follow"),
    "nothing in it": (b"[]", "no usable record"),
    "deep": (b'[{"a":' + b"[" * 300_000 + b"]" * 300_000 + b"}]", "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_files_say_where(tmp_path, cache, name):
    content, reason = BAD_FILES[name]
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=f"(?s){reason}"):
        LlavaJson(path)


def test_wrong_encoding_missing_file_and_option(tmp_path, cache):
    path = tmp_path / "data.json"
    path.write_bytes(json.dumps([GOOD], ensure_ascii=False).replace("good", "gööd").encode("latin-1"))
    with pytest.raises(ManifestError, match="not UTF-8"):
        LlavaJson(path)
    with pytest.raises(ManifestError, match="no such file"):
        LlavaJson(tmp_path / "other.json")
    with pytest.raises(ManifestError, match="is a directory"):
        LlavaJson(tmp_path)
    with pytest.raises(ConfigError, match=r"on_problem='ignore'.*refuse, skip"):
        LlavaJson(path, on_problem="ignore")


def test_memory_is_flat(tmp_path, cache, monkeypatch):
    """Indexing and reading a file eight times larger takes no more memory (maps are not counted)."""
    monkeypatch.setattr(index_module, "WINDOW_BYTES", 2**16)
    monkeypatch.setattr(index_module, "_ROWS_PER_WRITE", 100)
    record, peaks = GOOD | {"conversations": talk("<image> q", "w" * 1000)}, []
    for num_records in (500, 4000):
        path = write(tmp_path / f"{num_records}.json", [record] * num_records)
        tracemalloc.start()
        data = LlavaJson(path)
        assert all(data[i].id == "good" for i in range(0, num_records, 10))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 4e6 and peaks[1] < 2 * peaks[0] < 1e6

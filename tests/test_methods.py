"""Methods by name, from their files; the whole method of docs/add-a-method.md is one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.readme.shown import shown_files, write_files

import vzip
from vzip import methods
from vzip.compressors import Signal
from vzip.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
BUDGET = vzip.TokenBudget(6, 3)


def test_files_are_read_as_hydra_reads_them() -> None:
    files = methods.method_files()
    assert set(files) == {file.stem for file in (ROOT / "configs" / "compressor").glob("*.yaml")}
    assert files["vscan"].build(BUDGET) == vzip.VScan(BUDGET, local_layer=6, window=6)
    assert files["random"].build(BUDGET, seed=4) == vzip.RandomTokens(BUDGET, 4)
    assert files["random"].build(BUDGET) == vzip.RandomTokens(BUDGET, 0)  # the file takes the run's seed
    assert files["none"].build() == files["none"].build(BUDGET) == vzip.Identity() and not files["none"].has_budget
    with pytest.raises(ConfigError, match=r"compressor=vscam: not known \(did you mean 'vscan'\?\); allowed are"):
        methods.find_method("vscam")


def test_the_method_that_docs_show_is_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _ = files = list(shown_files())
    assert files == ["src/vzip/compressors/longest_keys.py", "configs/compressor/longest_keys.yaml"]
    write_files(tmp_path)
    module = "vzip.compressors.longest_keys"
    spec = importlib.util.spec_from_file_location(module, tmp_path / code)
    assert spec is not None and spec.loader is not None
    monkeypatch.setitem(sys.modules, module, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules[module])
    monkeypatch.setattr(methods, "checkout", lambda: tmp_path)
    vlm = vzip.CompressedVlm(tiny.llava(), methods.find_method("longest_keys").build(BUDGET))
    visual = vlm.adapter.read_inputs(**tiny.llava_inputs(2))
    with torch.no_grad():
        ((_, vision),) = vlm.adapter.image_outputs(visual, vlm.compressor.reads())
        assert [len(tokens.rows) for tokens in vlm.adapter.encode(visual, vlm.compressor)] == [9, 9]
    best = vision.read_patches(Signal("key_norms")).topk(9).indices.sort().values + 1
    assert torch.equal(vlm.compressor(vision).source_index, best)

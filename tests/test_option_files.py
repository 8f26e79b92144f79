"""Option files, read without Hydra as Hydra reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vzip.config.options import config_dir, groups
from vzip.errors import ConfigError
from vzip.option_files import comments, header, option_values, options, read_yaml, summary


def test_what_a_file_builds_on_lies_below_it(tmp_path: Path) -> None:
    (tmp_path / "group").mkdir()
    (tmp_path / "base.yaml").write_text("name: ???\nrate: 1e-3\ninner: {a: 1, b: 2}\n")
    (tmp_path / "group" / "first.yaml").write_text("defaults: [/base@_here_]\nname: first\ninner: {b: 3}\n")
    (tmp_path / "group" / "second.yaml").write_text(
        "defaults:\n  - first\n  - override /other@_global_.other: x\n  - _self_\nname: second\nlink: ${seed}\n"
    )
    assert options(tmp_path, "group") == ["first", "second"]
    expected = {"name": "second", "rate": 0.001, "inner": {"a": 1, "b": 3}, "link": "${seed}"}
    assert option_values(tmp_path, "group", "second") == expected
    assert option_values(tmp_path, "group", "third") == {}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "group").mkdir()
    for text, message in (("- a\n", "must be a mapping of settings"), ("a: [\n", "bad.yaml: cannot be read as YAML")):
        (tmp_path / "group" / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            option_values(tmp_path, "group", "bad")


@pytest.mark.parametrize("path", sorted(config_dir().glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_file_is_read_as_omegaconf_reads_it(path: Path) -> None:
    assert read_yaml(path.read_text()) == OmegaConf.to_container(OmegaConf.load(path))


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("# @package _global_\n# What it\n# is. More.\n#   a command\nkey: 1 # one\nother: 2\n")
    assert header(path) == ["What it", "is. More.", "  a command"] and summary(path) == "What it is."
    assert comments(path) == {"key": "one"}


def test_every_option_says_in_a_sentence_what_it_is() -> None:
    for group in groups(config_dir()):
        for name in options(config_dir(), group):
            assert len(summary(config_dir() / group / f"{name}.yaml")) > 15, f"{group}/{name}"

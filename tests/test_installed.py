"""What a wheel holds beside the modules, and the one error of missing packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from vzip import installed
from vzip.errors import ConfigError, MissingPackageError

REQUIRES = [
    "torch>=2.6",
    "hydra-core>=1.3",
    'av>=15; extra == "eval"',
    'loguru; extra == "eval"',
    'av>=15; extra == "video"',
    'lmms-eval==0.7.3; extra == "eval-full"',
    'gradio>=6; extra == "demo"',
    'hydra-joblib-launcher>=1.2; python_version > "3" and extra == "sweep"',
]


@pytest.fixture
def of_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As if a wheel with these requirements were installed; returns its copy of the checkout."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.yaml").touch()
    monkeypatch.setattr(installed, "COPY", tmp_path)
    monkeypatch.setattr(installed.metadata, "requires", lambda name: REQUIRES)
    installed._requirements.cache_clear()
    monkeypatch.setattr(installed, "_requirements", installed._requirements.__wrapped__)
    return tmp_path


def test_the_files_are_the_checkouts_or_else_the_wheels(of_a_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed.checkout() == of_a_wheel
    assert installed.program("eval") == "vzip eval"
    monkeypatch.setattr(installed, "COPY", of_a_wheel / "nothing")
    assert (installed.checkout() / "eval.py").is_file() and (installed.checkout() / "pyproject.toml").is_file()
    assert installed.program("eval") == "python eval.py" and installed.program("bench") == "python -m vzip bench"


def test_the_working_directory_is_never_taken_for_them(of_a_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(of_a_wheel)
    monkeypatch.setattr(installed, "COPY", of_a_wheel / "nothing")
    monkeypatch.setattr(installed, "_PACKAGE", of_a_wheel / "lib" / "site-packages" / "vzip")
    with pytest.raises(ConfigError, match=r"lib/configs: no base\.yaml"):
        installed.checkout()


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("av", None, "av, which is not installed: pip install 'vzip[video]'."),  # the smallest that has it
        ("av.video", "eval", "av, which is not installed: pip install 'vzip[eval]'."),
        ("av", "sweep", "pip install 'vzip[video]'."),
        ("torch", None, "torch, which is not installed: pip install 'vzip'."),
        ("lmms_eval.api", None, "lmms-eval, which is not installed: pip install 'vzip[eval]' && pip install --no-deps"),
        ("hydra_plugins.hydra_joblib_launcher", None, "hydra-joblib-launcher, which is not installed: pip install"),
        ("hydra", None, "hydra-core, which is not installed: pip install 'vzip'."),
        ("omegaconf", None, "hydra-core, which is not installed"),
        ("yours", None, "yours, which is not installed: it is none of vzip's own requirements"),
    ],
)
def test_what_installs_a_package(of_a_wheel: Path, module: str, extra: str | None, command: str) -> None:
    assert command in str(installed.missing_package("A thing", module, extra=extra))


def test_a_checkout_installs_as_a_checkout(of_a_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "COPY", of_a_wheel / "nothing")
    error = installed.missing_package("x=[y]", "av", otherwise="leave it out")
    assert str(error) == (
        "x=[y] needs the package av, which is not installed: `make install`, or pip install -c lock.txt -e '.[video]',"
        " or leave it out."
    )
    page = str(installed.missing_package("`demo serve`", "gradio", extra="demo"))
    assert page.endswith("`make page`, or pip install -c lock-demo.txt -e '.[demo]'.")  # lock.txt's Pillow is too new
    monkeypatch.setattr(installed.metadata, "requires", lambda name: None)
    assert str(installed.missing_package("x", "av")).endswith("not installed: `make install`.")


def test_a_package_that_is_there_but_broken_says_why(of_a_wheel: Path) -> None:
    error = installed.missing_package("Videos", "av", ImportError("libav.so: not found"))
    assert "av, which cannot be imported (libav.so: not found): pip install" in str(error)
    inner = ModuleNotFoundError("No module named 'hjson'", name="hjson")
    assert "cannot be imported (No module named 'hjson')" in str(installed.missing_package("x", "loguru", inner))


def test_only_what_is_required_can_be_missing(of_a_wheel: Path) -> None:
    assert not installed.is_missing("torch") and not installed.is_missing("unknown-to-vzip")


def test_an_import_at_the_time_of_use_is_named(of_a_wheel: Path) -> None:
    message = r"^`ask` needs the package a-package, which is not installed"
    with pytest.raises(MissingPackageError, match=message), installed.optional_packages("`ask`"):
        import a_package.part  # type: ignore[import-not-found] # noqa: F401


@pytest.mark.parametrize("name", ["vzip.nothing", "_tkinter", None])
def test_a_bug_of_ours_stays_what_it_is(name: str | None) -> None:
    with pytest.raises(ModuleNotFoundError), installed.optional_packages("x"):
        raise ModuleNotFoundError("bug", name=name)
